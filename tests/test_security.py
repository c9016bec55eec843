"""What a run's folder or a configuration holds cannot have other code run."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import conf
from cl_moe import checkpoint
from cl_moe.errors import InputError
from cl_moe.targets import PARTS, check_targets

SMALL = ("trainer.epochs=1", "stream.tune_on_first=2", "hydra.run.dir=out")
MARK = "executed"


class Bomb:
    """A pickle that leaves a mark when it is read the careless way."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return open, (MARK, "x")


@pytest.fixture
def started(command: Callable, no_drawing: None) -> Path:
    """The folder of a run without a tracker, in the working folder."""
    assert command(*SMALL, "tracking=none").status == 0
    return Path("out")


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def plant(folder: Path, content: bytes) -> None:
    """In place of every checkpoint, one whose name promises just this content."""
    for file in folder.glob("*.pt"):
        file.unlink()
    (folder / f"boundary_001-{hashlib.sha256(content).hexdigest()[:16]}.pt").write_bytes(content)


def archive(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("write", [pickle.dumps, archive])
def test_a_checkpoint_that_would_run_code(write: Callable, started: Path, command: Callable) -> None:
    content = write({"format": checkpoint.FORMAT, "boundary": 1, "batches": 0, "x": Bomb()})
    pickle.loads(pickle.dumps(Bomb())).close()
    assert Path(MARK).exists(), "the bomb is live"
    os.remove(MARK)
    plant(started / "checkpoints", content)
    done = command("resume=out")
    assert done.status == 2, done.text
    assert "cannot be read" in done.text
    assert done.text.count("got: ") == 1
    assert "Traceback" not in done.text
    assert not Path(MARK).exists()


@pytest.mark.parametrize("file", ["command.yaml", "config.yaml"])
def test_a_yaml_that_would_run_code(file: str, started: Path, command: Callable) -> None:
    bomb = f"x: !!python/object/apply:builtins.open [{MARK}, x]\n"
    yaml.UnsafeLoader(bomb).get_single_data()["x"].close()
    assert Path(MARK).exists(), "the bomb is live"
    os.remove(MARK)
    rewrite(started / file, lambda old: bomb.encode() + old)
    before = list(started.rglob("*"))
    done = command("resume=out")
    assert done.status == 2, done.text
    assert "Traceback" not in done.text
    assert not Path(MARK).exists()
    assert list(started.rglob("*")) == before, "nothing was run"


WORDS = [  # stored arguments, none of which Hydra refuses by itself
    ("+stream.order._target_=pandas.read_pickle", "+stream.order.filepath_or_buffer=bomb.pkl"),
    ("+stream.order={_target_:pandas.read_pickle,filepath_or_buffer:bomb.pkl}",),
    ("+stream.order=[{_target_:pandas.read_pickle,filepath_or_buffer:bomb.pkl}]",),
    ("+stream.order='${oc.create:\"{_target_: pandas.read_pickle, filepath_or_buffer: bomb.pkl}\"}'",),
    ("stream._target_=pandas.read_pickle",),
    ("trainer._target_=subprocess.Popen",),
    ("+optimizer.betas._target_=torch.load", "+optimizer.betas.f=bomb.pkl"),
    ("growth._target_=bomb.explode",),
]


@pytest.mark.parametrize(
    "words",
    [*WORDS[:2], *(pytest.param(x, marks=pytest.mark.slow) for x in WORDS[2:])],
    ids=" ".join,
)
def test_stored_arguments_call_nothing_but_builders(
    words: tuple[str, ...], started: Path, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("bomb.pkl").write_bytes(pickle.dumps(Bomb()))
    Path("bomb.py").write_text(f"def explode():\n    open({MARK!r}, 'x').close()\n")
    monkeypatch.syspath_prepend(os.getcwd())
    stored = yaml.safe_load((started / "command.yaml").read_text())
    stored["overrides"] += words
    (started / "command.yaml").write_text(yaml.safe_dump(stored))
    (started / "config.yaml").unlink()  # nor does it help to be a fresh folder
    done = command("resume=out")
    assert done.status == 2, done.text
    assert "which does not say that it builds a part of a run" in done.text
    assert done.text.count("change: ") == 1
    assert not Path(MARK).exists()


def test_hydra_would_have_called_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard above guards something."""
    from hydra.utils import instantiate

    monkeypatch.chdir(tmp_path)
    Path("bomb.pkl").write_bytes(pickle.dumps(Bomb()))
    node = {"_target_": "pandas.read_pickle", "filepath_or_buffer": "bomb.pkl"}
    instantiate(OmegaConf.create({"order": node})).order.close()
    assert Path(MARK).exists()


@pytest.mark.parametrize("path", sorted(Path(conf.__path__[0]).glob("*/*.yaml")), ids=lambda path: path.stem)
def test_every_option_of_ours_builds_a_part(path: Path) -> None:
    node = OmegaConf.create(yaml.safe_load(path.read_text()) or {})
    check_targets(OmegaConf.masked_copy(node, [key for key in node if key == "_target_"]))
    if "_target_" in node.get("stream", {}):
        check_targets(OmegaConf.create({"_target_": node.stream._target_}))


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "torch.load", "torch.hub.load", "cl_moe.cli.main", "pathlib.Path"],
)
def test_what_builds_no_part_is_refused(target: str) -> None:
    with pytest.raises(InputError) as caught:
        check_targets(OmegaConf.create({"model": {"layers": [{"_target_": target}]}}))
    assert caught.value.key == "model.layers.0._target_"
    assert all(part.__name__ in caught.value.allowed for part in PARTS)
