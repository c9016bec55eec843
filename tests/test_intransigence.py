"""``eval.cumulative=``: intransigence against a named cumulative run of the same stream."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cl_moe.metrics.functional import intransigence
from cl_moe.tracking import artifacts, figures

SMALL = ("trainer.epochs=1", "stream.tune_on_first=2", "model.width=16", "tracking=none")


pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture(scope="module")
def ended(command_in: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cumulative run in ``upper``, and a plain one beside it in ``plain``."""
    folder = tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "write_figures", lambda record, folder: [])
        for out, words in (("upper", ("strategy=cumulative",)), ("plain", ())):
            done = command_in(folder, *SMALL, *words, f"hydra.run.dir={out}")
            assert done.status == 0, done.text
    return folder


def test_it_is_what_the_two_matrices_say(ended: Path, command_in: Callable):
    words = (*SMALL, "seed.init=3", "layer=moe", "eval.cumulative=upper", "hydra.run.dir=out")
    done = command_in(ended, *words, "objective=stream/intransigence")
    assert done.status == 0, done.text
    mine, theirs = (
        artifacts.read_matrix(ended / name / artifacts.MATRIX).scores for name in ("out", "upper")
    )
    assert done.objectives == [intransigence(mine, theirs).item()]
    assert f"eval.cumulative='{ended.resolve() / 'upper'}'" in (ended / "out/command.yaml").read_text()


@pytest.mark.slow
def test_a_run_goes_on_from_another_folder(ended: Path, command_in: Callable, tmp_path: Path):
    words = (*SMALL, "eval.cumulative=upper", "hydra.run.dir=again", "objective=stream/intransigence")
    first = command_in(ended, *words)
    second = command_in(tmp_path, f"resume={ended / 'again'}")
    assert (first.status, second.status) == (0, 0), second.text
    assert first.objectives == second.objectives


REFUSED: dict[tuple[str, ...], str] = {
    ("eval.cumulative=nowhere",): "got: eval.cumulative=nowhere",
    ("eval.cumulative=plain",): "a run without strategy=cumulative",
    ("eval.cumulative=upper", "seed.order=1", "stream.tune_on_first=null"): "of other experiences",
    ("eval.cumulative=upper", "stream=permuted_digits"): "of other experiences",
    ("eval.cumulative=''",): "allowed: a value",
    ("objective=stream/intransigence",): "which this run does not define",
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_a_run_that_does_not_fit_is_refused(words: tuple[str, ...], ended: Path, command_in: Callable):
    done = command_in(ended, *SMALL, *words, "hydra.run.dir=refused")
    assert done.status == 2, done.text
    assert REFUSED[words] in done.text
    assert "change: " + ("objective" if "objective" in words[0] else "eval.cumulative") in done.text
    assert not (ended / "refused" / "command.yaml").exists()


@pytest.mark.parametrize(("last", "words"), [(1, "is at 1 of its 2"), (-1, "saved nothing")])
def test_a_run_that_has_not_ended_is_refused(
    last: int, words: str, ended: Path, command_in: Callable, tmp_path: Path
):
    shutil.copytree(ended / "upper", tmp_path / "upper")
    for file in (tmp_path / "upper" / "checkpoints").glob("boundary_*.pt"):
        if int(file.name[9:12]) > last:
            file.unlink()
    done = command_in(tmp_path, *SMALL, "eval.cumulative=upper")
    assert done.status == 2, done.text
    assert words in done.text
