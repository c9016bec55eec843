"""The ways in which a run may end before its end, each with a message a user can act on."""

from __future__ import annotations


class InputError(ValueError):
    """The user's input is wrong (exit status 2): what was got, what is allowed, which key to change.

    >>> print(InputError(got="k=9", allowed="1 <= k <= 8, the number of experts", key="router.k"))
    got: k=9
    allowed: 1 <= k <= 8, the number of experts
    change: router.k
    """

    def __init__(self, *, got: str, allowed: str, key: str) -> None:
        super().__init__(got, allowed, key)
        self.got, self.allowed, self.key = got, allowed, key

    def __str__(self) -> str:
        return f"got: {self.got}\nallowed: {self.allowed}\nchange: {self.key}"

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_input_error, (self.got, self.allowed, self.key), self.__dict__)


def _rebuild_input_error(got: str, allowed: str, key: str) -> InputError:
    return InputError(got=got, allowed=allowed, key=key)


class StopRequestedError(BaseException):
    """The process was asked to stop. Like KeyboardInterrupt, it passes whatever catches errors.

    Args:
        message: empty before a run says what it kept.
        keyboard: by Ctrl-C (status 130), not by SIGTERM (status 75).
    """

    def __init__(self, message: str = "", keyboard: bool = False) -> None:
        super().__init__(message)
        self.keyboard = keyboard


class JobStoppedError(Exception):
    """A request to stop on its way from a job to the process that launched it, where it is one again.

    What starts jobs in other processes hands on errors and loses whatever else ends a job.
    """

    def __init__(self, message: str = "", keyboard: bool = False) -> None:
        super().__init__(message)
        self.keyboard = keyboard

    def __reduce__(self) -> tuple[object, ...]:
        return (StopRequestedError, (str(self), self.keyboard))


class RunFailedError(RuntimeError):
    """The run failed for a named reason (status 1): the message says what, what was kept, how to go on."""


class OthersGoneError(RunFailedError):
    """A rank was left alone by another one, which knows better why the run failed."""
