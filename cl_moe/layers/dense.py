"""The dense feed-forward layer, in the shape of an expert layer.

Legend: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.activity import Activity, of_units
from cl_moe.layers.precision import activation_by_name
from cl_moe.layers.routing import ExpertLayer, Routing


class DenseFFN(ExpertLayer):
    """A feed-forward layer without experts: it has no cohorts, so nothing grows it and no policy freezes it.

    Args:
        dim: D, width of input and output.
        hidden: width between its two linear maps; None: a single linear map (the slot of a plain MLP).
        activation: ``"relu"`` or ``"gelu"``, between the two.
    """

    def __init__(self, dim: int, hidden: int | None = None, activation: str = "relu") -> None:
        super().__init__()
        self.dim, self.hidden = dim, hidden
        self.activation = activation_by_name(activation)
        self.cohorts = nn.ModuleList()
        self.linear_in = nn.Linear(dim, dim if hidden is None else hidden)
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
        self.check_input(x, mask)
        out = self.linear_in(x)
        if self.linear_out is not None:
            out = self.linear_out(self.activation(out))
        if mask is not None:
            out = out.masked_fill(~mask.unsqueeze(-1), 0.0)
        return out.to(x.dtype), _nothing_routed(x, mask)

    @property
    def has_hidden_units(self) -> bool:
        """With two maps."""
        return self.linear_out is not None

    def hidden_activity(self, x: Tensor, routing: Routing) -> Activity | None:
        """Of the units between the two maps, ``hidden`` of them; None for a single map."""
        if self.linear_out is None:
            return None
        return of_units(self.activation(self.linear_in(x)), routing.valid)

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
    nothing = _empty_routing(x.shape[:-1].numel(), x.dtype, x.device)
    return nothing if mask is None else nothing._replace(valid=mask.reshape(-1))


@lru_cache(
    maxsize=64
)  # made once per batch size: three allocations are a quarter of a small dense layer's time
def _empty_routing(num_tokens: int, dtype: torch.dtype, device: torch.device) -> Routing:
    with torch.inference_mode(False):  # what an evaluation makes, training may meet
        return Routing(
            expert=torch.empty(num_tokens, 0, dtype=torch.int64, device=device),
            weight=torch.empty(num_tokens, 0, dtype=dtype, device=device),
            kept=torch.empty(num_tokens, 0, dtype=torch.bool, device=device),
            num_tokens=num_tokens,
            num_experts=0,
        )
