"""What a head asks with: linear queries of a token and their normalisation.

Legend: T tokens, D width, h heads, F = h x key width, Q = T h queries, S = 2 sides, H half of the key width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.batch_norm import MaskedBatchNorm
from cl_moe.layers.checks import whole
from cl_moe.layers.precision import wide
from cl_moe.layers.tokens import Tokens

NORMS = ("batch", "layer", "none")


class Queries(NamedTuple):
    """How many queries a token has, how wide they are, and how they are normalised.

    Args:
        heads: h >= 1.
        k: experts that each head retrieves, >= 1.
        key_dim: width of a query, even.
        norm: ``"batch"``: batch normalisation (1907.05242, section 3.3); ``"layer"``: layer normalisation of
            each head's query; or ``"none"``.
    """

    heads: int
    k: int
    key_dim: int
    norm: str

    def check(self) -> Queries:
        """Itself, if there are such queries."""
        for name in ("heads", "k"):
            whole(name, getattr(self, name), least=1, key=f"layer.{name}")
        if whole("key_dim", self.key_dim, least=1, key="layer.key_dim") % 2:
            raise InputError(
                got=f"key_dim={self.key_dim}", allowed="an even number, at least 2", key="layer.key_dim"
            )
        if self.norm not in NORMS:
            raise InputError(
                got=f"query_norm={self.norm}", allowed=" or ".join(NORMS), key="layer.query_norm"
            )
        return self


class HeadLayerNorm(nn.Module):
    """Layer normalisation (1607.06450) of every head's query over its own features, in float32 or wider.

    Args:
        heads: h.
        key_dim: features of one query; each feature of each head has a scale and a shift.
        eps: added to the variance.
    """

    def __init__(self, heads: int, key_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads, self.key_dim, self.eps = heads, key_dim, eps
        self.weight = nn.Parameter(torch.ones(heads * key_dim))
        self.bias = nn.Parameter(torch.zeros(heads * key_dim))

    def forward(self, x_TF: Tensor, valid_T: Tensor | None = None) -> Tensor:
        """(T, F) normalised, scaled and shifted; ``valid_T`` is not needed: no token sees another."""
        x_ThK = wide(x_TF).reshape(-1, self.heads, self.key_dim)
        normal_ThK = nn.functional.layer_norm(x_ThK, (self.key_dim,), eps=self.eps)
        return normal_ThK.reshape(x_TF.shape) * wide(self.weight) + wide(self.bias)


QueryNorm = MaskedBatchNorm | HeadLayerNorm


def add_query_net(owner: Any, dim: int, queries: Queries) -> None:
    """Give a layer or a cohort its ``query`` and ``query_norm``, drawn from torch's global generator."""
    owner.query = nn.Linear(dim, queries.heads * queries.key_dim)
    owner.query_norm = None
    if queries.norm == "batch":
        owner.query_norm = MaskedBatchNorm(queries.heads * queries.key_dim)
    elif queries.norm == "layer":
        owner.query_norm = HeadLayerNorm(queries.heads, queries.key_dim)


def ask(owner: Any, tokens: Tokens, queries: Queries) -> Tensor:
    """(Q, 2, H) in float32 or wider: token by token, head by head, with the query net of ``owner``."""
    query, norm = owner.query, owner.query_norm
    query_TF = nn.functional.linear(wide(tokens.x), wide(query.weight), wide(query.bias))
    if norm is not None:
        query_TF = norm(query_TF, tokens.valid)
    return query_TF.reshape(-1, 2, queries.key_dim // 2)
