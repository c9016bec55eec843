"""What the README tells a stranger to type is true."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import conf

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GROUPS = Path(conf.__path__[0])


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.split(" ")[0] == "cl-moe" and not re.search("resume=|--", line)]


@pytest.mark.parametrize("command", commands())
def test_commands_compose(command: str):
    overrides = [word for word in shlex.split(command)[1:] if word != "-m"]
    first_of_sweep = [re.sub(r"=([^\[{,]+),.*", r"=\1", word) for word in overrides]
    with initialize_config_module("conf", version_base="1.3"):
        compose("config", first_of_sweep)


def test_there_are_commands():
    assert len(commands()) >= 5


def test_tables_name_options_that_exist_and_miss_none():
    for group in (
        "stream",
        "layer",
        "model",
        "growth",
        "freeze",
        "prune",
        "strategy",
        "optimizer",
        "tracking",
    ):
        for path in (GROUPS / group).glob("*.yaml"):
            assert f"`{path.stem}`" in README, f"{group}={path.stem} is not in the README"


@pytest.mark.parametrize("code", blocks("python"))
def test_code_runs(code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if "transformers" in code:
        pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    (tmp_path / "snippet.py").write_text(code)
    runpy.run_path(str(tmp_path / "snippet.py"))
    assert "torch.Size" in capsys.readouterr().out


FENCE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Alone:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = top in ALLOWED or top in sys.stdlib_module_names or top.startswith("_sysconfigdata_")
        return PathFinder.find_spec(name, path, target) if known else None

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Alone()]
"""


def torch_and_what_it_brings() -> set[str]:
    """Names of modules that an installation of torch alone has."""
    brought, pending = set(), ["torch"]
    for name in pending:
        with suppress(metadata.PackageNotFoundError):
            texts = metadata.requires(name) or []
            brought.add(canonicalize_name(name))
            needed = [one for one in map(Requirement, texts) if not one.marker or one.marker.evaluate()]
            pending += [one.name for one in needed if canonicalize_name(one.name) not in brought]
    modules = metadata.packages_distributions().items()
    return {module for module, owners in modules if brought & {canonicalize_name(owner) for owner in owners}}


def run_with_torch_alone(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    allowed = {"cl_moe", *torch_and_what_it_brings()}
    (folder / "script.py").write_text(f"ALLOWED = {allowed!r}\n{FENCE}\n{code}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "script.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_script_for_a_strangers_model_needs_torch_alone(tmp_path: Path):
    script = blocks("python")[0]
    assert len([line for line in script.splitlines() if line]) <= 15
    done = run_with_torch_alone(script, tmp_path)
    assert "torch.Size([32, 64]) (8, 4, 4)" in done.stdout, done.stderr
    assert "No module named 'numpy'" in run_with_torch_alone("import numpy", tmp_path).stderr


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, missing


def test_an_own_stream_needs_a_yaml_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import pandas as pd

    recipes = pd.DataFrame({"split": ["train", "validation"], "text": ["stir the soup " * 50, "bake " * 50]})
    recipes.to_parquet(tmp_path / "recipes.parquet")
    monkeypatch.setenv("CL_MOE_DATA", str(tmp_path))
    (yaml,) = blocks("yaml")
    (tmp_path / "conf" / "stream").mkdir(parents=True)
    (tmp_path / "conf" / "stream" / "recipes.yaml").write_text(yaml)
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", ["stream=recipes", f"hydra.searchpath=[file://{tmp_path / 'conf'}]"])
    stream = instantiate(config.stream)
    assert [experience.name for experience in stream] == ["novels_en", "recipes"]
