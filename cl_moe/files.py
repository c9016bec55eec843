"""Files that are there whole or not at all, also after a power cut, and are never reached through a link.

A run's folder may come from a stranger. A link in it would have a program write where its user never meant
to, and a pipe would have it wait for ever: both are refused, or replaced by a file of our own.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cl_moe.errors import InputError

_NO_FILE = {errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO}  # a link, a folder, a pipe nobody reads


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a file that is there whole or not at all; a link in its place is replaced, not followed.

    Raises:
        OSError: the disk is full, say; the file is as it was.
    """
    with whole_or_not(path.with_name(f".{path.name}.{os.getpid()}")) as (file, rename):
        file.write(content)
        rename(path)


@contextmanager
def whole_or_not(temporary: Path) -> Iterator[tuple[IO[bytes], Callable[[Path], Path]]]:
    """A file to write, and a function that flushes it to the disk and gives it its name.

    Args:
        temporary: where it is until then; of one writer at a time. What a killed one left there is removed.

    Raises:
        OSError: the disk is full, say; nothing has got the name, and the error says which file it was.
    """
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:

            def rename(path: Path) -> Path:
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
                return path

            yield file, rename
    except OSError as error:
        error.filename = error.filename or str(temporary)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(temporary.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename or a new file last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def regular(path: str | Path, flags: int) -> int:
    """A descriptor of a regular file that is no link: an opener for ``open``.

    Args:
        path: of the file.
        flags: as ``os.open`` has them.

    Raises:
        InputError: there is something else under that name.
        OSError: as ``os.open`` does.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise _refusal(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refusal(path)
    return descriptor


def _refusal(path: str | Path) -> InputError:
    return InputError(
        got=f"{path}, which is a link, a pipe or a folder", allowed="a regular file", key=str(path)
    )
