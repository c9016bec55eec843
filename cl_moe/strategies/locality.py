"""A router that learns from how far its experts had to move (Li et al. 2024, 2406.16437, section 3).

Legend: T tokens, N experts of one layer, n of one cohort.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers import MoE, Routing
from cl_moe.layers.exchange import owned
from cl_moe.models.base import ContinualModel
from cl_moe.seeds import generator
from cl_moe.strategies.base import Outlook, Setting, Strategy, tensor_bytes
from cl_moe.strategies.checks import check_beside
from cl_moe.strategies.passes import ask, quiet
from cl_moe.strategies.teacher import check_weight

_ROWS = 256


class Locality(Strategy):
    """After each experience a router makes one step away from experts that had to change much.

    ``d_m`` is how far expert m moved in the experience: the norm of the change of all its weights. ``pi_m``
    is the router's probability of it. The router descends, at a rate of ``lr``, on the mean over the
    experience's tokens of ``sum_m pi_m d_m`` (the locality loss) plus ``balance N sum_m f_m P_m`` (the
    auxiliary loss), f the share of the choices and P the mean probability of each expert, both over all
    experiences so far. An expert that knows a task hardly moves for it, so tasks stay where they are known;
    where they are not, the router tries another. Keys of frozen cohorts stay as they are.

    Nothing else should teach the router beside it: take ``router.k=1``, whose gates are 1, and
    ``router.balance=0``. The paper adds noise to the choice instead of drawing keys at random.

    Args:
        lr: eta, above 0. The paper adds up the logits of a data set where ``router.level=sequence`` takes
            their mean: for data sets of S samples its eta is S^2 times as large here.
        balance: alpha >= 0.
        experiences: in how many the router learns (the paper's early termination); behind them its keys stand
            still, since the gaps between experts would close again and tasks change hands. None: in all.
    """

    reads_batches = True

    def __init__(self, lr: float = 0.5, balance: float = 0.5, experiences: int | None = None) -> None:
        check_weight(lr, "strategy.locality.lr", above=True)
        check_weight(balance, "strategy.locality.balance")
        whole = isinstance(experiences, int) and not isinstance(experiences, bool) and experiences >= 0
        if experiences is not None and not whole:
            raise InputError(
                got=f"experiences={experiences!r}",
                allowed="a whole number, at least 0, or null",
                key="strategy.locality.experiences",
            )
        self.lr, self.balance, self.experiences = lr, balance, experiences
        self.start: dict[str, Tensor] = {}  # experts' weights as this experience found them
        self.shares: dict[int, Tensor] = {}  # (N,) of each layer: what each experience chose, added up
        self.taught = 0
        self._device = torch.device("cpu")

    def check(self, setting: Setting) -> None:
        """There are routers, and they score every expert."""
        layers = setting.model.expert_layers.values()
        if not layers or not all(isinstance(layer, MoE) for layer in layers):
            raise InputError(
                got="strategy=locality with a model whose layers do not score every expert",
                allowed="layer=moe",
                key="layer (or strategy)",
            )
        why = "stops gradients alone (strategy.locality.experiences says when this router stops)"
        check_beside("locality", setting, ("router_freezing",), why)

    def begin(self, outlook: Outlook) -> None:
        """Note where the experts stand."""
        self._device = next(outlook.model.parameters()).device
        learns = self.experiences is None or outlook.experience.index < self.experiences
        held = _learning_experts(outlook.model) if learns else ()
        self.start = {name: weights.detach().clone() for name, weights in held}

    def end(self, outlook: Outlook) -> None:
        """One step of the routers."""
        if self.start and len(outlook.experience.train):
            layers = {i: layer for i, layer in outlook.model.expert_layers.items() if isinstance(layer, MoE)}
            moved = {i: self._moved(i, layer) for i, layer in layers.items()}
            tokens = self._look(outlook, layers)
            pushes = {
                i: (moved[i] + self.balance * len(moved[i]) * self.shares[i] / self.taught**2) / tokens[i]
                for i in layers
            }
            self._teach(outlook, layers, pushes)
        self.start = {}

    @torch.no_grad()
    def _moved(self, index: int, layer: MoE) -> Tensor:
        """(N,) how far each expert has come; 0 for frozen ones and no-ops."""
        parts = []
        for place, (cohort, size) in enumerate(zip(layer.cohorts, layer.cohort_sizes, strict=True)):
            square_n = torch.zeros(size, device=self._device)
            for name in owned(cohort):
                if (was := self.start.get(f"{index}.{place}.{name}")) is not None:
                    moved_n = cohort.get_parameter(name) - was
                    square_n[: len(was)] += moved_n.flatten(1).square().sum(dim=1)
            parts.append(square_n.sqrt())
        return torch.cat(parts)

    @torch.no_grad()
    def _look(self, outlook: Outlook, layers: dict[int, MoE]) -> dict[int, int]:
        """Add up each expert's share of the choices; the number of real tokens of each layer."""
        count = {i: torch.zeros(layer.num_experts, device=self._device) for i, layer in layers.items()}
        tokens = dict.fromkeys(layers, 0)
        for routings in _passes(outlook):
            for i, routing in routings.items():
                _, expert_P, _, kept_P = routing.pairs()
                count[i] += torch.bincount(expert_P[kept_P], minlength=routing.num_experts)
                tokens[i] += routing.num_tokens if routing.valid is None else int(routing.valid.sum())
        self.taught += 1
        for i, count_N in count.items():
            share_N = count_N / count_N.sum().clamp_min(1)
            known_N = self.shares.get(i, share_N.new_zeros(0))
            self.shares[i] = share_N + nn.functional.pad(known_N, (0, len(share_N) - len(known_N)))
        return {i: max(number, 1) for i, number in tokens.items()}

    def _teach(self, outlook: Outlook, layers: dict[int, MoE], pushes: dict[int, Tensor]) -> None:
        """Both losses are sums of probabilities, each expert's times what pushes against it."""
        keys = [cohort.get_parameter("key") for layer in layers.values() for cohort in layer.cohorts]
        keys = [key for key in keys if key.requires_grad]
        if not keys:
            return
        total = [torch.zeros_like(key) for key in keys]
        with torch.enable_grad():
            for routings in _passes(outlook):
                loss = torch.stack([_pushed(routing, pushes[i]) for i, routing in routings.items()]).sum()
                gradients = torch.autograd.grad(loss, keys, allow_unused=True)
                for part, gradient in zip(total, gradients, strict=True):
                    part += 0 if gradient is None else gradient
        with torch.no_grad():
            for key, part in zip(keys, total, strict=True):
                key.sub_(self.lr * part)

    def state_dict(self) -> dict[str, Any]:
        """Where the experts stood, and what was chosen."""
        return {"start": self.start, "shares": self.shares, "taught": self.taught}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back; what is added to is copied first."""
        self.start = {name: weights.to(self._device, copy=True) for name, weights in state["start"].items()}
        self.shares = {i: share_N.to(self._device, copy=True) for i, share_N in state["shares"].items()}
        self.taught = state["taught"]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the experts as they were, and of the shares."""
        return tensor_bytes(*self.start.values(), *self.shares.values())


def _learning_experts(model: ContinualModel) -> Iterator[tuple[str, Tensor]]:
    """Stacked weights that learn, by layer, cohort and name; no keys."""
    for i, layer in model.expert_layers.items():
        for place, cohort in enumerate(layer.cohorts):
            for name in owned(cohort):
                if (weights := cohort.get_parameter(name)).requires_grad:
                    yield f"{i}.{place}.{name}", weights


def _passes(outlook: Outlook) -> Iterator[dict[int, Routing]]:
    """What the routers make of the training data, as in an evaluation."""
    draw = generator(outlook.seed, outlook.experience.index, "locality")
    with quiet(outlook.model):
        for rows in torch.arange(len(outlook.experience.train)).split(_ROWS):
            inputs, targets = outlook.experience.train[rows]
            routings = ask(outlook, inputs, targets, lambda: draw).routings
            yield {i: routing for i, routing in routings.items() if i in outlook.model.expert_layers}


def _pushed(routing: Routing, push_N: Tensor) -> Tensor:
    """() the sum over real tokens of each expert's probability times what pushes against it."""
    assert routing.scores is not None
    sum_T = routing.scores.softmax(dim=1) @ push_N.to(routing.scores)
    return (sum_T if routing.valid is None else sum_T[routing.valid]).sum()
