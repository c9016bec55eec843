"""PEER's experts: single neurons on a product-key grid.

Legend: D width, H half of the key width, m grid size, n = m^2 experts of one cohort.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl_moe.layers.product_keys import grid_size, shell_coordinates, shell_index
from cl_moe.layers.routing import most_used, noisy_copy

# E[act(z)^2] for z ~ N(0, 1), and the output variance of DenseFFN for unit input (see PEERCohort)
_SECOND_MOMENT = {"relu": 0.5, "gelu": 0.4252}
_DENSE_VARIANCE = {"relu": 1 / 18, "gelu": 0.0391}


def balanced_value_std(activation: str, heads: int, k: int) -> float:
    """The s of ``PEERCohort``: output variance as of the dense layer it replaces."""
    return (_DENSE_VARIANCE[activation] * k / (heads * _SECOND_MOMENT[activation])) ** 0.5


class PEERCohort(nn.Module):
    """A product-key grid of single-neuron experts born together: e(x) = act(u . x) v.

    The paper does not say how u and v start. Here u ~ N(0, 1/D), so that u . x has the variance of x's
    entries, and v ~ N(0, s^2) with s such that the layer's output variance is that of the dense layer it
    replaces. For x of unit variance that layer (``DenseFFN``, ``nn.Linear``'s U(+-1/sqrt(fan_in)), weights of
    variance 1/(3 fan_in)) has hidden pre-activations of variance 1/3 and, whatever its hidden width, outputs
    of variance E[act(z / sqrt 3)^2] / 3: 1/18 for relu, .0391 for gelu. PEER sums, over h heads, k terms
    g act(u . x) v with sum g = 1 and, while scores are alike, sum g^2 = 1/k: variance
    h / k E[act(z)^2] s^2, with E[act(z)^2] = .5 for relu and .4252 for gelu. So s^2 is the dense variance
    times k / (h E[act(z)^2]).

    Sub-keys ~ U(+-1/sqrt(H)), as in the authors' code for product-key memories (1907.05242).

    Args:
        dim: D.
        num_experts: n = m^2.
        key_dim: 2 H.
        value_std: s.
    """

    def __init__(self, dim: int, num_experts: int, key_dim: int, value_std: float) -> None:
        super().__init__()
        self.num_experts = num_experts
        half, grid = key_dim // 2, grid_size(num_experts, key="layer.num_experts")
        self.keys = nn.Parameter(torch.empty(2, grid, half).uniform_(-(half**-0.5), half**-0.5))
        self.u = nn.Parameter(torch.randn(num_experts, dim) * dim**-0.5)
        self.v = nn.Parameter(torch.randn(num_experts, dim) * value_std)

    @torch.no_grad()
    def copy_most_used(self, source: PEERCohort, load_n: Tensor, noise: float) -> None:
        """Become the part of a grid at least as large where its most used rows and columns cross, plus noise.

        Args:
            source: the cohort to copy from.
            load_n: (n,) load of its experts; summed over a row or column it ranks that, ties: the lower one.
            noise: standard deviation of the noise, relative to the copied tensor's own.
        """
        row_n, column_n = shell_coordinates(torch.arange(source.num_experts))
        sides = []
        for side, at_n in enumerate((row_n, column_n)):
            use_m = load_n.new_zeros(source.keys.shape[1]).index_add(0, at_n, load_n)
            best = most_used(use_m, use_m.numel(), use_m.device)[: self.keys.shape[1]]
            sides.append(best)
            self.keys[side] = noisy_copy(source.keys[side][best.to(source.keys.device)], noise)
        row, column = shell_coordinates(torch.arange(self.num_experts))
        crossing = shell_index(sides[0][row], sides[1][column]).to(source.u.device)
        self.u.copy_(noisy_copy(source.u[crossing], noise))
        self.v.copy_(noisy_copy(source.v[crossing], noise))
