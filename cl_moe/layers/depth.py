"""Mixture-of-Depths: some tokens of a sequence go through a block, the others pass by (2404.02258).

Legend: B sequences, S positions, D width, T = B S tokens, K places for chosen tokens per sequence, M = B K.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.checks import number, whole
from cl_moe.layers.precision import no_autocast, wide
from cl_moe.layers.ranks import part_of_mean
from cl_moe.layers.rounding import whole_share, whole_shares
from cl_moe.layers.routing import Routing
from cl_moe.layers.selection import top_k_first
from cl_moe.layers.tokens import check_finite, check_fits

Inner = Mapping[int, Routing]
Block = Callable[..., tuple[Tensor, Inner]]


class DepthRouter(nn.Module):
    """Chooses which tokens go through a block, and lets them (2404.02258).

    A linear map gives every token a scalar r. The ``capacity`` share of each sequence's real tokens with the
    highest r (rounded up, so at least one; ties go to the earliest) goes through: x + r f(x), where f(x) is
    what the block adds to its input (equation 1; r enters as it is, without a sigmoid). All others keep x.
    The chosen tokens stand in their order; what a block knows of positions must be in x. A 2-D input, (S, D),
    is a batch of S sequences of one token, as everywhere in these layers, and lets every token through: one
    sequence is (1, S, D).

    The top of a sequence depends on its end. So a causal router has a predictor, a small perceptron that
    learns from x alone, through a stop-gradient, whether a token will be among the chosen (binary
    cross-entropy, the loss ``depth_predictor``; the paper's second way of sampling). In training the top is
    taken, in evaluation the predictor decides token by token; what share goes through is up to it.

    ``torch.compile`` takes training, and evaluation of one that is not causal, as one graph. In a causal
    one's evaluation the number of chosen tokens is known only when it runs, and the graph breaks there.

    Args:
        dim: D.
        capacity: share of a sequence's real tokens that goes through, in (0, 1]; the paper's .125 and .5.
        causal: whether evaluation must not look ahead.
        predictor_weight: weight of the predictor's loss, >= 0; its gradients reach the predictor only.
    """

    router_parts = ("score", "predictor")

    def __init__(
        self, dim: int, capacity: float = 0.125, causal: bool = True, predictor_weight: float = 1.0
    ) -> None:
        super().__init__()
        if not 0 < capacity <= 1:
            raise InputError(
                got=f"capacity={capacity}", allowed="a share in (0, 1]", key="model.depth.capacity"
            )
        number("predictor_weight", predictor_weight, key="model.depth.predictor_weight")
        whole("dim", dim, least=1, key="dim")
        self.dim, self.capacity, self.causal = dim, capacity, causal
        self.predictor_weight = predictor_weight
        self.score = nn.Linear(dim, 1, bias=False)
        half = max(dim // 2, 1)
        perceptron = [nn.Linear(dim, half), nn.ReLU(), nn.Linear(half, 1)]
        self.predictor = nn.Sequential(*perceptron) if causal else None

    @property
    def cost_varies(self) -> bool:
        """Whether what goes through depends on the tokens, not on their number alone: a predictor decides."""
        return self.predictor is not None

    def forward(
        self, x: Tensor, mask: Tensor | None, block: Block
    ) -> tuple[Tensor, Routing, dict[int, Routing]]:
        """Output of the shape of ``x``, what was chosen, and the block's own routings, by their keys.

        The choice is one pair per token, of an only expert 0: ``kept`` where the token went through (so the
        drop rate is the share that passed by), ``weight`` r there. The block's routings name the rows of
        ``x``, as if the block had seen all of them.

        Args:
            x: (..., S, D) floating; everything before the last two dimensions numbers sequences.
            mask: (..., S) bool, False on padding, which never goes through; None where there is none.
            block: called with the chosen tokens (B, K, D) and ``mask=`` (B, K), False on places that no token
                took (they stand behind the others), or None where all are taken; gives its output, residual
                included, and its routings.
        """
        check_fits(x, mask, self.dim, self.score.weight)
        check_finite(x, mask, type(self).__name__)
        if x.dim() < 2:
            raise InputError(
                got=f"x of shape {tuple(x.shape)}", allowed=f"a floating tensor (..., S, {self.dim})", key="x"
            )
        length = x.shape[-2] if x.dim() > 2 else 1
        x_BSD = x.reshape(x.shape[:-1].numel() // max(length, 1), length, self.dim)
        valid_BS = None if mask is None else mask.reshape(x_BSD.shape[:2])
        # padding may hold anything, even NaN, which times 0 would be NaN in gradients
        clean_BSD = x_BSD if valid_BS is None else x_BSD.masked_fill(~valid_BS.unsqueeze(-1), 0.0)
        with no_autocast(x):
            r_BS = F.linear(wide(clean_BSD), wide(self.score.weight)).squeeze(-1)
        chosen_BS, losses = self._choose(clean_BSD, r_BS, valid_BS)
        row_BK, real_BK = self._places(chosen_BS, valid_BS)
        row_M = row_BK.reshape(-1)
        x_TD = x_BSD.reshape(-1, self.dim)
        in_BKD = clean_BSD.reshape(-1, self.dim).index_select(0, row_M)
        in_BKD = in_BKD.reshape(*row_BK.shape, self.dim)
        out_BKD, inner = block(in_BKD, mask=real_BK)
        with no_autocast(x):
            r_M1 = r_BS.reshape(-1).index_select(0, row_M).unsqueeze(-1)
            change_MD = wide(out_BKD - in_BKD).reshape(-1, self.dim) * r_M1
        if real_BK is not None:
            change_MD = change_MD.masked_fill(~real_BK.reshape(-1, 1), 0.0)
        out_TD = x_TD.index_add(0, row_M, change_MD.to(x.dtype))
        valid_T = None if valid_BS is None else valid_BS.reshape(-1)
        lifted = {key: _lifted(routing, row_M, real_BK, len(x_TD), valid_T) for key, routing in inner.items()}
        return out_TD.reshape(x.shape), _record(chosen_BS, r_BS, valid_T, losses), lifted

    def _choose(
        self, x_BSD: Tensor, r_BS: Tensor, valid_BS: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, S) bool, and the predictor's loss while it learns."""
        if self.predictor is None or self.training:
            chosen_BS = self._top(r_BS, valid_BS)
        if self.predictor is None:
            return chosen_BS, {}
        with no_autocast(x_BSD):
            guess_BS = _perceptron(self.predictor, wide(x_BSD.detach())).squeeze(-1)
        if not self.training:
            return guess_BS > 0 if valid_BS is None else (guess_BS > 0) & valid_BS, {}
        loss_BS = F.binary_cross_entropy_with_logits(guess_BS, chosen_BS.to(guess_BS.dtype), reduction="none")
        if valid_BS is None:
            loss, count = loss_BS.sum() / max(loss_BS.numel(), 1), torch.tensor(loss_BS.numel())
        else:
            count = valid_BS.sum()
            loss = loss_BS.masked_fill(~valid_BS, 0.0).sum() / count.clamp_min(1)
        loss = part_of_mean(loss, count)
        return chosen_BS, {"depth_predictor": self.predictor_weight * loss}

    def _top(self, r_BS: Tensor, valid_BS: Tensor | None) -> Tensor:
        """(B, S) bool: the real tokens of a sequence with the highest r."""
        if valid_BS is not None:
            r_BS = r_BS.masked_fill(~valid_BS, float("-inf"))
        best_BK = top_k_first(r_BS, whole_share(r_BS.shape[1], self.capacity))
        taken_BK = torch.ones_like(best_BK, dtype=torch.bool)
        if valid_BS is not None:
            rank_K = torch.arange(best_BK.shape[1], device=best_BK.device)
            taken_BK = rank_K < whole_shares(valid_BS.sum(dim=1, keepdim=True), self.capacity)
        return torch.zeros_like(r_BS, dtype=torch.bool).scatter(1, best_BK, taken_BK)

    def _places(self, chosen_BS: Tensor, valid_BS: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, K) rows of x for every place, chosen ones first, and (B, K) where a chosen token stands."""
        looks_ahead = self.predictor is None or self.training
        if looks_ahead:
            num_places = whole_share(chosen_BS.shape[1], self.capacity)
        else:  # no more places than the fullest sequence needs, and never none: blocks want some input
            num_places = max(int(chosen_BS.sum(dim=1).max()), 1) if chosen_BS.numel() else 1
        order_BS = (~chosen_BS).to(torch.uint8).sort(dim=1, stable=True).indices
        first_B1 = torch.arange(len(chosen_BS), device=order_BS.device).unsqueeze(1) * chosen_BS.shape[1]
        row_BK = order_BS[:, :num_places] + first_B1
        if looks_ahead and valid_BS is None:
            return row_BK, None
        place_K = torch.arange(row_BK.shape[1], device=order_BS.device)
        return row_BK, place_K < chosen_BS.sum(dim=1, keepdim=True)


class MixtureOfDepths(nn.Module):
    """Any residual block, applied to some tokens of each sequence only: see ``DepthRouter``.

    With ``capacity=1`` and r = 1 it equals the plain block. A block that holds an expert layer makes it a
    mixture of depths and experts, the staged one of the paper's two (the integrated one is ``MoE`` with
    ``num_noops``, which needs nothing of this).

    Args:
        block: a module for (B, K, D) that gives its output, residual included, or the output and the
            ``Routing`` (or ``{key: Routing}``) of what it holds. It is given ``mask=`` (False behind the last
            chosen token) and ``cohorts=`` if it has such parameters; one without ``mask`` must be causal, so
            that nothing looks at a place behind it.
        dim: D.
        capacity: share of a sequence's real tokens that goes through, in (0, 1].
        causal: whether evaluation must not look ahead.
        predictor_weight: weight of the predictor's loss, >= 0.
    """

    def __init__(
        self,
        block: nn.Module,
        dim: int,
        capacity: float = 0.125,
        causal: bool = True,
        predictor_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.block = block
        self.depth = DepthRouter(dim, capacity, causal, predictor_weight)
        parameters = inspect.signature(block.forward).parameters.values()
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        names = {parameter.name for parameter in parameters}
        self._takes = {name for name in ("mask", "cohorts") if anything or name in names}

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, Routing]:
        """Output of the shape of ``x``, and which tokens went through; its losses include the block's.

        Args:
            x: (..., S, D) floating.
            mask: (..., S) bool, False on padding; None where there is none.
            cohorts: for the expert layers inside the block; None for all.
        """
        out, routing, inner = self.trace(x, mask, cohorts)
        losses = dict(routing.losses)
        for name, loss in (item for held in inner.values() for item in held.losses.items()):
            losses[name] = losses[name] + loss if name in losses else loss
        return out, routing._replace(losses=losses)

    def trace(
        self, x: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, Routing, dict[int, Routing]]:
        """The same, with the block's own routings beside the choice of tokens: ``{0: routing}`` for one."""
        return self.depth(x, mask, partial(self._run, cohorts))

    def _run(self, cohorts: Sequence[int] | None, x_BKD: Tensor, mask: Tensor | None) -> tuple[Tensor, Inner]:
        if mask is not None and "mask" not in self._takes and not self.depth.causal:
            raise InputError(
                got=f"padding for {type(self.block).__name__}, whose forward has no parameter `mask`",
                allowed="a block that takes `mask`, or sequences without padding",
                key="block",
            )
        given = {"mask": mask, "cohorts": cohorts}
        out = self.block(x_BKD, **{name: given[name] for name in given if name in self._takes})
        if isinstance(out, Tensor):
            return out, {}
        out_BKD, held = out
        return out_BKD, {0: held} if isinstance(held, Routing) else held


