"""The MLflow store: opened without chatter, and made once even when several processes start on it together.

A fresh sqlite file takes seconds of migrations and MLflow lets processes race through them, so the file is built
under another name and a lock, and moved into place when it is whole. Artifacts of a sqlite store lie in the folder
``mlartifacts`` beside the file: MLflow stores that place in the experiment, as an absolute path.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cl_moe.errors import InputError, RunFailedError

if TYPE_CHECKING:
    from mlflow import MlflowClient

DEFAULT_URI = "sqlite:///mlflow.db"
_SQLITE = "sqlite:///"
_ALLOWED = "sqlite:///<file> (relative to the working folder, or sqlite:////absolute/path), or http(s)://<server>"
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


def open_store(uri: str, *, create: bool = True, key: str = "tracking.uri") -> MlflowClient:
    """A client of the store behind ``uri``.

    A server is not contacted here. A sqlite file is made if it is missing (or empty) and ``create`` is true.

    Raises:
        InputError: no such kind of store, no file and ``create`` is false, not an MLflow file, or one of another
            MLflow version.
        RunFailedError: the store is locked by another process for minutes.
    """
    uri = absolute_uri(uri, key)
    file = database(uri)
    if file is not None and not create and not _has_content(file):
        raise InputError(got=f"{uri}: no such file", allowed="a store that a run has written", key=key)
    load_mlflow()
    from mlflow import MlflowClient

    if file is None:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    with _readable(uri, key), _lock(file), _quiet():
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
            return _active(client, name, key) or client.create_experiment(name, str(file.parent / "mlartifacts"))
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
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_run(run_id).data.tags)
    except MlflowException as error:
        raise InputError(
            got=f"the run {run_id!r}, which {client.tracking_uri} does not have ({first_line(error)})",
            allowed="the id of a run in that store, or the folder of a run",
            key=f"{key} (or tracking.uri)",
        ) from error


def load_mlflow() -> None:
    """Imports MLflow with telemetry and chatter off; done late, because it takes seconds."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
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


def _has_content(file: Path) -> bool:
    # sqlite makes an empty file when it connects to a missing one
    return file.is_file() and file.stat().st_size > 0


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
    """Builds the tables under another name, so that a process killed in the middle leaves nothing half made."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    part = file.with_name(f"{file.name}.part")
    part.unlink(missing_ok=True)
    store = SqlAlchemyStore(f"{_SQLITE}{part}", str(file.parent / "mlartifacts"))
    store.engine.dispose()
    part.replace(file)


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{file}.lock", timeout=_LOCK_SECONDS):
            yield
    except Timeout as error:
        raise RunFailedError(
            f"{file}.lock is held by another process since {_LOCK_SECONDS:.0f} s; nothing was changed. "
            "End that process, or name another file in tracking.uri, and run it again."
        ) from error


@contextmanager
def _readable(uri: str, key: str) -> Iterator[None]:
    """Whatever MLflow raises while it opens a local file is about the file that the user named."""
    try:
        yield
    except store_errors() as error:
        raise InputError(got=f"{uri}: {first_line(error)}", allowed=f"{_ALLOWED}, which opens", key=key) from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # MLflow 3.17 on SQLAlchemy 2.1: a loader strategy of its own models
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy is deprecated")
        yield
