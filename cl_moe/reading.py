"""How well a language model reads, told so that tokenizers compare: by bytes, by words, and by last words.

Legend: B batch, S positions, V vocabulary, T experiences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import lightning as L  # noqa: N812
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import cl_moe.metrics.functional as F  # noqa: N812
from cl_moe.learner import Learner
from cl_moe.metrics import Tally
from cl_moe.metrics.answers import last_words_right
from cl_moe.models.base import ContinualModel
from cl_moe.stream import IGNORE, Stream
from cl_moe.tracking.diagnostics import numbered

BYTE, WORD, LAST = "byte_perplexity", "word_perplexity", "last_word_accuracy"


class Units(NamedTuple):
    """What the predicted tokens of a text spell; words are what stands between white space."""

    tokens: int
    num_bytes: int
    words: int


_KNOWN: WeakKeyDictionary[TensorDataset, Units] = WeakKeyDictionary()
"""A text is counted once, however often it is evaluated on."""


def reads(model: ContinualModel, stream: Stream) -> bool:
    """Whether this model's losses are of the next token, so that they add up to that of a text."""
    return stream.kind == "language" and bool(getattr(model, "causal", False))


def read(
    trainer: L.Trainer, learner: Learner, stream: Stream, row: Tensor, batch_size: int
) -> dict[str, float]:
    """``byte_perplexity/...``, ``word_perplexity/...`` of every experience and of the held-out texts.

    Of the latter ``last_word_accuracy/...`` too (LAMBADA, Paperno et al. 2016): the share of passages whose
    last word is what the model would write, greedily and to its end. Nothing for a model that does not
    predict the next token. The passes over held-out texts are charged as evaluation.

    Args:
        trainer: of the stream.
        learner: as it is now.
        stream: as evaluated.
        row: (T,) scores, minus the loss in nats per token; or of the first ones, if those were measured.
        batch_size: examples per evaluation batch.
    """
    if not reads(learner.model, stream):
        return {}
    T, vocabulary = len(stream), stream.vocabulary
    named = {f"experience_{numbered(e.index, T)}": e.test for e in stream[: len(row)]}
    texts = [(held.name, held.text) for held in stream.held_out if held.text is not None]
    asked = [(held.name, held.passages) for held in stream.held_out if held.passages is not None]
    scores = torch.cat([row, _scores(trainer, learner, [text for _, text in texts], batch_size)])
    points: dict[str, float] = {}
    for (name, data), score in zip([*named.items(), *texts], scores, strict=True):
        units = units_of(data, vocabulary)
        tokens, counts = torch.tensor(units.tokens), torch.tensor([units.num_bytes, units.words])
        values = F.unit_perplexity(-score, tokens, counts).tolist()
        points |= {f"{BYTE}/{name}": values[0], f"{WORD}/{name}": values[1]}
    ends_V = ends_of_words(stream)
    before = learner.score
    learner.score = lambda logits, targets: last_words_right(logits, targets, ends_V)
    try:
        right = _scores(trainer, learner, [passages for _, passages in asked], batch_size)
    finally:
        learner.score = before
    return points | {f"{LAST}/{name}": share for (name, _), share in zip(asked, right.tolist(), strict=True)}


def expected_points(model: ContinualModel, stream: Stream) -> dict[str, float]:
    """The keys that ``read`` gives, with some value: for checking what is asked for."""
    if not reads(model, stream):
        return {}
    names = [f"experience_{numbered(j, len(stream))}" for j in range(len(stream))]
    names += [held.name for held in stream.held_out if held.text is not None]
    keys = [f"{kind}/{name}" for kind in (BYTE, WORD) for name in names]
    keys += [f"{LAST}/{held.name}" for held in stream.held_out if held.passages is not None]
    return dict.fromkeys(keys, 1.0)


def units_of(data: TensorDataset, vocabulary: Sequence[bytes]) -> Units:
    """Tokens, bytes and words of a text's targets.

    Args:
        data: inputs and targets (n, S), in the text's order.
        vocabulary: what each token stands for; empty where tokens are bytes.
    """
    if data not in _KNOWN:
        targets = data.tensors[1]
        tokens = targets[targets != IGNORE].tolist()
        text = b"".join(vocabulary[token] for token in tokens) if vocabulary else bytes(tokens)
        _KNOWN[data] = Units(len(tokens), len(text), len(text.split()))
    return _KNOWN[data]


def ends_of_words(stream: Stream) -> Tensor:
    """(V,) bool: whether a token behind a word ends it; one that begins with a letter or digit goes on.

    Bytes above 127 are parts of letters. Padding ends a word.
    """
    vocabulary = stream.vocabulary or tuple(bytes([byte]) for byte in range(stream.num_classes))
    goes_on = [token[:1].isalnum() or token[:1] >= b"\x80" for token in vocabulary]
    return ~torch.tensor(goes_on)


def _scores(
    trainer: L.Trainer, learner: Learner, parts: Sequence[TensorDataset | None], batch_size: int
) -> Tensor:
    """(parts,) float64 mean scores, in a pass of their own."""
    texts = [part for part in parts if part is not None]
    if not texts:
        return torch.empty(0, dtype=torch.float64)
    tally = Tally(len(texts))
    learner.go_over(trainer, tally, texts, batch_size)
    return tally.scores.compute().cpu()
