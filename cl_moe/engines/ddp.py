"""Data parallelism with the model on every rank: the whole of it, or all but other ranks' experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal, cast, get_args

from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn

from cl_moe import agreement
from cl_moe.engines.base import BACKENDS, Device, Engine
from cl_moe.engines.pieces import InPieces, Named
from cl_moe.errors import InputError
from cl_moe.layers import ranks as layer_ranks
from cl_moe.layers.exchange import Exchange, gathered, owned, spread
from cl_moe.layers.tables import ExpertTable
from cl_moe.models.base import ContinualModel
from cl_moe.optim import OptimizerState, exchange_rows, state_by_name

Experts = Literal["replicated", "sharded"]


class DDP(Engine):
    """Distributed data parallelism: every rank holds the whole model and averages its gradients.

    Of tables that learn by rows (``optimizer.rows=row``) the touched rows are exchanged, not the tables.

    Args:
        bucket_mb: gradients are exchanged in buckets of so many megabytes, above 0.
        experts: ``"replicated"``: experts are on every rank, too; ``"sharded"``: while it trains, each rank
            holds its own experts of every cohort, with their gradients and the optimizer's memory, and
            tokens (of tables: rows) go to the owners and back. Between fits every rank has all of them.
    """

    rows = ("auto", "dense", "row")

    def __init__(self, bucket_mb: float = 25.0, experts: Experts = "replicated") -> None:
        if not isinstance(bucket_mb, int | float) or not bucket_mb > 0:
            raise InputError(
                got=f"bucket_mb={bucket_mb!r}", allowed="above 0", key="trainer.engine.bucket_mb"
            )
        if experts not in get_args(Experts):
            raise InputError(
                got=f"experts={experts!r}",
                allowed=" or ".join(get_args(Experts)),
                key="trainer.engine.experts",
            )
        self.bucket_mb, self.experts = bucket_mb, experts

    @property
    def held(self) -> tuple[str, ...]:  # type: ignore[override]
        """With experts on their owners, those that look at no expert's weights or gradients."""
        some = ("naive", "joint", "cumulative", "replay", "der", "lwf", "icarl", "lifelong_moe")
        others = ("ewc", "si", "mas", "gem", "agem", "gdumb", "sparse_memory")
        return some if self.experts == "sharded" else (*some, *others)

    def strategy(self, device: Device) -> Strategy:
        """Parameters that took no part in a step are looked for: experts that nobody chose.

        That also keeps torch from laying out its buckets anew after the first step, so that a run that goes
        on adds up in the order of one that was never stopped. Buffers are not sent: layers sum theirs.
        """
        return DataParallel(
            self.experts == "sharded",
            find_unused_parameters=True,
            forward_sync_buffers=False,
            bucket_cap_mb=self.bucket_mb,
            process_group_backend=BACKENDS["cpu"],  # the group that is there is taken
            timeout=timedelta(minutes=30),
        )


class DataParallel(DDPStrategy, InPieces):
    """Leaves to DDP what it averages whole; experts that have owners it parts once strategies have begun."""

    def __init__(self, sharded: bool, **options: Any) -> None:
        super().__init__(**options)
        self.sharded = sharded
        if sharded:
            agreement.hold_pieces()

    @property
    def _learner(self) -> Any:
        return self.lightning_module

    @property
    def _expert_model(self) -> ContinualModel:
        return cast(ContinualModel, self._learner.model)

    def configure_ddp(self) -> None:
        """Tell DDP what it is to leave alone, by torch's own name for it."""
        left = self._learner._ddp_params_and_buffers_to_ignore = []
        if self.sharded:
            left += [f"model.{name}" for name, *_ in _owned(self._expert_model)]
        elif self._by_rows:
            left += [name for name, p in self._learner.named_parameters() if isinstance(p, ExpertTable)]
        super().configure_ddp()

    @property
    def _by_rows(self) -> bool:
        return bool(self._learner.optimizer_spec.rows == "row")

    def setup_optimizers(self, trainer: Any) -> None:
        """Over the pieces, once there are some."""
        if not self.sharded or self.together is not None:
            super().setup_optimizers(trainer)

    def on_train_start(self) -> None:
        """Part the experts, and build the optimizer over this rank's own."""
        super().on_train_start()
        if self.sharded:
            self.together = _Apart(self._expert_model)
            self.setup_optimizers(self._learner.trainer)
            self.setup_precision_plugin()

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], *args: Any, **options: Any) -> Any:
        """Between the backward pass and whatever looks at gradients, rows are exchanged."""
        if self.sharded or not self._by_rows:
            return super().optimizer_step(optimizer, closure, *args, **options)

        def closing() -> Any:
            loss = closure()
            exchange_rows([p for p in self._learner.parameters() if _learns_by_rows(p)])
            return loss

        return super().optimizer_step(optimizer, closing, *args, **options)

    def weights(self) -> dict[str, Tensor]:
        """As the base class says."""
        state = dict(self._expert_model.state_dict())
        for name, cohort, last in _owned(self._expert_model):
            state[name] = _together(state[name], cohort.get_parameter(last), cohort.exchange)
        return state

    def memory(self, parameters: Named) -> OptimizerState:
        """As the base class says; of every own expert it remembers something of its own."""
        held = dict(parameters)
        state = state_by_name(self.optimizers[0], held.items())
        for name, cohort, _ in _owned(self._expert_model):
            own = held[f"model.{name}"]
            for key, value in state.get(f"model.{name}", {}).items():
                if isinstance(value, Tensor) and value.shape[:1] == own.shape[:1]:
                    state[f"model.{name}"][key] = _together(value, own, cohort.exchange)
        return state


class _Apart:
    """A model's experts on their owners; the whole parameters hold nothing meanwhile, but stay the same."""

    def __init__(self, model: ContinualModel) -> None:
        self.whole = [
            (name, cohort, last, cohort.get_parameter(last)) for name, cohort, last in _owned(model)
        ]
        exchange = Exchange(layer_ranks.group())
        for layer in model.expert_layers.values():
            spread(layer, exchange)
        for _, cohort, last, whole in self.whole:
            own = cohort.get_parameter(last)
            if own.requires_grad:  # losses are shares of the ranks' average
                own.register_hook(lambda grad: grad / exchange.size)
            whole.data, whole.grad = whole.data.new_empty(0), None

    def again(self, values: Mapping[str, Tensor]) -> None:
        """Everything as it was, with these values."""
        for name, cohort, last, whole in self.whole:
            cohort.exchange = None
            whole.data = values[name]
            setattr(cohort, last, whole)


def _owned(model: ContinualModel) -> Iterator[tuple[str, Any, str]]:
    """Names in the model, cohorts and names there of what ranks can own."""
    names = {module: name for name, module in model.named_modules()}
    for layer in model.expert_layers.values():
        for cohort in layer.cohorts:
            for last in owned(cohort):
                yield f"{names[cohort]}.{last}", cohort, last


def _together(value: Tensor, own: nn.Parameter, exchange: Exchange) -> Tensor:
    return gathered(value, own.num_whole, exchange)  # type: ignore[attr-defined]


def _learns_by_rows(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, ExpertTable) and parameter.requires_grad
