"""The dense feed-forward layer, in the shape of an expert layer.

Legend: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.activity import Activity, of_units
from cl_moe.layers.checks import whole
from cl_moe.layers.expert_layer import ExpertLayer
from cl_moe.layers.precision import activation_by_name
from cl_moe.layers.routing import Routing
from cl_moe.layers.tokens import check_fits


class DenseFFN(ExpertLayer):
    """A feed-forward layer without experts: it has no cohorts, so nothing grows it and no policy freezes it.

    Args:
        dim: D, width of input and output.
        hidden: width between its two linear maps; None: a single linear map (the slot of a plain MLP).
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``, between the two.
        glu: a gated linear unit, act(W x) * (V x) between input and output (2002.05202, equation 6); V is
            ``linear_up``. It needs a hidden width.

    Raises:
        InputError: gated, but without a hidden width.
    """

    def __init__(
        self, dim: int, hidden: int | None = None, activation: str = "relu", glu: bool = False
    ) -> None:
        super().__init__()
        if glu and hidden is None:
            raise InputError(
                got="glu=true in a feed-forward layer of a single linear map",
                allowed="a hidden width (layer.hidden), or glu=false",
                key="layer.glu",
            )
        whole("dim", dim, least=1, key="dim")
        if hidden is not None:
            whole("hidden", hidden, least=1, key="layer.hidden")
        self.dim, self.hidden = dim, hidden
        self.activation = activation_by_name(activation)
        self.cohorts = nn.ModuleList()
        self.linear_in = nn.Linear(dim, dim if hidden is None else hidden)
        self.linear_up = nn.Linear(dim, hidden) if glu and hidden is not None else None
        self.linear_out = None if hidden is None else nn.Linear(hidden, dim)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, Routing]:
        """Output of the shape of ``x``, and an empty routing (K = 0, num_experts = 0).

        Args:
            x: (..., D) floating.
            mask: (...) bool, False on padding, where the output is 0.
            cohorts: ignored: a dense layer is of every cohort's age.
        """
        # No router chooses here, so tokens that are not finite need no name: the loss and the logits tell.
        check_fits(x, mask, self.dim, self.linear_in.weight)
        dtype = x.dtype
        if mask is not None:  # whatever stands on padding, even NaN, reaches no gradient
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        x = x.to(self.linear_in.weight.dtype)
        out = self.linear_in(x) if self.linear_out is None else self.linear_out(self._hidden_units(x))
        if mask is not None:
            out = out.masked_fill(~mask.unsqueeze(-1), 0.0)
        out = out.to(dtype)
        return out, _nothing_routed(out, mask)

    @property
    def has_hidden_units(self) -> bool:
        """With two maps."""
        return self.linear_out is not None

    def hidden_activity(self, x: Tensor, routing: Routing) -> Activity | None:
        """Of the units between the two maps, ``hidden`` of them; None for a single map."""
        if self.linear_out is None:
            return None
        return of_units(self._hidden_units(x.to(self.linear_in.weight.dtype)), routing.valid)

    def _hidden_units(self, x: Tensor) -> Tensor:
        """(..., H): what the outer map reads."""
        hidden: Tensor = self.activation(self.linear_in(x))
        return hidden if self.linear_up is None else hidden * self.linear_up(x)

    def grow(
        self, num_experts: int, init: str = "fresh", noise: float = 0.01, load: Tensor | None = None
    ) -> None:
        """Refused: a dense layer has no experts."""
        raise InputError(
            got=f"growth by {num_experts} experts of a dense layer",
            allowed="a layer that has experts (moe, peer), or growth=never",
            key="layer",
        )


def _nothing_routed(x: Tensor, mask: Tensor | None) -> Routing:
    num_tokens = x.shape[:-1].numel()
    return Routing(
        expert=torch.empty(num_tokens, 0, dtype=torch.int64, device=x.device),
        weight=torch.empty(num_tokens, 0, dtype=x.dtype, device=x.device),
        kept=torch.empty(num_tokens, 0, dtype=torch.bool, device=x.device),
        num_tokens=num_tokens,
        num_experts=0,
        valid=None if mask is None else mask.reshape(-1),
    )
