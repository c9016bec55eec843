"""Routers that score every expert by a linear map: Switch and dropless top-k.

A router owns no parameter: its rows are the cohorts' keys, so that they are born and frozen with them.

Legend: T tokens, D width, K choices per token, C candidates, n experts of one cohort, N experts of the layer,
G groups (sequences).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.precision import no_autocast, wide
from cl_moe.layers.ranks import sum_over_ranks
from cl_moe.layers.routing import Routing, Tokens
from cl_moe.layers.selection import top_k_first
from cl_moe.losses import load_balancing_loss, router_z_loss


class Candidates(NamedTuple):
    """The experts a router may choose from.

    Args:
        keys: one (n, D) matrix per cohort, oldest first.
        expert: (C,) int64, their ids for life.
        live: (C,) bool, False for frozen experts.
        num_experts: N of the whole layer.
    """

    keys: Sequence[Tensor]
    expert: Tensor
    live: Tensor
    num_experts: int


class Router(nn.Module, ABC):
    """Maps tokens and keys to a routing.

    Attributes:
        balance: weight of the load balancing loss, >= 0.
        z_loss: weight of the router z-loss, >= 0.
    """

    balance: float
    z_loss: float

    @abstractmethod
    def forward(self, tokens: Tokens, candidates: Candidates) -> Routing:
        """The choice for every token; padding chooses nothing."""

    @abstractmethod
    def init_keys(self, key_nD: Tensor) -> None:
        """Initialise a newborn cohort's keys in place."""

    @abstractmethod
    def check_num_experts(self, num_experts: int) -> None:
        """Refuse a number of experts that this router cannot serve."""

    def losses(
        self, logits_TC: Tensor, choice_TK: Tensor, valid_T: Tensor | None, live_C: Tensor
    ) -> dict[str, Tensor]:
        """The auxiliary losses, weighted; the balance loss looks at live experts only (FORMULAS 6)."""
        losses = {}
        if self.balance > 0:
            training = self.training and torch.is_grad_enabled()
            loss = load_balancing_loss(
                logits_TC, choice_TK, valid_T, live_C, over_ranks=sum_over_ranks if training else None
            )
            losses["balance"] = self.balance * loss
        if self.z_loss > 0:
            losses["z_loss"] = self.z_loss * router_z_loss(logits_TC, valid_T)
        return losses


