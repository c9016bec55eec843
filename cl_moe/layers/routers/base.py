"""What every router promises, and what routers share.

A router owns no parameter: its rows are the cohorts' keys, so that they are born and frozen with them.

Legend: T tokens, D width, K choices per token, C candidates, n experts of one cohort, N experts of the layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.checks import number
from cl_moe.layers.precision import no_autocast, wide
from cl_moe.layers.ranks import part_of_mean, sum_over_ranks
from cl_moe.layers.routers.scores import Scores
from cl_moe.layers.routing import Routing
from cl_moe.layers.tokens import Tokens
from cl_moe.losses import load_balancing_loss, router_z_loss


class Candidates(NamedTuple):
    """The experts a router may choose from.

    Args:
        keys: one (n, D) matrix per cohort, oldest first.
        expert: (C,) int64, their ids for life.
        live: (C,) bool, False for frozen experts.
        num_experts: N of the whole layer.
        bias: (C,) added to scores for the choice only; None without loss-free balancing (see ``Scores``).
    """

    keys: Sequence[Tensor]
    expert: Tensor
    live: Tensor
    num_experts: int
    bias: Tensor | None = None


class Router(nn.Module, ABC):
    """Maps tokens and keys to a routing.

    Attributes:
        balance: weight of the load balancing loss, >= 0.
        z_loss: weight of the router z-loss, >= 0.
        scores: how logits become scores, and the rate of loss-free balancing.
        causal: whether what happens to a token may not depend on what the later ones of its sequence are; a
            causal language model refuses a router that says False. How many they are may matter: a capacity
            counts the tokens of the whole sequence (``Capacity``).
        dim: width of the layer that it was made for; None: of any, its keys know their width.
        cost_varies: whether what experts compute depends on the tokens, not on their number alone.
    """

    dim: int | None = None
    balance: float
    z_loss: float
    scores: Scores = Scores()
    causal: bool = True
    cost_varies: bool = False

    @property
    def choices(self) -> float:
        """Experts that compute a token, on average, where none is dropped."""
        return 1.0

    @abstractmethod
    def forward(self, tokens: Tokens, candidates: Candidates) -> Routing:
        """The choice for every token; padding chooses nothing."""

    @abstractmethod
    def init_keys(self, key_nD: Tensor) -> None:
        """Initialise a newborn cohort's keys in place."""

    @abstractmethod
    def check_num_experts(self, num_experts: int) -> None:
        """Refuse a number of experts that this router cannot serve."""

    def check_dim(self, dim: int) -> None:
        """Refuse a layer of another width than the one that the router was made for."""
        if self.dim is not None and self.dim != dim:
            raise InputError(
                got=f"{type(self).__name__}(dim={self.dim}) in a layer of width {dim}",
                allowed=f"dim={dim}, or none",
                key="router (or dim)",
            )

    def check_length(self, length: int, num_experts: int) -> None:
        """Refuse sequences of so many tokens if none of them could ever be computed; by default all fit."""
        return None

    def losses(
        self, logits_TC: Tensor, choice_TK: Tensor, valid_T: Tensor | None, live_C: Tensor
    ) -> dict[str, Tensor]:
        """The auxiliary losses, weighted; the balance loss looks at live experts only (FORMULAS 6)."""
        losses = {}
        logits_TC = wide(logits_TC)  # sums over tokens are exact counts in no narrower dtype
        training = self.training and torch.is_grad_enabled()
        if self.balance > 0:
            loss = load_balancing_loss(
                self.scores.log(logits_TC),
                choice_TK,
                valid_T,
                live_C,
                over_ranks=sum_over_ranks if training else None,
            )
            losses["balance"] = self.balance * loss
        if self.z_loss > 0:
            loss = router_z_loss(logits_TC, valid_T)
            if training:
                loss = part_of_mean(loss, len(logits_TC) if valid_T is None else valid_T.sum())
            losses["z_loss"] = self.z_loss * loss
        return losses


def uniform_keys(key_nD: Tensor) -> None:
    """U(+-1/sqrt(D)) in place, like ``nn.Linear``."""
    bound = key_nD.shape[1] ** -0.5
    nn.init.uniform_(key_nD, -bound, bound)


def router_logits(x_TD: Tensor, candidates: Candidates) -> Tensor:
    """(T, C) raw scores in the tokens' precision (see ``Scores.cast``).

    One product per cohort, since a concatenated one changes the bits of old scores.
    """
    with no_autocast(x_TD):
        keys = [key.bfloat16() if x_TD.dtype == torch.bfloat16 else wide(key) for key in candidates.keys]
        return torch.cat([nn.functional.linear(x_TD, key_nD) for key_nD in keys], dim=-1)


def scores_for_life(logits_TC: Tensor, candidates: Candidates) -> Tensor:
    """(T, N) logits in the order of ids; -inf for experts that are no candidates."""
    if logits_TC.shape[1] == candidates.num_experts:
        return logits_TC
    scores_TN = logits_TC.new_full((logits_TC.shape[0], candidates.num_experts), float("-inf"))
    return scores_TN.index_copy(1, candidates.expert, logits_TC)


def real_tokens(tokens: Tokens, choice_TK: Tensor) -> Tensor:
    """(T, K) bool, False on padding."""
    if tokens.valid is None:
        return torch.ones_like(choice_TK, dtype=torch.bool)
    return tokens.valid.unsqueeze(-1).expand_as(choice_TK)


def token_choice(
    tokens: Tokens,
    candidates: Candidates,
    logits_TC: Tensor,
    choice_TK: Tensor,
    gate_TK: Tensor,
    kept_TK: Tensor,
    losses: dict[str, Tensor],
) -> Routing:
    """The record of K choices for every token, with ids for life."""
    return Routing(
        expert=candidates.expert[choice_TK],
        weight=wide(gate_TK).masked_fill(~kept_TK, 0.0),
        kept=kept_TK,
        num_tokens=choice_TK.shape[0],
        num_experts=candidates.num_experts,
        valid=tokens.valid,
        scores=scores_for_life(wide(logits_TC), candidates),
        losses=losses,
    )


def check_k(k: int, num_experts: int) -> None:
    """Refuse more choices than there are experts."""
    if not 1 <= k <= num_experts:
        raise InputError(
            got=f"k={k}", allowed=f"1 <= k <= {num_experts}, the number of experts in use", key="router.k"
        )


def check_coefficients(**coefficients: float) -> None:
    """Refuse what is below 0, or not finite."""
    for name, value in coefficients.items():
        number(name, value, key=f"router.{name}")


def check_option(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse an option that is none of those there are."""
    if value not in allowed:
        raise InputError(got=f"{name}={value}", allowed=" or ".join(allowed), key=f"router.{name}")
