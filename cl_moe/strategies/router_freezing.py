"""Router freezing after a warm-up (Li et al. 2024, "Theory on mixture-of-experts in continual learning")."""

from __future__ import annotations

from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers.router_parts import router_names
from cl_moe.models.base import ContinualModel
from cl_moe.strategies.base import Batch, Outlook, Setting, Strategy
from cl_moe.strategies.checks import check_beside
from cl_moe.strategies.passes import learning


class RouterFreezing(Strategy):
    """Stops the router's updates after its warm-up, while experts go on learning (2406.16437, section 4).

    From then on nothing that chooses moves: keys of old and newborn cohorts, query nets and their running
    statistics. A bias that balances load without a loss is no gradient's work, so it is refused beside this.

    Args:
        warmup: experiences in which the router learns.
    """

    computes = False
    takes_rows = True
    stops_learning = True
    reads_batches = True

    def __init__(self, warmup: int = 1) -> None:
        if not isinstance(warmup, int) or warmup < 0:
            key = "strategy.router_freezing.warmup"
            raise InputError(got=f"warmup={warmup!r}", allowed="a whole number, at least 0", key=key)
        self.warmup, self.needs_past = warmup, warmup > 0
        self._names: set[str] = set()
        self._norms: list[object] = []

    def check(self, setting: Setting) -> None:
        """There is a router, and nothing else moves it."""
        if not router_names(setting.model):
            raise InputError(
                got="strategy=router_freezing with a model that routes nothing (layer=dense, say)",
                allowed="layer=moe, peer or pkm",
                key="layer (or strategy)",
            )
        check_beside("router_freezing", setting, ("shrink_perturb",), "moves the router that is frozen")
        if self.warmup:
            why = "stops the router behind the first experience itself, so warmup=0 is what is left to do"
            check_beside("router_freezing", setting, ("sparse_memory",), why)
        if any(layer.wants_load for layer in setting.model.expert_layers.values()):
            raise InputError(
                got="strategy=router_freezing with router.scores.bias_rate, which goes on moving it",
                allowed="router.scores.bias_rate=0",
                key="router.scores.bias_rate (or strategy)",
            )

    def begin(self, outlook: Outlook) -> None:
        """Note what is to stand still in this experience."""
        stop = outlook.experience.index >= self.warmup
        self._names = set(router_names(outlook.model)) if stop else set()
        self._norms = [
            part for prefix, part in outlook.model.named_modules() if f"{prefix}.running_mean" in self._names
        ]

    def batch(self, inputs: Tensor, targets: Tensor) -> Batch:
        """The batch as it is; the router's statistics stand still for it."""
        for norm in self._norms:
            norm.training = False  # type: ignore[attr-defined]
        return inputs, targets

    def gradients(self, model: ContinualModel) -> None:
        """What has no gradient, no optimizer moves: neither by momentum nor by decay."""
        for name, parameter in learning(model).items():
            if name in self._names:
                parameter.grad = None

    def end(self, outlook: Outlook) -> None:
        """The statistics are as other modules again, till the next experience."""
        for norm in self._norms:
            norm.training = True  # type: ignore[attr-defined]
