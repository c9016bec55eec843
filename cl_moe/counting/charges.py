"""Who a run's operations and seconds are charged to."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

from torch import Tensor

from cl_moe.counting.operations import CountFlops

Account = Literal["train", "eval", "diagnostics"]
ACCOUNTS: tuple[Account, ...] = get_args(Account)
EVERY = 256
_NOTHING = nullcontext()


class Charges:
    """Adds up floating-point operations (``CountFlops``), seconds and examples, by account.

    ``train`` is what learning takes: forward and backward passes, those of teachers and of replayed examples,
    what strategies do with gradients and at boundaries, growth. ``eval`` is the matrix's evaluations,
    ``diagnostics`` what is measured beside them.

    To count every step would slow training several times. A step is counted when it is the first of its kind:
    a part of the work on tensors of these shapes, since the model last changed (``forget``). All later ones
    of its kind are charged the same. Where shapes do not decide what a step takes (a router drops tokens,
    sequences are padded, a strategy has terms of its own), the 2nd, 5th and 17th of its kind and then every
    256th are counted anew, and each stands for those up to the next. Which steps are counted depends on
    their number alone and is part of the state, so a run that was killed and goes on is charged the same.
    """

    def __init__(self) -> None:
        self.flops: dict[str, int] = dict.fromkeys(ACCOUNTS, 0)
        self.examples = 0  # that were trained on, replayed ones included
        self.varies = False  # whether the model takes more or less for tensors of the same shapes
        self._seconds: dict[str, float] = dict.fromkeys(ACCOUNTS, 0.0)
        self._known: dict[tuple[Any, ...], list[int]] = {}  # kind of step: operations, steps so far
        self._models: dict[str, int | None] = {}  # account: the model that it knows steps of
        self._passes: dict[str, list[int]] = {}  # account: operations and tokens since it forgot
        self._account: Account = "train"
        self._since: float | None = None
        self._open = False  # inside a step
        self._counted: list[int] | None = None  # the step that is being counted, till its backward pass
        self._closing = _Closing(self)

    # ---- accounts and seconds

    @contextmanager
    def account(self, name: Account) -> Iterator[None]:
        """Charge what happens inside to this account. What diagnostics ask for is theirs, whoever does it."""
        outer, was_running = self._account, self._since is not None
        self._lap()
        self._account = outer if outer == "diagnostics" else name
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._lap()
            self._account = outer
            self._since = time.perf_counter() if was_running else None

    def seconds(self, name: Account) -> float:
        """Seconds inside an account so far, without those of accounts that were opened inside it."""
        self._lap()
        return self._seconds[name]

    def _lap(self) -> None:
        if self._since is not None:
            now = time.perf_counter()
            self._seconds[self._account] += now - self._since
            self._since = now

    # ---- operations

    def step(
        self, part: str, *tensors: Tensor, varies: bool = False, tokens: int = 0
    ) -> AbstractContextManager[None]:
        """Charge what runs inside, counted or as last time; a ``backward`` after it belongs to it.

        Args:
            part: of the work.
            tensors: whose shapes, with the part, are the kind of step this is.
            varies: whether steps of this kind differ in what they take, whatever the model.
            tokens: examples or positions that are computed, for ``flops_per_token``.
        """
        if self._open:  # charged as a part of the step around it
            return _NOTHING
        kind = (self._account, part, *(tuple(tensor.shape) for tensor in tensors))
        known = self._known.setdefault(kind, [0, 0])
        self._counted = known if self._is_due(known[1], varies) else None
        known[1] += 1
        if tokens:
            self._passes.setdefault(self._account, [0, 0])[1] += tokens
        self._open = True
        if self._counted is None:
            self._charge(known[0])
            return self._closing
        known[0] = 0
        return self._count_step(known)

    @contextmanager
    def _count_step(self, known: list[int]) -> Iterator[None]:
        with self._closing, self._count_into(known):
            yield

    def backward(self) -> AbstractContextManager[None]:
        """The backward pass of the last step: counted if that was, and charged with it if not."""
        return _NOTHING if self._counted is None else self._count_into(self._counted)

    @contextmanager
    def counting(self, asked: bool = True) -> Iterator[None]:
        """Count and charge all that runs inside, for what happens seldom; not ``asked``: do not."""
        if self._open or not asked:
            yield
            return
        with self._count_into([0, 0]):
            yield

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What runs inside is diagnostics, and counted."""
        with self.account("diagnostics"), self.counting():
            yield

    def forget(self, varies: bool, model: int | None = None) -> None:
        """The model may be another now: then whatever this account does is counted anew.

        Args:
            varies: whether the model takes more or less for tensors of the same shapes.
            model: the same as in the last call where it takes the same; None: it may be any other.
        """
        if varies or model is None or self._models.get(self._account) != model:
            self._known = {kind: known for kind, known in self._known.items() if kind[0] != self._account}
        self._models[self._account] = model
        self._passes[self._account] = [0, 0]
        self.varies = varies

    def flops_per_token(self, name: Account) -> float | None:
        """Of an account since it forgot, on average over the tokens named to ``step``; None without any."""
        flops, tokens = self._passes.get(name, (0, 0))
        return flops / tokens if tokens else None

    def _is_due(self, steps: int, varies: bool) -> bool:
        if steps == 0:
            return True
        return (varies or self.varies) and (steps in (1, 4, 16) or steps % EVERY == 0)

    @contextmanager
    def _count_into(self, known: list[int]) -> Iterator[None]:
        with CountFlops() as count:
            yield
        known[0] += count.total
        self._charge(count.total)

    def _charge(self, flops: int) -> None:
        self.flops[self._account] += flops
        self._passes.setdefault(self._account, [0, 0])[0] += flops

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Sums so far, and what steps of each kind take; seconds apart, since they are never the same."""
        state = {"flops": self.flops, "examples": self.examples, "varies": self.varies}
        return copy.deepcopy(state | {"known": self._known, "models": self._models, "passes": self._passes})

    def clock(self) -> dict[str, float]:
        """Seconds by account."""
        self._lap()
        return dict(self._seconds)

    def load_state_dict(self, state: dict[str, Any], clock: dict[str, float]) -> None:
        """Go on from sums of an earlier process."""
        state = copy.deepcopy(state)
        self.flops, self.examples, self.varies = state["flops"], state["examples"], state["varies"]
        self._known, self._passes = state["known"], state["passes"]
        self._models = state.get("models", {})
        self._seconds = dict(clock)


class _Closing:
    """Ends a step. Entered in every one of them, so it is not a generator's context."""

    def __init__(self, charges: Charges) -> None:
        self.charges = charges

    def __enter__(self) -> None:
        """The step is open already."""

    def __exit__(self, *error: object) -> None:
        self.charges._open = False
