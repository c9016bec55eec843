"""The MLflow store: opened without chatter, and made once even when several processes start on it together.

A fresh sqlite file takes seconds of migrations and MLflow lets processes race through them, so the file is
built under another name and a lock, and moved into place when it is whole. Artifacts of a sqlite store lie in
the folder ``mlartifacts`` beside the file: MLflow stores that place in the experiment, as an absolute path.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cl_moe.errors import InputError, RunFailedError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DEFAULT_URI = "sqlite:///mlflow.db"
_SQLITE = "sqlite:///"
_ALLOWED = (
    "sqlite:///<file> (relative to the working folder, or sqlite:////absolute/path), or http(s)://<server>"
)
PAUSES = (0.1, 0.5, 2.0)  # seconds between tries
_PATIENCE = 5.0  # seconds after which a failed try is not repeated (sqlite itself waits 20 s for a lock)
_MAX_CHARACTERS = 6000  # of a param
_NAME = re.compile(r"[/\w.\- :]{1,250}")
_T = TypeVar("_T")
_LOCK_SECONDS = 300.0  # a fresh store takes seconds; minutes mean that somebody hangs


def absolute_uri(uri: str, key: str = "tracking.uri") -> str:
    """The same store, named independently of the working folder.

    Args:
        uri: ``sqlite:///<file>`` or the address of an MLflow server.
        key: the key that an error names.

    Raises:
        InputError: any other form; MLflow 3 has no file store, and a store in memory has one process only.
    """
    if uri.startswith(("http://", "https://")) and uri.split("://", 1)[1].strip("/"):
        return uri
    file, _, options = uri.removeprefix(_SQLITE).partition("?")
    if not uri.startswith(_SQLITE) or not file or file.endswith("/") or file.startswith(":"):
        raise InputError(got=f"{uri!r}", allowed=_ALLOWED, key=key)
    return f"{_SQLITE}{Path(file).absolute()}" + (f"?{options}" if options else "")


def database(uri: str) -> Path | None:
    """The file behind a sqlite URI; None for a server."""
    return Path(uri.removeprefix(_SQLITE).partition("?")[0]) if uri.startswith(_SQLITE) else None


def open_store(
    uri: str, *, create: bool = True, key: str = "tracking.uri", patience: float = _LOCK_SECONDS
) -> MlflowClient:
    """A client of the store behind ``uri``.

    A server is not contacted here. A sqlite file is made if it is missing (or empty) and ``create`` is true.
    A process that is making it is waited for, ``patience`` seconds at most.

    Raises:
        InputError: no such kind of store, no file and ``create`` is false, not an MLflow file, or one of
            another MLflow version.
        RunFailedError: another process holds the store's lock for longer.
    """
    uri = absolute_uri(uri, key)
    file = database(uri)
    if file is not None and not create and not _has_content(file):
        raise InputError(got=f"{uri}: no such file", allowed="a store that a run has written", key=key)
    if file is not None and _has_content(file) and not _is_sqlite(file):
        raise InputError(got=f"{uri}: not a sqlite file", allowed=_ALLOWED, key=key)
    load_mlflow()
    from mlflow import MlflowClient

    if file is None:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    with _readable(uri, key), _lock(file, patience), _quiet():
        if not _has_content(file):
            _make_store(file)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment_id(client: MlflowClient, name: str, *, key: str = "tracking.experiment") -> str:
    """The id of an experiment, made if it is missing; several processes may ask at once.

    Raises:
        InputError: the name is empty or belongs to a deleted experiment.
    """
    from mlflow.exceptions import MlflowException

    if not name.strip():
        raise InputError(got=f"the experiment name {name!r}", allowed="a name that is not empty", key=key)
    file = database(client.tracking_uri)
    if file is not None:
        with _lock(file):
            found = _active(client, name, key)
            return found or client.create_experiment(name, str(file.parent / "mlartifacts"))
    try:
        return _active(client, name, key) or client.create_experiment(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return _active(client, name, key) or ""


def find_run(run_id: str, uri: str = DEFAULT_URI, *, key: str = "resume") -> dict[str, str]:
    """The tags of a run (``output_dir`` among them), so that it can be found by its id.

    Raises:
        InputError: the store has no such run.
    """
    client = open_store(uri, create=False)
    run = must(uri, lambda: lookup(client, run_id))
    if run is None:
        raise InputError(
            got=f"the run {run_id!r}, which {client.tracking_uri} does not have",
            allowed="the id of a run in that store, or the folder of a run",
            key=f"{key} (or tracking.uri)",
        )
    return dict(run.data.tags)


def lookup(client: MlflowClient, run_id: str) -> Run | None:
    """The run of that id; None if the store does not have it, or has deleted it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def load_mlflow() -> None:
    """Imports MLflow with telemetry and chatter off; done late, because it takes seconds."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        # MLflow's own retries of a silent server go on for minutes, and training would wait for them.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }.items():
        os.environ.setdefault(name, value)
    with _quiet():
        import mlflow  # noqa: F401
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # It logs a traceback for every locked moment; the caller retries and says what it means.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def store_errors() -> tuple[type[Exception], ...]:
    """What a store raises when it is locked, away or unwilling."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def retry(action: Callable[[], _T], pauses: Sequence[float]) -> _T:
    """The action's result; what the store raises is raised when the pauses (seconds) are used up."""
    began = time.monotonic()
    for pause in pauses:
        try:
            return action()
        except store_errors():
            if time.monotonic() - began > _PATIENCE:
                raise
        time.sleep(pause)
    return action()