def _perceptron(layers: nn.Sequential, x: Tensor) -> Tensor:
    """The perceptron in float32 or wider, whatever dtype its weights have."""
    for layer in layers:
        x = F.linear(x, wide(layer.weight), wide(layer.bias)) if isinstance(layer, nn.Linear) else layer(x)
    return x


def _record(chosen_BS: Tensor, r_BS: Tensor, valid_T: Tensor | None, losses: Mapping[str, Tensor]) -> Routing:
    """One pair per token, of the only expert there is: the block."""
    kept_T1, r_T1 = chosen_BS.reshape(-1, 1), r_BS.reshape(-1, 1)
    return Routing(
        expert=torch.zeros_like(kept_T1, dtype=torch.int64),
        weight=r_T1.masked_fill(~kept_T1, 0.0),
        kept=kept_T1,
        num_tokens=kept_T1.shape[0],
        num_experts=1,
        valid=valid_T,
        scores=r_T1,
        losses=losses,
    )


def _lifted(
    routing: Routing, row_M: Tensor, real_BK: Tensor | None, num_tokens: int, valid_T: Tensor | None
) -> Routing:
    """A routing of the chosen tokens as one of all tokens; pairs of places that no token took fall away.

    In compiled code they stay, neither asked nor kept: how many there are must not shape anything.
    """
    token_P, expert_P, weight_P, kept_P = routing.pairs()
    asked_P = None if routing.asked is None else routing.asked.reshape(-1)
    if real_BK is not None and torch.compiler.is_compiling():
        real_P = real_BK.reshape(-1).index_select(0, token_P)
        kept_P, asked_P = kept_P & real_P, real_P if asked_P is None else asked_P & real_P
    elif real_BK is not None:
        real_P = real_BK.reshape(-1)[token_P]
        token_P, expert_P, weight_P, kept_P = (
            column_P[real_P] for column_P in (token_P, expert_P, weight_P, kept_P)
        )
        asked_P = None if asked_P is None else asked_P[real_P]
    scores_TN = None
    if routing.scores is not None:
        scores_MN = routing.scores
        if real_BK is not None:
            scores_MN = scores_MN.masked_fill(~real_BK.reshape(-1, 1), float("-inf"))
        scores_TN = scores_MN.new_full((num_tokens, scores_MN.shape[1]), float("-inf"))
        scores_TN = scores_TN.index_copy(0, row_M, scores_MN)
    return routing._replace(
        expert=expert_P,
        weight=weight_P,
        kept=kept_P,
        num_tokens=num_tokens,
        token=row_M[token_P],
        valid=valid_T,
        scores=scores_TN,
        asked=asked_P,
    )
