"""The model that a run leaves behind, loaded elsewhere: ``cl_moe.load_model``."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

import cl_moe
from cl_moe import checkpoint
from cl_moe.checkpoint import Branch
from cl_moe.errors import InputError
from cl_moe.tracking import figures
from cl_moe.tracking.model_files import MODEL, WEIGHTS, megabytes, read_model

ROOT = Path(__file__).parents[1]
WORDS = ("trainer.epochs=1", "stream.tune_on_first=2", "model.width=16", "layer=moe", "layer.hidden=8")
WORDS += ("layer.num_experts=4", "growth=every_experience", "growth.num_experts=2", "freeze=past_experts")


@pytest.fixture(scope="module")
def ended(command_in: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that grew."""
    folder = tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "write_figures", lambda record, folder: [])
        done = command_in(folder, *WORDS, "hydra.run.dir=out", "tracking.uri=sqlite:///mlflow.db")
    assert done.status == 0, done.text
    return folder / "out"


def test_a_fresh_process_computes_the_same_in_three_lines(ended: Path, tmp_path: Path):
    torch.save(inputs := torch.rand(5, 64, generator=torch.Generator().manual_seed(0)), tmp_path / "in.pt")
    (lines,) = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len([line for line in lines.splitlines() if line]) == 3
    lines = re.sub('"outputs/[^"]*"', repr(str(ended)), lines)
    code = f"""import torch
inputs = torch.load("in.pt")
{lines}
torch.save((logits.detach(), routing[0].expert), "out.pt")
assert not model.training
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, check=True)
    logits, expert = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        mine, routing = cl_moe.load_model(ended / MODEL)(inputs)
    assert torch.equal(logits, mine)
    assert torch.equal(expert, routing[0].expert)
    assert logits.shape == (5, 4)


def test_it_is_the_model_of_the_last_checkpoint_grown_and_frozen(ended: Path):
    model = cl_moe.load_model(ended)
    state = checkpoint.at(Branch(ended, 2), lambda state: None)["learner"]
    assert model.state_dict().keys() == state["model"].keys()
    assert all(torch.equal(value, state["model"][name]) for name, value in model.state_dict().items())
    (layer,) = model.expert_layers.values()
    assert layer.cohort_sizes == (4, 2)
    assert layer.frozen_cohorts == (True, False)
    assert model.head.classes == json.loads((ended / MODEL / "model.json").read_text())["classes"]
    assert read_model(ended / MODEL).ledger == json.loads((ended / "ledger.json").read_text())


def test_by_run_id_from_mlflow(ended: Path, monkeypatch: pytest.MonkeyPatch):
    run_id = (ended / "mlflow_run_id").read_text().strip()
    uri = f"sqlite:///{ended.parent}/mlflow.db"
    there = {file.path for file in MlflowClient(uri).list_artifacts(run_id, MODEL)}
    assert there == {f"model/{name}" for name in os.listdir(ended / MODEL)}
    one, other = cl_moe.load_model(run_id, uri), cl_moe.load_model(ended)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    monkeypatch.chdir(ended.parent)
    assert cl_moe.load_model(run_id).head.classes == one.head.classes, "the store of the working folder"


def test_the_weights_are_plain_and_small(ended: Path):
    weights = torch.load(ended / MODEL / WEIGHTS, weights_only=True)
    assert all(type(value) is torch.Tensor for value in weights.values())
    size = (ended / MODEL / WEIGHTS).stat().st_size
    assert size < 1.5e6 * megabytes(cl_moe.load_model(ended)) + 20_000


@pytest.mark.parametrize(("limit", "written"), [("0", False), ("0.001", False), ("null", True)])
def test_a_limit_of_size(limit: str, written: bool, command: Callable, tmp_path: Path):
    words = ("trainer.epochs=1", "stream.tune_on_first=1", "tracking=none", "hydra.run.dir=out")
    done = command(*words, f"checkpoint.model_mb={limit}")
    assert done.status == 0, done.text
    assert (tmp_path / "out" / MODEL).exists() == written
    said = "left in the checkpoints (checkpoint.model_mb=0.001)" in " ".join(done.text.split())
    assert said == (limit == "0.001")
    if not written:
        with pytest.raises(InputError, match=r"checkpoint\.model_mb=null"):
            cl_moe.load_model(tmp_path / "out")


@pytest.mark.parametrize("limit", ["-1", "nan", "many"])
def test_a_wrong_limit_is_refused(limit: str, command: Callable):
    done = command("tracking=none", f"checkpoint.model_mb={limit}")
    assert done.status == 2
    assert "change: checkpoint.model_mb" in done.text


class Touch:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def spoil_code(model: Path) -> None:
    (model / WEIGHTS).write_bytes(pickle.dumps(Touch()))


def spoil_target(model: Path) -> None:
    text = (model / "config.yaml").read_text()
    (model / "config.yaml").write_text(text.replace("cl_moe.models.MLPClassifier", "pandas.read_pickle"))


def spoil_ledger(model: Path) -> None:
    (model / "ledger.json").write_text("[]")


def spoil_act(model: Path) -> None:
    (model / "ledger.json").write_text('[{"act": "explode"}]')


def spoil_shape(model: Path) -> None:
    (model / "model.json").write_text('{"input_shape": [3], "num_classes": 10}')


def lose_weights(model: Path) -> None:
    (model / WEIGHTS).unlink()


def cut_weights(model: Path) -> None:
    os.truncate(model / WEIGHTS, 1000)


def link(model: Path) -> None:
    (model / "ledger.json").unlink()
    (model / "ledger.json").symlink_to("/dev/zero")


SPOILS = [spoil_code, spoil_target, spoil_ledger, spoil_act, spoil_shape, lose_weights, cut_weights, link]


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_what_no_run_wrote_is_refused_and_runs_nothing(
    spoil: Callable[[Path], None], ended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ended / MODEL, tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(InputError):
        cl_moe.load_model("model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["", "nowhere", "0" * 32])
def test_a_name_that_is_no_run(name: str, ended: Path):
    with pytest.raises(InputError):
        cl_moe.load_model(name or ended.parent, f"sqlite:///{ended.parent}/mlflow.db")


def test_importing_the_package_stays_light():
    code = "import sys, cl_moe; print(*{'torch', 'hydra', 'mlflow'} & set(sys.modules)); cl_moe.nothing"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == []
    assert "has no attribute 'nothing'" in done.stderr
