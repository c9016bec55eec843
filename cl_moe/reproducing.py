"""``cl-moe reproduce=...``: a run made again, and its numbers held against the original's, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cl_moe.errors import InputError, RunFailedError
from cl_moe.folder import CONFIG, mapping
from cl_moe.run import Run
from cl_moe.schema import leaves, plain
from cl_moe.tracking.artifacts import MATRIX, Matrix, read_matrix
from cl_moe.tracking.fetching import Points, fetched, points_in_folder, points_in_store
from cl_moe.tracking.outbox import RUN_ID_FILE, read_run_id
from cl_moe.tracking.provenance import DATA, DIFF, ENVIRONMENT, diff, environment_changes
from cl_moe.words import is_under

_KEY = "reproduce"
_FILES = (MATRIX, CONFIG, ENVIRONMENT, DIFF, DATA)
_ITS_OWN = ("output_dir", "resume", "auto_resume", _KEY, "checkpoint", "tracking", "mlflow_experiment")
"""Keys that say how and where a run is kept, not what it is."""
_OF_THE_MACHINE = ("cost/", "system/")  # metrics that no two runs have in common
_MOST_LINES = 20


@dataclass(frozen=True)
class Original:
    """What is known of the run that is made again.

    Args:
        name: its MLflow id, or its folder's name.
        matrix: as it was measured.
        points: as they were logged; None if neither its folder nor MLflow has them.
        config: resolved; None if it is lost.
        texts: its other files, by name: environment, uncommitted changes, checksums of its data.
    """

    name: str
    matrix: Matrix
    points: Points | None
    config: Mapping[Any, Any] | None
    texts: Mapping[str, str] = field(default_factory=dict)


def original_of(config: DictConfig) -> Original | None:
    """What a configured run is to reproduce, if it is to reproduce anything.

    Raises:
        InputError: no such run, or one that has not ended.
    """
    if config.reproduce is None:
        return None
    if not isinstance(config.reproduce, str) or not config.reproduce.strip():
        raise _refusal(f"{_KEY}={config.reproduce!r}", _KEY)
    folder, uri = Path(config.reproduce), config.tracking.get("uri")
    if folder.is_dir():
        name = read_run_id(folder) if (folder / RUN_ID_FILE).is_file() else folder.name
        return _read(folder, name, points_in_folder(folder))
    if uri is None:
        raise _refusal(f"{_KEY}={config.reproduce} beside a tracker without a store", "tracking")
    with fetched(config.reproduce, _FILES, uri, _KEY) as place:
        return _read(place, config.reproduce, points_in_store(config.reproduce, uri, _KEY))


def differences(original: Original, config: DictConfig, run: Run) -> list[str]:
    """In what a run to come differs from the original: configuration, versions, code, data; a line each."""
    return [
        *_of_config(original, config),
        *_of_environment(original.texts.get(ENVIRONMENT)),
        *_of_code(original.texts.get(DIFF, "")),
        *_of_data(original.texts.get(DATA), run.fingerprint),
    ]


@contextmanager
def held_against(original: Original | None, config: DictConfig, run: Run) -> Iterator[None]:
    """Says what is different before a run that reproduces another, and after it whether the numbers are.

    Raises:
        RunFailedError: they are not the same to the last bit.
    """
    if original is None:
        yield
        return
    found = differences(original, config, run)
    _say(f"reproducing {original.name}", found or ["same configuration, versions, code and data"])
    yield
    points = points_in_folder(run.folder)
    lines = list(_of_numbers(original, read_matrix(run.folder / MATRIX), points))
    run.tracker.tag("reproduced", "different" if lines else "equal")
    if not lines:
        what = "accuracy matrix" if None in (original.points, points) else "accuracy matrix and all points"
        print(f"reproduced: {what} of {original.name}, to the last bit")
        return
    more = [f"... and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    reasons = found or ["nothing that is noted: configuration, versions, code and data are the same"]
    raise RunFailedError(
        "\n".join(
            [
                f"not reproduced: {len(lines)} numbers of {run.folder} differ from those of {original.name}",
                *(f"  {line}" for line in [*lines[:_MOST_LINES], *more]),
                "what else differs:",
                *(f"  {line}" for line in reasons),
            ]
        )
    )


def tags(original: Original | None) -> dict[str, str]:
    """Which run it makes again."""
    return {} if original is None else {"reproduces": original.name}


def _say(head: str, lines: list[str]) -> None:
    print("\n".join([head, *(f"  {line}" for line in lines)]), flush=True)


def _read(folder: Path, name: str, points: Points | None) -> Original:
    if not (folder / MATRIX).is_file():
        raise _refusal(f"{_KEY}={name}, which has left no {MATRIX}", _KEY)
    matrix = read_matrix(folder / MATRIX)
    files = (ENVIRONMENT, DIFF, DATA)
    texts = {file: (folder / file).read_text(errors="replace") for file in files if (folder / file).is_file()}
    return Original(name, matrix, points, mapping(folder / CONFIG), texts)


def _of_config(original: Original, config: DictConfig) -> Iterator[str]:
    if original.config is None:
        yield "its configuration is lost"
        return
    old, new = dict(leaves(original.config)), dict(leaves(plain(config)))
    for key in sorted(old.keys() | new.keys()):
        if not is_under(key, _ITS_OWN) and old.get(key) != new.get(key):
            yield f"configuration: {key} was {old.get(key)!r}, is {new.get(key)!r}"


def _of_environment(text: str | None) -> Iterator[str]:
    if text is None:
        yield "its environment is not known"
        return
    yield from environment_changes(text)


def _of_code(old: str) -> Iterator[str]:
    if old != diff().decode(errors="replace"):
        yield f"the checkout's uncommitted changes are others than those in its {DIFF}"


def _of_data(text: str | None, fingerprint: Mapping[str, Any]) -> Iterator[str]:
    try:
        old = json.loads(text or "")
        before = {str(name): sums for name, *sums in old["experiences"]}
        texts = {str(name): sums for name, *sums in old.get("held_out", ())}
    except (ValueError, LookupError, TypeError):
        yield "checksums of its data are not known"
        return
    for name, *sums in fingerprint["held_out"]:
        if texts.get(name, sums) != sums:
            yield f"the held-out text {name} is another"
    for name, *sums in fingerprint["stream"][1:]:
        if before.pop(name, None) != sums:
            yield f"data of the experience {name} are others"
    yield from (f"data of the experience {name} are not there" for name in before)


def _of_numbers(original: Original, matrix: Matrix, points: Points | None) -> Iterator[str]:
    """A line for each number that is another, or that one of the two has not."""
    old, new = original.matrix, matrix
    if old.names != new.names or old.scores.shape != new.scores.shape:
        yield f"accuracy matrix: {len(old.scores) - 1} experiences {old.names}, now {new.names}"
        return
    yield from _lines(_cells(old), _cells(new))
    if original.points is not None and points is not None:
        yield from _lines(_named_points(original.points), _named_points(points))


def _lines(old: Mapping[str, float], new: Mapping[str, float]) -> Iterator[str]:
    for name in dict.fromkeys((*old, *new)):
        one, other = old.get(name), new.get(name)
        if one is None or other is None:
            known = ["not there" if value is None else repr(value) for value in (one, other)]
            yield f"{name}: {known[0]}, now {known[1]}"
        elif one != other and not (one != one and other != other):
            yield f"{name}: {one!r}, now {other!r} ({other - one:+.3g})"


def _cells(matrix: Matrix) -> dict[str, float]:
    return {
        f"R[{i}, {name}]": score
        for i, row in enumerate(matrix.scores.tolist())
        for name, score in zip(matrix.names, row, strict=True)
    }


def _named_points(points: Points) -> dict[str, float]:
    kept = sorted(item for item in points.items() if not item[0][0].startswith(_OF_THE_MACHINE))
    return {f"{key} at {step}": value for (key, step), value in kept}


def _refusal(got: str, key: str) -> InputError:
    return InputError(
        got=got,
        allowed="a run that has ended, by its folder, or by its id in the MLflow store tracking.uri",
        key=key,
    )
