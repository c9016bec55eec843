"""What a run has to tell, entry by entry, and the lines that keep it. A line read back is not trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from cl_moe.errors import InputError

BATCH = 1000  # points delivered together: MLflow takes no more
_MAX_INTEGER = 2**63 - 1
START_TAG = "start_token"
_KEPT = ("status", "output_dir", START_TAG)  # tags that a run's start and end set, never a line
_MLFLOWS = "mlflow."  # tags that mean something to MLflow: a run's name, parent, user


class Point(NamedTuple):
    """A metric's value at a step, noted so many milliseconds after 1970."""

    metric: str
    value: float
    ms: int
    step: int


class Tag(NamedTuple):
    """A tag of the run."""

    tag: str
    value: str


class File(NamedTuple):
    """A file to copy: its path relative to the run's folder; the artifact folder, "" for the top."""

    artifact: str
    folder: str


class Closing(NamedTuple):
    """How the run ended, and when (milliseconds after 1970)."""

    status: str
    ms: int


Entry = Point | Tag | File | Closing


class Batch(NamedTuple):
    """Up to 1,000 points, or one entry of another kind; ``end`` is the offset behind them in the file."""

    entries: list[Entry]
    end: int


class Counts(NamedTuple):
    """How much of each kind; an end is a closing status.

    >>> print(Counts(points=2, files=1), Counts(tags=2, ends=1), Counts(), sep=" | ")
    2 points, 1 file | 2 tags, the end of the run | nothing
    """

    points: int = 0
    tags: int = 0
    files: int = 0
    ends: int = 0

    def __str__(self) -> str:
        words = ((self.points, "point"), (self.tags, "tag"), (self.files, "file"))
        parts = [f"{number} {word}{'s' * (number > 1)}" for number, word in words if number]
        return ", ".join(parts + ["the end of the run"] * (self.ends > 0)) or "nothing"

    def plus(self, entries: Iterable[Entry]) -> Counts:
        """With some entries more."""
        kinds = [type(entry) for entry in entries]
        more = (kinds.count(kind) for kind in (Point, Tag, File, Closing))
        return Counts(*(mine + new for mine, new in zip(self, more, strict=True)))


def batches(entries: Iterable[tuple[Entry, int]]) -> Iterator[Batch]:
    """Cuts entries, each with the offset behind it, into what is delivered together, in their order.

    >>> points = [(Point("a", 0.5, 1, step), 9 * step) for step in (1, 2)]
    >>> [(len(batch.entries), batch.end) for batch in batches([*points, (Tag("b", "c"), 30)])]
    [(2, 18), (1, 30)]
    """
    points: list[Entry] = []
    behind = 0
    for entry, end in entries:
        if points and (not isinstance(entry, Point) or len(points) == BATCH):
            yield Batch(points, behind)
            points = []
        if isinstance(entry, Point):
            points.append(entry)
        else:
            yield Batch([entry], end)
        behind = end
    if points:
        yield Batch(points, behind)


def to_line(entry: Entry) -> str:
    """A line of JSON, with its end; numbers that JSON does not know are spelt out."""
    fields = entry._asdict()
    if isinstance(entry, Point) and math.isinf(entry.value):
        fields["value"] = str(entry.value)
    return json.dumps(fields) + "\n"


def from_line(line: bytes) -> Entry:
    """What ``to_line`` wrote.

    Raises:
        ValueError: anything else.
    """
    try:
        if not line.endswith(b"\n"):
            raise ValueError("no whole line")
        return _entry(json.loads(line, parse_constant=_refuse))
    except (ValueError, RecursionError, OverflowError, KeyError, TypeError) as error:
        raise ValueError("no point, tag, artifact or status") from error


def _entry(fields: Mapping[str, Any]) -> Entry:
    match sorted(fields):
        case ["metric", "ms", "step", "value"]:
            value, ms, step = _number(fields["value"]), _whole(fields["ms"]), _whole(fields["step"])
            return Point(_text(fields["metric"]), value, _moment(ms), step)
        case ["tag", "value"]:
            return Tag(tag_name(_text(fields["tag"])), _text(fields["value"]))
        case ["artifact", "folder"]:
            return File(_text(fields["artifact"]), _text(fields["folder"]))
        case ["ms", "status"]:
            return Closing(_status(fields["status"]), _moment(_whole(fields["ms"])))
    raise KeyError(*fields)


def tag_name(name: str) -> str:
    """The name of a tag that a line may set.

    Raises:
        InputError: a tag that means something to MLflow, or that says where and how the run is.
    """
    if name.startswith(_MLFLOWS) or name in _KEPT:
        raise InputError(
            got=f"the tag {name!r}",
            allowed=f"a name that is none of {', '.join(_KEPT)}, and does not begin with {_MLFLOWS}",
            key="the name of this tag",
        )
    return name


def _text(value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise TypeError(value)
    value.encode()  # half a surrogate pair is no text
    return value


def _whole(value: object) -> int:
    if type(value) is not int or abs(value) > _MAX_INTEGER:
        raise TypeError(value)
    return value


def _moment(ms: int) -> int:
    if ms < 0:
        raise ValueError(ms)
    return ms


def _number(value: object) -> float:
    if type(value) not in (int, float) and value not in ("inf", "-inf"):
        raise TypeError(value)
    return float(value)  # type: ignore[arg-type]


def _status(value: object) -> str:
    if value not in ("finished", "failed", "stopped"):
        raise ValueError(value)
    return str(value)


def _refuse(constant: str) -> float:
    raise ValueError(constant)
