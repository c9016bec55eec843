"""Experts that every token passes.

Legend: T tokens, D width, H hidden width, n shared experts; I is D in the experts' dtype.
"""

from __future__ import annotations

from torch import Tensor, nn

from cl_moe.layers.activity import Activity, of_units
from cl_moe.layers.experts import uniform
from cl_moe.layers.precision import activation_by_name


class SharedExperts(nn.Module):
    """Experts that every token passes, whatever the router says (DeepSeekMoE, 2401.06066, equation 9).

    The sum of n feed-forward experts of hidden width H is one of width n H, and is computed as one. Each
    starts as an expert of a ``Cohort`` does.

    Args:
        dim: D, width of input and output.
        num_shared: n.
        hidden: H.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        bias: whether the maps have biases.
        dropout: of the hidden neurons while training, in [0, 1).
        glu: whether they are gated, as in ``Cohort``.
    """

    def __init__(
        self,
        dim: int,
        num_shared: int,
        hidden: int,
        activation: str,
        bias: bool,
        dropout: float,
        glu: bool = False,
    ) -> None:
        super().__init__()
        self.activation, self.dropout = activation_by_name(activation), dropout
        self.w_in = uniform((dim, num_shared * hidden), fan_in=dim)
        self.b_in = uniform((num_shared * hidden,), fan_in=dim) if bias else None
        self.w_up = uniform((dim, num_shared * hidden), fan_in=dim) if glu else None
        self.b_up = uniform((num_shared * hidden,), fan_in=dim) if glu and bias else None
        self.w_out = uniform((num_shared * hidden, dim), fan_in=hidden)
        self.b_out = uniform((num_shared, dim), fan_in=hidden) if bias else None

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None) -> Tensor:
        """(T, D) in the dtype of ``x_TD``; 0 on padding."""
        hidden_TH = self.hidden_units(x_TD)
        if self.dropout > 0:
            hidden_TH = nn.functional.dropout(hidden_TH, self.dropout, self.training)
        bias_D = None if self.b_out is None else self.b_out.sum(dim=0)
        out_TD = nn.functional.linear(hidden_TH, self.w_out.t(), bias_D)
        if valid_T is not None:
            out_TD = out_TD.masked_fill(~valid_T.unsqueeze(-1), 0.0)
        return out_TD.to(x_TD.dtype)

    def hidden_units(self, x_TD: Tensor) -> Tensor:
        """(T, n H): what the outer map reads, before dropout."""
        x_TI = x_TD.to(self.w_in.dtype)
        hidden_TH: Tensor = self.activation(nn.functional.linear(x_TI, self.w_in.t(), self.b_in))
        if self.w_up is None:
            return hidden_TH
        return hidden_TH * nn.functional.linear(x_TI, self.w_up.t(), self.b_up)

    def hidden_activity(self, x_TD: Tensor, valid_T: Tensor | None) -> Activity:
        """Of all n H units, which every real token reaches."""
        return of_units(self.hidden_units(x_TD), valid_T)
