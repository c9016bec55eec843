"""What a run cost so far: operations, seconds, examples, parameters, bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe import agreement, engines
from cl_moe.batches import is_asked
from cl_moe.learner import Learner
from cl_moe.measuring import Past
from cl_moe.memory import PeakMemory, return_freed, storage_bytes
from cl_moe.stream import Experience, Streamed

_LOADED_LATE = ("pyarrow.dataset", "pyarrow.parquet", "torch.profiler", "torch.utils.serialization")
"""Libraries that the first row, fit or checkpoint of a process would load, and its later ones find."""


def _fill_pools() -> None:
    """Let pyarrow take what it keeps for its next table (6 MiB), as the first row of loads would."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"nothing": pa.array([0.0])}), pa.BufferOutputStream())


def _held(data: TensorDataset) -> Sequence[Tensor]:
    """Tensors that a data set holds in memory."""
    return () if isinstance(data, Streamed) else data.tensors


def num_targets(data: TensorDataset) -> int:
    """Real target positions; in classification examples, in regression numbers."""
    if isinstance(data, Streamed):
        return int(data.summary.get("train_tokens", len(data)))
    return int(is_asked(data.tensors[1]).sum())


class CostMeter:
    """Adds up over experiences and over restarts; evaluation is not charged as training.

    Args:
        learner: whose charges, model and strategies it reads.
        past: what diagnostics keep.
    """

    def __init__(self, learner: Learner, past: Past) -> None:
        self.learner, self.past = learner, past
        self.tokens = 0
        self.peak = PeakMemory()
        self._optimizer_bytes = 0  # in the last fit
        self._trained: dict[str, Any] | None = None  # the state before an experience's row is measured

    def start(self, experiences: Iterable[Experience]) -> None:
        """The run begins here: what its process held before is not charged to it.

        Args:
            experiences: with the data that the run holds already.
        """
        for name in _LOADED_LATE:
            import_module(name)
        _fill_pools()
        data = [t for e in experiences for part in (e.train, e.test) for t in _held(part)]
        self.peak.start(storage_bytes([*data, *self.learner.model.state_dict().values()]))

    @contextmanager
    def training(self, experience: Experience, epochs: int) -> Iterator[None]:
        """Time one fit. Tokens are what ``num_targets`` counts."""
        return_freed()
        with self.learner.charges.account("train"):
            yield
        self._optimizer_bytes = engines.bytes_remembered(self.learner.trainer)
        self.tokens += epochs * num_targets(experience.train)
        self._trained = self._state()
        return_freed()

    def points(self) -> dict[str, float]:
        """The ``cost/*`` metrics of now: operations of all ranks, memory of the one that held most."""
        learner, charges = self.learner, self.learner.charges
        given = agreement.of_all(charges.flops)
        flops = {account: sum(one[account] for one in given) for account in charges.flops}
        seconds, parameters = charges.seconds("train"), list(learner.model.parameters())
        points: dict[str, float] = {
            "cost/seconds": seconds,
            "cost/eval_seconds": charges.seconds("eval"),
            "cost/diagnostics_seconds": charges.seconds("diagnostics"),
            "cost/train_flops": flops["train"],
            "cost/eval_flops": flops["eval"],
            "cost/diagnostics_flops": flops["diagnostics"],
            "cost/examples_seen": charges.examples,
            "cost/params_total": sum(p.numel() for p in parameters),
            "cost/params_active": learner.model.active_parameters(),
            "cost/params_trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "cost/param_bytes": _bytes(parameters),
            "cost/optimizer_bytes": self._optimizer_bytes,
            "cost/buffer_bytes": sum(s.buffer_bytes for s in learner.strategies.values()),
            "cost/diagnostics_bytes": self.past.num_bytes,
            "cost/peak_memory_bytes": agreement.most(self.peak.bytes()),
        }
        for strategy in learner.strategies.values():
            points |= strategy.costs(learner.model)
        per_token = charges.flops_per_token("eval")
        if per_token is not None:
            points["cost/inference_flops_per_token"] = per_token
        if seconds > 0:
            points["cost/tokens_per_second"] = self.tokens / seconds
        return points

    def state_dict(self, trained: bool = False) -> dict[str, Any]:
        """Sums so far; what the clock and the system say, which differs between equal runs, in ``clock``.

        Args:
            trained: those of when training on the newest experience ended: its row, which is being measured,
                will be measured anew by who goes on from here.
        """
        state = self._trained if trained and self._trained is not None else self._state()
        return copy.deepcopy(state) | {
            "clock": {"seconds": self.learner.charges.clock(), "peak": self.peak.bytes()}
        }

    def load_state_dict(self, state: dict[str, Any], same_run: bool = True) -> None:
        """Go on from sums of an earlier process.

        Args:
            state: of ``state_dict``.
            same_run: False for those of a branch's parent. Its operations, seconds and examples brought the
                branch to where it stands; what its process held at most did not, and is the parent's alone.
        """
        clock = state["clock"]
        self.learner.charges.load_state_dict(state["charges"], clock["seconds"])
        self.tokens, self._optimizer_bytes = state["tokens"], state["optimizer_bytes"]
        self.peak.earlier = clock["peak"] if same_run else 0
        self._trained = self._state()

    def _state(self) -> dict[str, Any]:
        charges = self.learner.charges.state_dict()
        return {"tokens": self.tokens, "optimizer_bytes": self._optimizer_bytes, "charges": charges}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
