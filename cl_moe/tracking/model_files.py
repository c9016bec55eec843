"""A grown model as files: weights, ledger, configuration. They load elsewhere without running code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.files import regular, whole_or_not, write_atomically

MODEL = "model"
"""Name of the folder, in a run's folder and among its artifacts in MLflow."""
WEIGHTS, LEDGER, CONFIG, ABOUT, README = "weights.pt", "ledger.json", "config.yaml", "model.json", "README.md"
_TEXT = """# A model of cl-moe

```python
from cl_moe import load_model

model = load_model("{place}")  # or the run's id in MLflow
logits, routing = model(inputs)  # inputs: a batch of shape {shape}
```

It was trained on {experiences} of the stream {stream}. `weights.pt` holds tensors alone (torch.load with
weights_only=True), `ledger.json` who was born and frozen when, `config.yaml` the run's whole configuration;
logits stand in the order of `classes` in `model.json`.
"""


class ModelFiles(NamedTuple):
    """A model's files, read.

    Args:
        weights: the state of the model, by name.
        ledger: growth and freeze events, oldest first.
        input_shape: of one input, without the batch.
        num_classes: of the whole stream, or the size of the vocabulary.
    """

    weights: dict[str, Tensor]
    ledger: list[dict[str, Any]]
    input_shape: tuple[int, ...]
    num_classes: int


class Learnt(NamedTuple):
    """What a model was trained on.

    Args:
        stream: its name.
        experiences: names of those trained.
        input_shape: of one input, without the batch.
        num_classes: of the whole stream, or the size of the vocabulary.
        classes: of the logits, in their order.
    """

    stream: str
    experiences: Sequence[str]
    input_shape: Sequence[int]
    num_classes: int
    classes: Sequence[int]


def megabytes(model: nn.Module) -> float:
    """What the weights take, in 10^6 bytes."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values()) / 1e6


def write_model(
    model: nn.Module, ledger: Sequence[dict[str, Any]], learnt: Learnt, folder: Path
) -> list[Path]:
    """Write the folder ``model`` into a run's folder; returns the paths of its files.

    The configuration is copied from the run's folder. The weights come last, so a folder with weights is
    whole.
    """
    into = folder / MODEL
    into.mkdir(exist_ok=True)
    shape = ", ".join(map(str, ("batch", *learnt.input_shape)))
    experiences = ", ".join(learnt.experiences) or "nothing"
    text = _TEXT.format(place=into.name, shape=f"({shape})", experiences=experiences, stream=learnt.stream)
    about = {**learnt._asdict(), "input_shape": list(learnt.input_shape), "classes": list(learnt.classes)}
    write_atomically(into / README, text.encode())
    write_atomically(into / ABOUT, f"{json.dumps(about, indent=1)}\n".encode())
    write_atomically(into / LEDGER, f"{json.dumps(list(ledger), indent=1)}\n".encode())
    write_atomically(into / CONFIG, (folder / CONFIG).read_bytes())
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    with whole_or_not(into / f".{WEIGHTS}.part") as (file, rename):
        torch.save(weights, file)
        rename(into / WEIGHTS)
    return [into / name for name in (README, ABOUT, LEDGER, CONFIG, WEIGHTS)]


def read_model(folder: Path) -> ModelFiles:
    """What ``write_model`` wrote.

    Raises:
        InputError: the folder does not hold that.
    """
    try:
        with open(folder / ABOUT, "rb", opener=regular) as file:
            about = json.load(file)
        with open(folder / LEDGER, "rb", opener=regular) as file:
            ledger = json.load(file)
        with open(folder / WEIGHTS, "rb", opener=regular) as file:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        shape, classes = tuple(map(int, about["input_shape"])), int(about["num_classes"])
        if not all(isinstance(event, dict) for event in [weights, *ledger]):
            raise TypeError("no weights, or no ledger")
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, EOFError, InputError) as error:
        raise refusal(folder, f": {str(error).splitlines()[0][:200]}" if str(error) else "") from error
    except Exception as error:  # pickle's own: something else than tensors
        raise refusal(folder, ", but something else than tensors") from error
    return ModelFiles(weights, ledger, shape, classes)


def refusal(place: object, why: str = "") -> InputError:
    """That something holds no model."""
    return InputError(
        got=f"{place}, which holds no model as a run writes it{why}",
        allowed="a run's folder, its folder `model`, or its id in MLflow (checkpoint.model_mb=null writes "
        "models of any size)",
        key="path_or_run_id",
    )
