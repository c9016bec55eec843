"""The contract of a layer that routes.

Legend: D width, N experts of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.activity import Activity
from cl_moe.layers.checks import number, whole
from cl_moe.layers.routing import Routing
from cl_moe.layers.tokens import check_finite, check_fits

GROWTH_INITS = ("fresh", "copy", "zero_output")


class ExpertLayer(nn.Module, ABC):
    """A feed-forward layer made of cohorts of experts.

    A cohort is the unit of growth and of freezing: its weights and its router keys are whole parameters of
    one module in ``cohorts``, appended and never reordered, so ids and state names are for life (law 2).
    What the router shares between cohorts (a query net, say) is listed by ``shared_router``; all that it
    chooses by is named in the ``router_parts`` of the layer and of its cohorts (see ``router_names``).

    ``torch.compile`` takes a layer whole, and anew after a growth, a freeze, or for another size of input;
    after ``torch._dynamo.config.recompile_limit`` (8) times torch goes on uncompiled. Functional calls work;
    ``torch.func`` transforms of them and second derivatives of experts are not implemented.
    """

    dim: int
    cohorts: nn.ModuleList

    @abstractmethod
    def forward(
        self, x: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, Routing]:
        """Output of the shape of ``x``, and what was routed.

        Args:
            x: (..., D) floating. Everything before the last two dimensions numbers sequences: capacities are
                counted within a sequence. A 2-D input is a batch of single tokens.
            mask: (...) bool, False on padding; its output is 0 and it reaches no loss and no count.
            cohorts: use these cohorts only (a teacher, a diagnostic); None for all.
        """

    @abstractmethod
    def grow(
        self, num_experts: int, init: str = "fresh", noise: float = 0.01, load: Tensor | None = None
    ) -> None:
        """Append one cohort of newborn experts, drawn from torch's global generator.

        Args:
            num_experts: how many are born.
            init: ``"fresh"`` as at the start; ``"copy"`` the most used experts and their keys, plus noise;
                ``"zero_output"`` fresh, but with a zero down-projection, so that newborns add nothing at
                first (their keys still take top-k slots from the old ones).
            noise: standard deviation of a copy's noise, relative to the copied tensor's own.
            load: (N,) score-weighted load of the past, which ``"copy"`` ranks by; None: all equal.
        """

    @property
    def cohort_sizes(self) -> tuple[int, ...]:
        """Experts per cohort, oldest first."""
        return tuple(int(cohort.num_experts) for cohort in self.cohorts)  # type: ignore[arg-type]

    @property
    def num_experts(self) -> int:
        """Experts of all cohorts, frozen ones included."""
        return sum(self.cohort_sizes)

    @property
    def frozen_cohorts(self) -> tuple[bool, ...]:
        """Whether each cohort has stopped learning."""
        return tuple(not any(p.requires_grad for p in cohort.parameters()) for cohort in self.cohorts)

    @property
    def shared_router(self) -> tuple[nn.Module, ...]:
        """Router parts that all cohorts use: frozen only by a policy that says so."""
        return ()

    def active_parameters(self) -> int:
        """Parameters that take part in computing one token, routing's included: here all of them.

        An expert that is not chosen does not; where experts differ in size, the mean counts.
        """
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def has_hidden_units(self) -> bool:
        """Whether ``hidden_activity`` has something to tell."""
        return False

    def hidden_activity(self, x: Tensor, routing: Routing) -> Activity | None:
        """How active the hidden units are, computed anew (U units; as in evaluation, without dropout).

        None where there are none: a linear map, a memory of values alone.

        Args:
            x: (..., D), the input of a forward pass.
            routing: what that pass routed, of all cohorts.
        """
        return None

    def freeze(self, cohorts: Sequence[int] | None = None, shared: bool = False) -> None:
        """Stop cohorts (None: all) for good; with ``shared``, what the router shares as well.

        Whole parameters leave training and drop their gradient: masked gradients do not stop weight decay or
        momentum. A module with running statistics offers ``freeze_statistics`` and is told.
        """
        chosen = range(len(self.cohorts)) if cohorts is None else cohorts
        _check_list(chosen)
        stopped: list[nn.Module] = [self.cohorts[self.check_cohort(index)] for index in chosen]
        for module in [*stopped, *(self.shared_router if shared else ())]:
            for part in module.modules():
                stop = getattr(part, "freeze_statistics", None)
                if callable(stop):
                    stop()
            for parameter in module.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None

    def cohort_of(self, expert: int) -> int:
        """The cohort that an expert belongs to, by its id."""
        return bisect_right(list(accumulate(self.cohort_sizes)), expert)

    def computes(self, expert: int) -> bool:
        """Whether an expert, by its id, does anything: no-ops, the last of their cohort, do not."""
        index = self.cohort_of(expert)
        place = expert - sum(self.cohort_sizes[:index])
        return place < int(getattr(self.cohorts[index], "num_computing", self.cohort_sizes[index]))

    @property
    def pruned_cohorts(self) -> tuple[int, ...]:
        """Cohorts that are no candidates any more, unless they are asked for."""
        return tuple(i for i, cohort in enumerate(self.cohorts) if getattr(cohort, "pruned", False))

    def prune(self, cohorts: Sequence[int]) -> None:
        """Freeze cohorts and let nobody choose their experts any more; ids, weights and keys stay.

        ``forward(x, cohorts=...)`` still takes them where they are asked for: teachers and diagnostics.

        Raises:
            InputError: no cohort would be left.
        """
        self.freeze(cohorts)
        if {*cohorts} | {*self.pruned_cohorts} >= {*range(len(self.cohorts))}:
            raise InputError(got="pruning of every cohort", allowed="at least one that stays", key="prune")
        for index in cohorts:
            self.cohorts[index].pruned = True  # type: ignore[assignment]

    def recycle(
        self, experts: Sequence[int], init: str = "fresh", noise: float = 0.01, load: Tensor | None = None
    ) -> None:
        """Let single experts start anew under their old ids; overridden where an expert owns its key.

        Raises:
            InputError: this layer's experts cannot, or one of them is frozen.
        """
        raise InputError(
            got=f"recycling of single experts of {type(self).__name__}, which share their keys",
            allowed="layer=moe, or prune=idle_cohorts",
            key="prune (or layer)",
        )

    def check_cohort(self, index: int) -> int:
        """``index`` itself, if there is such a cohort."""
        if not isinstance(index, int) or not 0 <= index < len(self.cohorts):
            raise InputError(
                got=f"cohort {index}",
                allowed=f"0 .. {len(self.cohorts) - 1}: the layer has {len(self.cohorts)} cohorts",
                key="cohorts",
            )
        return index

    def check_cohorts(self, cohorts: Sequence[int] | None) -> list[int]:
        """The cohorts asked for, oldest first; None for all that were not pruned."""
        if cohorts is None:
            return [index for index in range(len(self.cohorts)) if index not in self.pruned_cohorts]
        _check_list(cohorts)
        # compiled code takes the numbers asked for as variables: compared with what there is, they are known
        chosen = [index for index in range(len(self.cohorts)) for asked in cohorts if asked == index]
        if not chosen or len(set(chosen)) < len(cohorts):
            for index in cohorts:
                self.check_cohort(index)
            raise InputError(got=f"cohorts={list(cohorts)}", allowed="at least one, each once", key="cohorts")
        return chosen

    def check_growths(self, sizes: Sequence[int], init: str) -> None:
        """Refuse a plan of growths, one after the other, of which some could not be carried out."""
        for size in sizes:
            self.check_growth(size, init)

    def check_growth(
        self, num_experts: int, init: str, load: Tensor | None = None, noise: float = 0.0
    ) -> None:
        """Refuse a growth that this layer could not do; asked before training, and again by ``grow``."""
        whole("growth by num_experts", num_experts, least=1, key="growth.num_experts")
        number("noise", noise, key="growth.noise")
        if init not in GROWTH_INITS:
            raise InputError(got=f"init={init}", allowed=" or ".join(GROWTH_INITS), key="growth.init")
        if load is not None and load.shape != (self.num_experts,):
            raise InputError(
                got=f"load of shape {tuple(load.shape)}", allowed=f"shape ({self.num_experts},)", key="load"
            )
        if load is not None and not (load >= 0).all():
            raise InputError(got="a load with NaN or below 0", allowed="sums of weights, >= 0", key="load")

    def birth_parameters(self, num_experts: int, total: int, hidden: int | None = None) -> int:
        """Parameters of a cohort of newborns, nothing being born: what a budget is held against.

        Args:
            num_experts: how many.
            total: experts of the layer before their birth.
            hidden: their hidden width, where they have one; None: as at the start.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how large its newborns are")

    def check_hidden(self, hidden: int, init: str) -> None:
        """Refuse newborns of a hidden width of their own; overridden where experts have one.

        Args:
            hidden: width asked for.
            init: how they are to start.
        """
        raise InputError(
            got=f"hidden={hidden} for newborn experts of {type(self).__name__}",
            allowed="layer=moe, whose experts have a hidden layer, or growth.hidden=null",
            key="growth.hidden",
        )

    def check_input(self, x: Tensor, mask: Tensor | None) -> None:
        """Refuse what would otherwise fail far from its cause, NaN and infinite tokens included."""
        check_fits(x, mask, self.dim, next(self.parameters(), x))
        check_finite(x, mask, type(self).__name__)

    def check_length(self, length: int) -> None:
        """Refuse sequences of so many tokens if the layer could never compute any; by default all fit."""
        return None

    @property
    def causal(self) -> bool:
        """Whether a token's output hears of no later token; a causal language model refuses others."""
        return True

    @property
    def wants_load(self) -> bool:
        """Whether ``after_step`` has something to do: who trains the layer then counts loads."""
        return False

    def after_step(self, count_N: Tensor) -> None:
        """Balance without a loss, after an optimizer step; nothing by default.

        It is not done in ``forward``, which may run twice for a step (checkpointing) or several times
        (accumulation), and on other data on every rank.

        Args:
            count_N: (N,) choices of each expert in all batches of the step, summed over ranks:
                ``fold_load(routing).count``, added up.
        """
        return None


def _check_list(cohorts: object) -> None:
    if isinstance(cohorts, int):
        raise InputError(
            got=f"cohorts={cohorts}", allowed="a list of cohorts, such as [0], or None for all", key="cohorts"
        )


def most_used(load_N: Tensor | None, num_experts: int, device: torch.device) -> Tensor:
    """(N,) int64: from the most to the least used; among equals, and without a load, oldest first."""
    if load_N is None:
        return torch.arange(num_experts, device=device)
    return load_N.to(device).sort(descending=True, stable=True).indices


def noisy_copy(source: Tensor, noise: float) -> Tensor:
    """A copy plus normal noise of ``noise`` times the source's own standard deviation."""
    return source + noise * source.std(unbiased=False) * torch.randn_like(source)
