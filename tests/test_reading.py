"""How a language model reads: against sums by hand, and greedy writing token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from omegaconf import DictConfig

from cl_moe import launch, preflight
from cl_moe.experiment import run_experiment
from cl_moe.metrics.answers import last_words_right
from cl_moe.reading import ends_of_words, units_of
from cl_moe.run import Run
from cl_moe.stream import ASKED, IGNORE

SMALL = (
    *("stream=text_domains", "stream.domains=[novels_en,bible_en]", "stream.train_bytes=6000"),
    *("stream.test_bytes=1500", "stream.context=32", "model.width=16", "trainer.batch_size=32"),
    "stream.held_out={press:{path:brown_press.parquet,bytes:900,last_words:40}}",
)
PAIRS = "stream.tokenizer={kind:bpe,vocab_size:300}"
MOE = ("layer=moe", "layer.hidden=8", "layer.num_experts=2")

pytestmark = pytest.mark.usefixtures("no_drawing")


def text_of(run: Run, data: Any) -> bytes:
    """What the predicted tokens spell."""
    tokens = [token for row in data.tensors[1].tolist() for token in row if token != IGNORE]
    return b"".join(run.stream.vocabulary[t] if run.stream.vocabulary else bytes([t]) for t in tokens)


@pytest.mark.parametrize(
    "words", [(PAIRS,), *(pytest.param(words, marks=pytest.mark.slow) for words in ((), MOE))]
)
def test_points_are_what_the_model_says(
    words: tuple[str, ...], composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    run = launch.build(composed(*SMALL, *words, "tracking=none", f"output_dir={tmp_path}"))
    run_experiment(run)
    points, model = run.measured.points[-1], run.learner.model.eval()
    (held,) = run.stream.held_out
    named = {"experience_00": run.stream[0].test, "experience_01": run.stream[1].test, "press": held.text}
    for name, data in named.items():
        inputs, targets = data.tensors
        with torch.no_grad():
            logits = model(inputs, mask=targets != IGNORE)[0]
            nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        text = text_of(run, data)
        assert points[f"byte_perplexity/{name}"] == pytest.approx(math.exp(nats / len(text)), rel=1e-4)
        per_word = math.exp(nats / len(text.split()))
        assert points[f"word_perplexity/{name}"] == pytest.approx(per_word, rel=1e-3)
        if not run.stream.vocabulary:
            assert len(text) == int((targets != IGNORE).sum())
    assert points["last_word_accuracy/press"] == pytest.approx(_written_right(run) / 40)


def _written_right(run: Run) -> int:
    """Passages whose word the model writes, one greedy token after the other."""
    held, model, right = run.stream.held_out[0], run.learner.model.eval(), 0
    ends = ends_of_words(run.stream)
    assert held.passages is not None
    for inputs, targets in zip(*held.passages.tensors, strict=True):
        asked = (targets >= ASKED) & (targets < 2 * ASKED)
        first, count = int(asked.nonzero()[0]), int(asked.sum())
        text = inputs[: first + 1].tolist()
        for _ in range(count + 1):
            with torch.no_grad():
                text.append(int(model(torch.tensor([text]))[0][0, -1].argmax()))
        word = (targets[asked] - ASKED).tolist()
        right += text[first + 1 : -1] == word and bool(ends[text[-1]])
    return right


def test_a_word_is_right_to_its_end() -> None:
    targets = torch.tensor([[5, ASKED + 1, ASKED + 2, 2 * ASKED, IGNORE]] * 4)
    written = torch.tensor([[9, 1, 2, 3, 0], [5, 1, 2, 4, 9], [5, 1, 9, 3, 0], [5, 9, 2, 3, 0]])
    ends = torch.tensor([False] * 3 + [True] + [False] * 6)
    right, count = last_words_right(F.one_hot(written, 10).float(), targets, ends)
    assert (right.item(), count.item()) == (1.0, 4)  # the second goes on, the others are other words


def test_it_stands_in_mlflow_as_curves_and_may_be_the_objective(command: Callable[..., Any]) -> None:
    done = command(*SMALL, *MOE, "objective=last_word_accuracy/press")
    assert done.status == 0, done.text
    client = mlflow.MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    (run,) = client.search_runs(["1"])
    for key in ("byte_perplexity/press", "word_perplexity/experience_01", "last_word_accuracy/press"):
        assert [m.step for m in client.get_metric_history(run.info.run_id, key)] == [0, 1, 2], key
    byte, token = (run.data.metrics[f"{key}/experience_00"] for key in ("byte_perplexity", "perplexity"))
    assert byte == pytest.approx(token, rel=1e-9), "bytes are the tokens"


def test_a_model_that_fills_gaps_has_none(command: Callable[..., Any]) -> None:
    done = command(*SMALL, "model=encoder")
    assert done.status == 2
    assert "stream.held_out (or model)" in done.text


def test_units_are_counted_over_windows(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    stream = launch.build(composed(*SMALL, PAIRS, "tracking=none", f"output_dir={tmp_path}")).stream
    units, text = units_of(stream[1].test, stream.vocabulary), 1500
    assert units.tokens < units.num_bytes < text
    assert text - units.num_bytes == len(stream.vocabulary[stream[1].test.tensors[0][0, 0]])
    assert units_of(stream[1].test, ()) is units, "counted once"


@pytest.mark.slow
def test_a_model_that_has_learnt_a_sentence_writes_its_last_word(command: Callable[..., Any]) -> None:
    Path("say.txt").write_text("the cat sat on the mat. " * 400)
    words = ("stream=hf", "stream.source.path=say.txt", "stream.source.test=say.txt", "stream.context=25")
    held = "stream.held_out={say:{path:say.txt,bytes:400,last_words:10}}"
    done = command(
        *words, held, "model.width=32", "model.num_blocks=1", "trainer.epochs=3", "optimizer.lr=1e-2"
    )
    assert done.status == 0, done.text
    client = mlflow.MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    (run,) = client.search_runs(["1"])
    found = [m.value for m in client.get_metric_history(run.info.run_id, "last_word_accuracy/say")]
    assert found[0] == 0
    assert found[-1] >= 0.9, done.text
    assert run.data.metrics["byte_perplexity/say"] < 1.5


def test_another_held_out_text_is_another_measurement(
    composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prints, kept = [], {}
    for content in ("one text of few words. " * 20, "two texts of few words. " * 20):
        (tmp_path / "say.txt").write_text(content)
        words = (*SMALL[:-1], "stream.held_out={say:{path:say.txt,bytes:200,last_words:0}}")
        run = launch.build(composed(*words, "tracking=none", f"output_dir={tmp_path}"))
        prints.append(run.fingerprint)
        kept[run.tags["data_checksum"]] = run
    assert prints[0]["stream"] == prints[1]["stream"]
    assert len(kept) == 2, "runs that comparisons keep apart"
    why = preflight.why_not({"fingerprint": prints[0]}, prints[1], False)
    assert why == "is of other held-out texts"
    older = {part: value for part, value in prints[0].items() if part != "held_out"}
    assert preflight.why_not({"fingerprint": older}, prints[1], False) is None
