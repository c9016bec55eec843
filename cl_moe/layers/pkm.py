"""PKM: large memory layers with product keys (1907.05242)."""

from __future__ import annotations

from torch import Tensor

from cl_moe.layers.checks import whole
from cl_moe.layers.product_key_layer import ProductKeyLayer
from cl_moe.layers.queries import Queries
from cl_moe.layers.retrieval import Retrieval
from cl_moe.layers.vector_experts import Dot

PKM_RETRIEVAL = Retrieval(keys="per_head")


class PKM(ProductKeyLayer):
    """Each head retrieves the k memory slots whose keys fit its query best, and reads their values.

    m(x) = sum over heads, sum over the k retrieved i of w_i v_i, w the softmax over a head's k scores
    (1907.05242, equations 1 to 3 and section 3.3). As in the authors' code: the query net is one linear map
    with batch normalisation, sub-keys are each head's own and start at U(+-1/sqrt(H)), H half of the query's
    width; values are shared by all heads and start at N(0, 1/D). The paper adds the layer to, or puts it in
    the place of, a feed-forward layer; it has no activation of its own. It grows and freezes as PEER does: a
    slot counts as an expert.

    Args:
        dim: D, width of input and output, and of a value.
        num_experts: slots at the start, a square number; the paper has 512^2.
        heads: h, queries per token.
        k: neighbours that each head retrieves, 1 <= k <= slots.
        key_dim: width of a query, even; None: D.
        query_norm: ``"batch"``, ``"layer"`` (of each head's query) or ``"none"``.
        retrieval: see ``Retrieval``; None: keys per head, cohorts competing.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int = 1024,
        heads: int = 4,
        k: int = 32,
        key_dim: int | None = None,
        query_norm: str = "batch",
        retrieval: Retrieval | None = None,
    ) -> None:
        whole("dim", dim, least=1, key="dim")
        queries = Queries(heads, k, dim if key_dim is None else key_dim, query_norm)
        retrieval = PKM_RETRIEVAL if retrieval is None else retrieval
        super().__init__(dim, num_experts, queries, retrieval, {"v": dim**-0.5})

    def coefficients(self, dot: Dot, weight: Tensor) -> Tensor:
        """The gating weight itself: a slot does not look at the token again."""
        return weight