def must(uri: str, action: Callable[[], _T]) -> _T:
    """The action's result, tried again for a moment.

    Raises:
        RunFailedError: the store is locked or away.
    """
    load_mlflow()
    try:
        return retry(action, PAUSES)
    except store_errors() as error:
        raise RunFailedError(
            f"The MLflow store {uri} does not answer: {first_line(error)}. Nothing was trained. "
            "Run it again, or choose another tracking.uri or tracking=none."
        ) from error


@lru_cache(maxsize=10_000)
def check_name(name: str, kind: str) -> None:
    """MLflow refuses a whole batch for one bad name, so it is found where the name comes in."""
    path = posixpath.normpath(name)
    if not _NAME.fullmatch(name) or path != name or path == "." or path.startswith(("..", "/")):
        raise InputError(
            got=f"the {kind} name {name!r}",
            allowed="1 to 250 letters, digits and / : . - _ or spaces, a path without empty parts",
            key=f"the name of this {kind}",
        )


def cut(text: str) -> str:
    """At most 6,000 characters, saying so if it is cut."""
    if len(text) <= _MAX_CHARACTERS:
        return text
    mark = f"... [cut: {len(text)} characters; the whole value is in config.yaml]"
    return text[: _MAX_CHARACTERS - len(mark)] + mark


def _has_content(file: Path) -> bool:
    # sqlite makes an empty file when it connects to a missing one
    return file.is_file() and file.stat().st_size > 0


def _is_sqlite(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(16) == b"SQLite format 3\0"


def _active(client: MlflowClient, name: str, key: str) -> str | None:
    found = client.get_experiment_by_name(name)
    if found is None:
        return None
    if found.lifecycle_stage != "active":
        raise InputError(
            got=f"the experiment {name!r}, which was deleted",
            allowed=f"another name, or first `mlflow experiments restore -x {found.experiment_id}`",
            key=key,
        )
    return str(found.experiment_id)


def _make_store(file: Path) -> None:
    """Builds the tables under another name: a process killed in the middle leaves nothing half made."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    part = file.with_name(f"{file.name}.part")
    part.unlink(missing_ok=True)
    store = SqlAlchemyStore(f"{_SQLITE}{part}", str(file.parent / "mlartifacts"))
    store.engine.dispose()
    part.replace(file)


@contextmanager
def _lock(file: Path, patience: float = _LOCK_SECONDS) -> Iterator[None]:
    from filelock import FileLock, Timeout

    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{file}.lock", timeout=patience):
            yield
    except Timeout as error:
        raise RunFailedError(
            f"{file}.lock is held by another process since {patience:.0f} s; nothing was changed. "
            "End that process, or name another file in tracking.uri, and run it again."
        ) from error


@contextmanager
def _readable(uri: str, key: str) -> Iterator[None]:
    """Whatever MLflow raises while it opens a local file is about the file that the user named."""
    try:
        yield
    except store_errors() as error:
        if "locked" in str(error):
            raise
        got = f"{uri}, which MLflow does not open: {first_line(error)}"
        raise InputError(got=got, allowed=_ALLOWED, key=key) from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # MLflow 3.17 on SQLAlchemy 2.1: a loader strategy of its own models
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy is deprecated")
        yield
