"""PEER: parameter-efficient expert retrieval from a large pool of tiny experts (2407.04153)."""

from __future__ import annotations

from torch import Tensor

from cl_moe.layers.activity import Activity
from cl_moe.layers.checks import whole
from cl_moe.layers.precision import activation_by_name, no_autocast, wide
from cl_moe.layers.product_key_layer import ProductKeyLayer
from cl_moe.layers.queries import Queries
from cl_moe.layers.retrieval import Retrieval
from cl_moe.layers.routing import Routing
from cl_moe.layers.vector_experts import Dot, expert_activity

# E[act(z)^2] for z ~ N(0, 1), and the output variance of DenseFFN for unit input (see balanced_value_std)
_SECOND_MOMENT = {"relu": 0.5, "gelu": 0.4252, "gelu_tanh": 0.4252, "silu": 0.3558}
_DENSE_VARIANCE = {"relu": 1 / 18, "gelu": 0.0391, "gelu_tanh": 0.0391, "silu": 0.0333}
_SIGMOID_GATE = 0.5  # mean square of sigmoid(score) of the retrieved: their scores start at about 1


class PEER(ProductKeyLayer):
    """Each head retrieves its k best experts by product keys; the output sums g act(u . x) v over them.

    f(x) = sum over heads, sum over the k retrieved i of g_i(x) act(u_i . x) v_i (2407.04153, equations 1 to
    5), g the softmax over a head's k scores; the experts are shared by all heads. With k = 1 and h heads it
    equals a feed-forward layer with h hidden units. Everything else is an option: ``retrieval``.

    Args:
        dim: D, width of input and output.
        num_experts: experts at the start, a square number.
        heads: h, queries per token.
        k: retrieved experts per head, 1 <= k <= experts.
        key_dim: width of a query, even; None: D.
        query_norm: ``"batch"``: batch normalisation of the queries; ``"layer"``: layer normalisation of each
            head's query; or ``"none"``.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        glu: gated experts (2002.05202) of three vectors each, act(u . x) (w . x) v.
        retrieval: who owns keys and queries, the gate, how cohorts live together and grow: see ``Retrieval``;
            None: as the paper, cohorts competing.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int = 1024,
        heads: int = 8,
        k: int = 16,
        key_dim: int | None = None,
        query_norm: str = "batch",
        activation: str = "gelu",
        glu: bool = False,
        retrieval: Retrieval | None = None,
    ) -> None:
        whole("dim", dim, least=1, key="dim")
        retrieval = Retrieval() if retrieval is None else retrieval
        act = activation_by_name(activation)
        queries = Queries(heads, k, dim if key_dim is None else key_dim, query_norm).check()
        inputs = ("u", "w") if glu else ("u",)
        stds = dict.fromkeys(inputs, dim ** (-0.5))
        stds["v"] = balanced_value_std(activation, heads, max(k, 1), retrieval.gate)
        super().__init__(dim, num_experts, queries, retrieval, stds)
        self.activation, self.glu = act, glu

    def coefficients(self, dot: Dot, weight: Tensor) -> Tensor:
        """act(u . x) times the gating weight; with ``glu`` also times w . x."""
        hidden = self.activation(dot("u"))
        if self.glu:
            hidden = hidden * dot("w")
        return hidden * weight

    @property
    def has_hidden_units(self) -> bool:
        """Every expert has."""
        return True

    def hidden_activity(self, x: Tensor, routing: Routing) -> Activity | None:
        """Of every expert, which is one hidden unit, over the tokens that chose it."""
        parts = self._parts(range(len(self.cohorts)))
        with no_autocast(x):
            return expert_activity(wide(x.reshape(-1, self.dim)), routing, parts, self.coefficients)


def balanced_value_std(activation: str, heads: int, k: int, gate: str = "softmax") -> float:
    """Standard deviation s of v with which the output varies as that of the dense layer it replaces.

    The paper does not say how u and v start. Here u (and w) ~ N(0, 1/D), so that u . x has the variance of
    x's entries, and v ~ N(0, s^2). For x of unit variance the dense layer (``DenseFFN``, ``nn.Linear``'s
    U(+-1/sqrt(fan_in)), weights of variance 1/(3 fan_in)) has hidden pre-activations of variance 1/3 and,
    whatever its hidden width, outputs of variance E[act(z / sqrt 3)^2] / 3: 1/18 for relu, .0391 for gelu,
    .0333 for silu. PEER sums, over h heads, k terms g act(u . x) v: variance h k E[g^2] E[act(z)^2] s^2,
    where E[act(z)^2] is .5 for relu, .4252 for gelu and .3558 for silu (w . x of a gated expert has variance
    1 and changes nothing). With a softmax the k weights sum to 1 and, while scores are alike, E[g^2] =
    1/k^2; sigmoids are not bound to a sum, and E[g^2] is about 1/2.
    """
    if gate == "softmax":
        return (_DENSE_VARIANCE[activation] * k / (heads * _SECOND_MOMENT[activation])) ** 0.5
    return (_DENSE_VARIANCE[activation] / (heads * k * _SIGMOID_GATE * _SECOND_MOMENT[activation])) ** 0.5
