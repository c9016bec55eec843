"""A composed configuration on its way to another process, and Hydra's own with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from omegaconf import DictConfig, OmegaConf

from cl_moe import files


def write(config: DictConfig, path: Path, changed: list[str]) -> None:
    """Write what a run was composed from, and the overrides that tell its arm from the default.

    Whatever is looked up (the time of day, the environment) is settled here, once for all processes. A node
    that stands in several places stays a reference.
    """
    raw, resolved = (OmegaConf.to_container(config, resolve=resolve) for resolve in (False, True))
    whole = HydraConfig.get()
    parts = ("runtime", "overrides", "job", "job_logging")  # what is asked of it, and logging
    hydra = {name: OmegaConf.to_container(getattr(whole, name), resolve=True) for name in parts}
    mode = None if whole.mode is None else whole.mode.name
    hydra |= {"verbose": whole.verbose, "mode": mode, "sweep": {"dir": whole.sweep.dir}}
    content = {"hydra": hydra, "run": _settled(raw, resolved), "changed": changed}
    files.write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(content)).encode())


def read(path: Path) -> tuple[DictConfig, list[str]]:
    """Both again, with Hydra's set and logging opened as in the process that wrote it."""
    setup_globals()
    loaded = OmegaConf.load(path)
    assert isinstance(loaded, DictConfig)
    whole = OmegaConf.merge({"hydra": OmegaConf.structured(HydraConf)}, {"hydra": loaded.hydra})
    assert isinstance(whole, DictConfig)
    HydraConfig.instance().set_config(whole)
    configure_log(whole.hydra.job_logging, whole.hydra.verbose)
    run = OmegaConf.create(OmegaConf.to_container(loaded.run, resolve=False))
    assert isinstance(run, DictConfig)
    OmegaConf.set_struct(run, True)
    return run, list(loaded.changed)


def _settled(raw: Any, resolved: Any) -> Any:
    """The resolved tree, but for nodes that are references to other nodes."""
    if isinstance(raw, str) and isinstance(resolved, dict | list):
        return raw
    if isinstance(raw, dict):
        return {key: _settled(value, resolved[key]) for key, value in raw.items()}
    if isinstance(raw, list):
        return [_settled(*pair) for pair in zip(raw, resolved, strict=True)]
    return resolved
