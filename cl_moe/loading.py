"""The model of a finished run in another program: ``cl_moe.load_model``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.folder import read_config
from cl_moe.growth.adapt import replay
from cl_moe.models import ContinualModel
from cl_moe.seeds import seeded
from cl_moe.targets import check_targets
from cl_moe.tracking.fetching import fetched
from cl_moe.tracking.model_files import MODEL, WEIGHTS, read_model, refusal
from cl_moe.tracking.store import DEFAULT_URI

_KEY = "path_or_run_id"


def load_model(path_or_run_id: str | Path, uri: str = DEFAULT_URI) -> ContinualModel:
    """The model of a finished run as it ended, with its weights, in evaluation mode, on the CPU.

    No pickled code runs: weights are tensors, the model is built from the run's configuration, which can have
    only this program's builders called, and takes its shape from the ledger.

    Args:
        path_or_run_id: the folder of a run or its folder ``model``; or an MLflow run id.
        uri: the MLflow store in which a run id is looked up, ``sqlite:///<file>`` or ``http(s)://<server>``.

    Returns:
        ``model(inputs) -> (logits over model.head.classes, routing per block)``; see ``ContinualModel``.

    Raises:
        InputError: no such run, it wrote no model, or the files are not what a run writes.
    """
    with _folder(path_or_run_id, uri) as folder:
        config = OmegaConf.create(read_config(folder, _KEY))
        files = read_model(folder)
    try:
        model = rebuilt(config, files.ledger, files.weights, files.input_shape, files.num_classes)
    except InputError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        raise refusal(folder, ": weights, ledger and configuration do not fit") from error
    return model.eval()


def rebuilt(
    config: DictConfig,
    ledger: Sequence[Mapping[str, Any]],
    weights: Mapping[str, Tensor],
    input_shape: Sequence[int],
    num_classes: int,
) -> ContinualModel:
    """A model of a run's configuration, grown and frozen as its ledger says, with its weights.

    Raises:
        InputError: the configuration names what builds no part of a run.
        RuntimeError: the weights do not fit.
    """
    check_targets(config)
    with seeded(0, "rebuilt"):  # what is drawn is overwritten
        model: ContinualModel = instantiate(config.model)(
            input_shape=tuple(input_shape), num_classes=num_classes
        )
    replay(model, map(dict, ledger))
    model.load_state_dict(weights)
    return model


@contextmanager
def _folder(path_or_run_id: str | Path, uri: str) -> Iterator[Path]:
    path = Path(path_or_run_id)
    if path.is_dir():
        if not (found := [folder for folder in (path, path / MODEL) if (folder / WEIGHTS).is_file()]):
            raise refusal(path)
        yield found[0]
        return
    with fetched(str(path_or_run_id), [MODEL], uri, _KEY) as place:
        if not (place / MODEL / WEIGHTS).is_file():
            raise refusal(f"the run {path_or_run_id} in {uri}")
        yield place / MODEL