class Switch(Router):
    """The Switch Transformer's router: one expert per token, with a capacity (2101.03961, section 2).

    gate = softmax(W x)[argmax], float32, not renormalised. Each sequence gives every expert
    ``real tokens / experts x factor`` slots, taken in token order; a token that finds none is dropped: its
    output is 0. Ties go to the oldest expert.

    Args:
        dim: D.
        balance: weight of the load balancing loss, >= 0 (equation 4); its value at uniform.
        z_loss: weight of the router z-loss, >= 0 (ST-MoE, 2202.08906).
        capacity_factor: while training, > 0.
        eval_capacity_factor: in evaluation, > 0.
        min_capacity: slots an expert has at least, >= 0.
        rounding: ``"ceil"`` or ``"floor"`` of the capacity; libraries differ.
        jitter: the router's input is multiplied by U(1 - jitter, 1 + jitter) while training; in [0, 1).
        init_scale: keys ~ truncated normal, standard deviation sqrt(init_scale / D) (section 2.4).
    """

    def __init__(
        self,
        dim: int,
        balance: float = 1e-2,
        z_loss: float = 1e-3,
        capacity_factor: float = 1.25,
        eval_capacity_factor: float = 2.0,
        min_capacity: int = 4,
        rounding: Literal["ceil", "floor"] = "ceil",
        jitter: float = 1e-2,
        init_scale: float = 0.1,
    ) -> None:
        super().__init__()
        if rounding not in ("ceil", "floor"):
            raise InputError(got=f"rounding={rounding}", allowed="ceil or floor", key="router.rounding")
        if not 0 <= jitter < 1:
            raise InputError(got=f"jitter={jitter}", allowed="0 <= jitter < 1", key="router.jitter")
        _check_coefficients(balance=balance, z_loss=z_loss, min_capacity=min_capacity)
        for name, factor in (
            ("capacity_factor", capacity_factor),
            ("eval_capacity_factor", eval_capacity_factor),
        ):
            if factor <= 0:
                raise InputError(got=f"{name}={factor}", allowed="a number > 0", key=f"router.{name}")
        self.dim, self.balance, self.z_loss = dim, balance, z_loss
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.min_capacity, self.rounding = min_capacity, rounding
        self.jitter, self.init_scale = jitter, init_scale

    def forward(self, tokens: Tokens, candidates: Candidates) -> Routing:
        """One pair per token, (T, 1); ``kept`` is False where the capacity was full."""
        x_TD = wide(tokens.x)
        if self.training and self.jitter > 0:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        logits_TC = _logits(x_TD, candidates)
        choice_T1 = top_k_first(logits_TC, 1)
        gate_T1 = logits_TC.softmax(dim=-1).gather(1, choice_T1)
        kept_T1 = self._within_capacity(choice_T1[:, 0], tokens, logits_TC.shape[1]).unsqueeze(-1)
        return _routing(tokens, candidates, logits_TC, choice_T1, gate_T1, kept_T1, self)

    def init_keys(self, key_nD: Tensor) -> None:
        """Truncated normal, cut at two standard deviations."""
        std = (self.init_scale / self.dim) ** 0.5
        nn.init.trunc_normal_(key_nD, std=std, a=-2 * std, b=2 * std)

    def check_num_experts(self, num_experts: int) -> None:
        """One expert is enough."""
        _check_k(1, num_experts)

    def _within_capacity(self, choice_T: Tensor, tokens: Tokens, num_candidates: int) -> Tensor:
        """(T,) bool: real tokens whose place in their expert's queue is inside the sequence's capacity."""
        counter_T = torch.arange(choice_T.numel(), device=choice_T.device)
        group_T = counter_T // tokens.group_size
        valid_T = torch.ones_like(choice_T, dtype=torch.bool) if tokens.valid is None else tokens.valid
        # padding queues behind an expert of its own, so it takes no slot
        queue_T = group_T * (num_candidates + 1) + torch.where(valid_T, choice_T, num_candidates)
        sorted_T, order_T = queue_T.sort(stable=True)
        place_T = counter_T - torch.searchsorted(sorted_T, sorted_T)
        place_T = torch.empty_like(place_T).scatter_(0, order_T, place_T)
        real_G = valid_T.reshape(-1, tokens.group_size).sum(dim=1)
        return valid_T & (place_T < self._capacity(real_G, num_candidates)[group_T])

    def _capacity(self, real_G: Tensor, num_candidates: int) -> Tensor:
        """(G,) int64 slots per expert."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        share_G = (real_G.double() * factor / num_candidates).round(decimals=9)  # 11.000000000000002 is 11
        share_G = share_G.ceil() if self.rounding == "ceil" else share_G.floor()
        return share_G.long().clamp_min(self.min_capacity)


class TopK(Router):
    """The k best experts of every token, none dropped (dropless top-k; 1701.06538, equations 3 to 5).

    Ties go to the oldest expert. With k = 1 and ``normalize="selected"`` every gate is 1, so that the task's
    loss does not reach the router: take ``"all"`` there.

    Args:
        dim: D.
        k: experts per token, 1 <= k <= experts.
        normalize: the softmax runs over the ``"selected"`` k logits, or over ``"all"`` before the choice.
        balance: weight of the load balancing loss, >= 0; its value at uniform.
        z_loss: weight of the router z-loss, >= 0.
    """

    def __init__(
        self,
        dim: int,
        k: int = 2,
        normalize: Literal["selected", "all"] = "selected",
        balance: float = 1e-2,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        if normalize not in ("selected", "all"):
            raise InputError(got=f"normalize={normalize}", allowed="selected or all", key="router.normalize")
        _check_coefficients(balance=balance, z_loss=z_loss)
        self.dim, self.k, self.normalize = dim, k, normalize
        self.balance, self.z_loss = balance, z_loss

    def forward(self, tokens: Tokens, candidates: Candidates) -> Routing:
        """K pairs per token, (T, K), best first; ``kept`` is False on padding only."""
        logits_TC = _logits(wide(tokens.x), candidates)
        self.check_num_experts(logits_TC.shape[1])
        choice_TK = top_k_first(logits_TC, self.k)
        if self.normalize == "selected":
            gate_TK = logits_TC.gather(1, choice_TK).softmax(dim=-1)
        else:
            gate_TK = logits_TC.softmax(dim=-1).gather(1, choice_TK)
        if tokens.valid is None:
            kept_TK = torch.ones_like(choice_TK, dtype=torch.bool)
        else:
            kept_TK = tokens.valid.unsqueeze(-1).expand_as(choice_TK)
        return _routing(tokens, candidates, logits_TC, choice_TK, gate_TK, kept_TK, self)

    def init_keys(self, key_nD: Tensor) -> None:
        """U(+-1/sqrt(D)), like ``nn.Linear``."""
        nn.init.uniform_(key_nD, -(self.dim**-0.5), self.dim**-0.5)

    def check_num_experts(self, num_experts: int) -> None:
        """At least k."""
        _check_k(self.k, num_experts)


def _logits(x_TD: Tensor, candidates: Candidates) -> Tensor:
    """(T, C) raw scores; one product per cohort, since a concatenated one changes the bits of old scores."""
    with no_autocast(x_TD):
        return torch.cat([nn.functional.linear(x_TD, wide(key_nD)) for key_nD in candidates.keys], dim=-1)


def _routing(
    tokens: Tokens,
    candidates: Candidates,
    logits_TC: Tensor,
    choice_TK: Tensor,
    gate_TK: Tensor,
    kept_TK: Tensor,
    router: Router,
) -> Routing:
    """The record of a choice among candidates, with ids for life."""
    scores_TN = logits_TC
    if logits_TC.shape[1] < candidates.num_experts:
        scores_TN = logits_TC.new_full((logits_TC.shape[0], candidates.num_experts), float("-inf"))
        scores_TN = scores_TN.index_copy(1, candidates.expert, logits_TC)
    return Routing(
        expert=candidates.expert[choice_TK],
        weight=gate_TK.masked_fill(~kept_TK, 0.0),
        kept=kept_TK,
        num_tokens=choice_TK.shape[0],
        num_experts=candidates.num_experts,
        valid=tokens.valid,
        scores=scores_TN,
        losses=router.losses(logits_TC, choice_TK, tokens.valid, candidates.live),
    )


def _check_k(k: int, num_experts: int) -> None:
    if not 1 <= k <= num_experts:
        raise InputError(
            got=f"k={k}", allowed=f"1 <= k <= {num_experts}, the number of experts in use", key="router.k"
        )


def _check_coefficients(**coefficients: float) -> None:
    for name, value in coefficients.items():
        if value < 0:
            raise InputError(got=f"{name}={value}", allowed="a number >= 0", key=f"router.{name}")
