"""Held-out texts of a language stream: named, from the same sources, seen by no experience.

Legend: n passages, S tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.stream import ASKED, IGNORE, HeldOut
from tasks import cells, hub
from tasks.arrange import whole
from tasks.tables import TESTS, from_options, local_file, no_such_source
from tasks.tokens import BytePairs, Bytes, windows

KEY = "stream.held_out"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_LAST = re.compile(r"(?<=\S )([^\W\d_]+)(?=[.!?])")
"""The last word of a sentence, behind a single space."""
_PASSAGE = re.compile(r"(?s)(.*\S)\s+(\S+?)[\s.!?\"']*")
Options = Mapping[str, object] | Sequence[str] | None


@dataclass(frozen=True)
class Text:
    """Where a held-out text comes from, and what is asked of it.

    Args:
        path: a file (``novels_en.parquet``), or ``owner/name`` on the hub.
        column: of texts.
        split: rows of the column ``split``, or the hub's split; None: its ``test`` or ``validation``, all
            rows of a file without that column.
        bytes: the first so many of the text; None for all.
        last_words: so many passages that end with the last word of a sentence, evenly from all of the text;
            0 for none.
        passages: every row is a passage by itself, whose last word is asked for, as in LAMBADA
            (``EleutherAI/lambada_openai``); ``bytes`` and ``last_words`` have no meaning then.

    Raises:
        InputError: a value that is not allowed.
    """

    path: str
    column: str = "text"
    split: str | None = None
    bytes: int | None = 20_000
    last_words: int = 100
    passages: bool = False

    def __post_init__(self) -> None:
        for name in ("path", "column"):
            if not isinstance(getattr(self, name), str):
                raise InputError(got=f"{getattr(self, name)!r}", allowed="a word", key=f"{KEY}.{name}")
        if self.bytes is not None:
            whole(self.bytes, f"{KEY}.bytes", 2)
        whole(self.last_words, f"{KEY}.last_words", 0)
        if not isinstance(self.passages, bool):
            raise InputError(got=f"{self.passages!r}", allowed="true or false", key=f"{KEY}.passages")


def held_out_texts(options: Options, tokens: Bytes | BytePairs, context: int) -> tuple[HeldOut, ...]:
    """Texts for measuring a language model, as tokens.

    Args:
        options: None; names of text files (``[novels_en]``); or ``{name: {path: ..., ...}}``, see ``Text``.
        tokens: of the stream.
        context: tokens per window.

    Raises:
        InputError: a name or a value that is not allowed, a text that is not there or too short.
    """
    texts = _texts(options)
    return tuple(_read(name, text, tokens, context) for name, text in texts.items())


def _texts(options: Options) -> dict[str, Text]:
    if options is None:
        return {}
    named: dict[str, Any]
    if isinstance(options, Mapping):
        named = {str(name): given for name, given in options.items()}
    else:
        listed = (
            list(options) if isinstance(options, Sequence) and not isinstance(options, str) else [options]
        )
        named = {str(name): {} for name in listed}
        if len(named) != len(listed):
            raise InputError(got=f"{listed}", allowed="different names", key=KEY)
    for name, given in named.items():
        if not _NAME.fullmatch(name) or name.startswith("experience_"):
            allowed = "names of letters, digits, . _ -, none of them experience_..."
            raise InputError(got=f"{name!r}", allowed=allowed, key=KEY)
        if not isinstance(given, Mapping):
            raise InputError(got=f"{given!r}", allowed="{key: value, ...}", key=f"{KEY}.{name}")
    return {
        name: from_options(Text, {"path": f"{name}.parquet", **given}, f"{KEY}.{name}")
        for name, given in named.items()
    }


def _read(name: str, text: Text, tokens: Bytes | BytePairs, context: int) -> HeldOut:
    rows, key = _rows(text, f"{KEY}.{name}"), f"{KEY}.{name}"
    if text.passages:
        return HeldOut(name, None, asked(_ends(rows, text, key), tokens, context, key))
    content = "".join(rows)
    encoded = tokens.encode(content.encode()[: text.bytes])
    if len(encoded) < 2:
        raise InputError(
            got=f"{len(encoded)} tokens of {text.path}", allowed="at least 2: one and the next", key=key
        )
    pairs = _sentences(content, text, 16 * context, key)
    return HeldOut(
        name, windows(encoded, context), asked(pairs, tokens, context, key) if text.last_words else None
    )


def _ends(rows: Sequence[str], text: Text, key: str) -> list[tuple[str, str]]:
    """Each passage without its last word, and that word."""
    pairs = []
    for number, row in enumerate(rows):
        found = _PASSAGE.fullmatch(row)
        if found is None:
            raise InputError(
                got=f"{text.path}: fewer than two words in row {number}", allowed="passages", key=key
            )
        pairs.append((found[1], f" {found[2]}"))
    return pairs


def _sentences(content: str, text: Text, reach: int, key: str) -> list[tuple[str, str]]:
    """What stands before the last words of sentences (``reach`` letters of it), and those words."""
    found = list(_LAST.finditer(content)) if text.last_words else []
    if len(found) < text.last_words:
        raise InputError(
            got=f"{len(found)} sentences in {text.path} whose last word can be asked for",
            allowed=f"last_words of at most {len(found)}, or more text",
            key=f"{key}.last_words",
        )
    chosen = [found[place * len(found) // text.last_words] for place in range(text.last_words)]
    ends = [(at.start() - 1, at[1]) for at in chosen]
    return [(content[max(0, end - reach) : end], f" {word}") for end, word in ends]


def asked(
    pairs: Sequence[tuple[str, str]], tokens: Bytes | BytePairs, context: int, key: str
) -> TensorDataset:
    """Passages and their last words as ``HeldOut.passages``: (n, S = context) inputs and targets.

    Args:
        pairs: what stands before a word, and the word with the space before it.
        tokens: of the stream.
        context: S; of a longer beginning the last tokens are shown.
        key: the configuration key that named them.

    Raises:
        InputError: a word that leaves no room for a beginning.
    """
    inputs_nS = torch.zeros(len(pairs), context, dtype=torch.int64)
    targets_nS = torch.full((len(pairs), context), IGNORE)
    for row, (before, word) in enumerate(pairs):
        last = tokens.encode(word.encode())
        room = context - len(last)
        if room < 1:
            raise InputError(
                got=f"a last word of {len(last)} tokens ({word.strip()!r}) in a context of {context}",
                allowed="a longer stream.context",
                key=f"stream.context (or {key})",
            )
        first = tokens.encode(before.encode())[-room:]
        passage: Tensor = torch.cat([first, last])
        inputs_nS[row, : len(passage)] = passage
        targets_nS[row, : len(passage) - 1] = passage[1:]
        targets_nS[row, len(first) - 1 : len(passage) - 1] += ASKED
        targets_nS[row, len(passage) - 1] = 2 * ASKED
    return TensorDataset(inputs_nS, targets_nS)


def _rows(text: Text, key: str) -> list[str]:
    """The texts of the rows that are held out."""
    path = local_file(text.path)
    if path is not None:
        table: Any = hub.from_files([path], f"{key}.path")
        split = "split" if "split" in table.features else None
        sides = cells.texts_of(table, "split", str(path), f"{key}.split") if split else []
    elif text.path.count("/") == 1 and "." not in text.path:
        splits = hub.from_hub(text.path, None, "its files, downloaded", f"{key}.path")
        table, sides = None, list(splits)
    else:
        raise no_such_source(text.path, f"{key}.path")
    wanted = text.split or next((name for name in TESTS if name in sides), None)
    if (sides and wanted not in sides) or (text.split and not sides):
        raise InputError(
            got=f"{text.path} with splits {sorted(set(sides))}, {text.split or 'none held out'} asked for",
            allowed="test or validation, or the name of one of them",
            key=f"{key}.split",
        )
    if table is None:
        table, sides = splits[str(wanted)], []
    rows = cells.texts_of(table, text.column, text.path, f"{key}.column")
    return [row for number, row in enumerate(rows) if not sides or sides[number] == wanted]
