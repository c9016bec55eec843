"""Texts as tokens: bytes, or pieces of words that byte-pair encoding found in a training text.

Legend: n texts, S tokens per text.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.stream import IGNORE
from tasks.arrange import whole

KEY = "stream.tokenizer"
PADDING = 0
_FEWEST = 257  # padding, and every byte


class Bytes:
    """UTF-8 bytes are the tokens, 0 .. 255; 0 also pads."""

    num_tokens = 256
    vocabulary: tuple[bytes, ...] = ()

    def encode(self, text: bytes) -> Tensor:
        """(n,) int64 in 0 .. 255; the text may begin or end inside a character."""
        return (
            torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64)
            if text
            else torch.zeros(0).long()
        )


class BytePairs:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019), token 0 for padding.

    Every byte is a token, so that any text can be written; decoded again it is the same to the byte.

    Args:
        texts: what it is trained on.
        num_tokens: size of the vocabulary, at least 257.

    Raises:
        InputError: the texts have fewer pairs than that.
    """

    def __init__(self, texts: Iterable[str], num_tokens: int) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        self.num_tokens = num_tokens
        self._model: Any = Tokenizer(models.BPE())
        self._model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        signs = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=num_tokens, special_tokens=["<padding>"], initial_alphabet=signs, show_progress=False
        )
        with _one_thread():
            self._model.train_from_iterator(texts, trainer)
        found = self._model.get_vocab_size()
        if found != num_tokens:
            raise InputError(
                got=f"a vocabulary of {num_tokens}; the first experience's training text gives {found}",
                allowed=f"at most {found}, or more text",
                key=f"{KEY}.vocab_size",
            )
        byte_of = {sign: byte for byte, sign in enumerate(_signs_of_bytes())}
        words = [str(self._model.id_to_token(token)) for token in range(1, num_tokens)]
        self.vocabulary = (b"", *(bytes(byte_of[sign] for sign in word) for word in words))

    def encode(self, text: bytes) -> Tensor:
        """(n,) int64 in 1 .. num_tokens - 1; bytes of a character cut off at the end are left out."""
        lines = text.decode("utf-8", "ignore").splitlines(keepends=True)
        with _one_thread():
            found = self._model.encode_batch_fast(lines, add_special_tokens=False)
        return torch.tensor([token for line in found for token in line.ids], dtype=torch.int64)


def check_tokenizer(options: Mapping[str, object] | None) -> int | None:
    """The size of the vocabulary to train; None for bytes.

    Args:
        options: None, or ``{kind: bytes}``, or ``{kind: bpe, vocab_size: 1024}``.

    Raises:
        InputError: something else.
    """
    if options is None:
        return None
    given = dict(options) if isinstance(options, Mapping) else {}
    kind, size = given.pop("kind", None), given.pop("vocab_size", None)
    if kind not in ("bytes", "bpe") or given or (kind == "bytes" and size is not None):
        allowed = "null or {kind: bytes}, or {kind: bpe, vocab_size: 1024}"
        raise InputError(got=f"{options!r}", allowed=allowed, key=KEY)
    if kind == "bytes":
        return None
    return whole(size, f"{KEY}.vocab_size", _FEWEST, what="padding and every byte, and pairs of them")


def tokenizer_of(size: int | None, texts: Iterable[str]) -> Bytes | BytePairs:
    """Bytes for no size; else pairs trained on these texts, which should be the first experience's own."""
    return Bytes() if size is None else BytePairs(texts, size)


def encoded_rows(texts: Iterable[str], tokenizer: Bytes | BytePairs) -> Tensor:
    """(N,) int64: texts one after the other, none of whose pairs reaches from one row into the next."""
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(tokenizer.encode(t.encode()) for t in texts)])


def padded(
    texts: Sequence[str],
    tokenizer: Bytes | BytePairs,
    context: int,
    truncate: bool,
    what: str,
    places: Sequence[int] | None = None,
) -> Tensor:
    """(n, S = context) int64: a text per row, padding behind its end.

    Args:
        texts: of the rows.
        tokenizer: of the stream.
        context: S.
        truncate: whether longer texts are cut; if not, they are refused.
        what: the table's name, for errors.
        places: of the rows in their file; None: they are all of it.

    Raises:
        InputError: as ``check_text``.
    """
    tokens_nS = torch.full((len(texts), context), PADDING)
    for row, text in enumerate(texts):
        where = f"{what}, row {row if places is None else places[row]}"
        tokens = check_text(text, tokenizer, None if truncate else context, where)
        tokens_nS[row, : len(tokens)] = tokens[:context]
    return tokens_nS


def check_text(text: str, tokenizer: Bytes | BytePairs, most: int | None, where: str) -> Tensor:
    """(N,) int64: the tokens of a labelled text.

    Raises:
        InputError: an empty text, one with byte 0 (which is padding), or one of more than ``most`` tokens.
    """
    if not text or "\x00" in text:
        problem = "with byte 0" if text else "that is empty"
        raise InputError(got=f"{where}: a text {problem}", allowed="text in every row", key="stream")
    tokens = tokenizer.encode(text.encode())
    if most is not None and len(tokens) > most:
        raise InputError(
            got=f"{where}: a text of {len(tokens)} tokens",
            allowed=f"stream.context of so many, or stream.truncate=true (cut after {most})",
            key="stream.context or stream.truncate",
        )
    return tokens


def windows(text: bytes | Tensor, context: int) -> TensorDataset:
    """Non-overlapping windows of a text of at least 2 tokens: inputs and targets (n, context) int64.

    Args:
        text: bytes, or (N,) int64 tokens.
        context: tokens per window.

    >>> inputs, targets = windows(b"abcd", 2).tensors
    >>> inputs.tolist(), targets.tolist()
    ([[97, 98], [99, 0]], [[98, 99], [100, -100]])
    """
    stream = text if isinstance(text, Tensor) else Bytes().encode(text)
    count = -(-(len(stream) - 1) // context)
    inputs = torch.zeros(count * context, dtype=torch.int64)
    targets = torch.full((count * context,), IGNORE, dtype=torch.int64)
    inputs[: len(stream) - 1] = stream[:-1]
    targets[: len(stream) - 1] = stream[1:]
    return TensorDataset(inputs.view(count, context), targets.view(count, context))


def _signs_of_bytes() -> list[str]:
    """The printable sign that byte-level encoding writes for each byte (GPT-2): itself, or from 256 on."""
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in own else next(others)) for byte in range(256)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """The library would use every core, and warn whoever forks afterwards."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
