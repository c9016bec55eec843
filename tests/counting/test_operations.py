"""What is counted, against formulas by hand: 2 for a multiplication with its addition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_moe.counting import CountFlops
from cl_moe.layers import PEER, PKM, MixtureOfDepths, MoE
from cl_moe.layers.dense import DenseFFN
from cl_moe.layers.retrieval import Retrieval
from cl_moe.layers.routers import ExpertChoice, Switch, TopK
from cl_moe.models.decoder import DecoderLM
from cl_moe.models.mlp import MLPClassifier

T, D, H, N, K = 24, 16, 20, 6, 2


def counted(run: Callable[[], object]) -> int:
    with CountFlops() as count:
        run()
    return count.total


def both_ways(layer: nn.Module, x: Tensor, **options: object) -> tuple[int, int]:
    """FLOPs of the forward pass, and of the backward one."""
    with CountFlops() as count:
        out, routing = layer(x, **options)
    forward = count.total
    loss = out.sum() + sum(routing.losses.values(), torch.zeros(()))
    with CountFlops() as count:
        loss.backward()
    return forward, count.total


def tokens(num: int = T, learns: bool = True) -> Tensor:
    return torch.randn(num, D, generator=torch.Generator().manual_seed(0)).requires_grad_(learns)


def test_a_multilayer_perceptron():
    model = MLPClassifier((64,), 10, partial(DenseFFN, hidden=None), width=32, num_blocks=2)
    model.head.grow(range(10))
    x_BI = torch.randn(8, 64)
    products = [64 * 32, 32 * 32, 32 * 32, 32 * 10]
    forward = 2 * 8 * sum(products)
    with CountFlops() as count:
        logits, _ = model(x_BI)
        assert count.total == forward
        logits.sum().backward()
    # Each product has two gradients, but nobody asks for that of the first one's input.
    assert count.total == 3 * forward - 2 * 8 * products[0]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_pass_takes_the_same_with_and_without_gradients(mode: Callable):
    for layer in (MoE(D, N, H), PEER(D, 16, heads=2, k=3), PKM(D, 16, heads=2, k=3)):
        layer.eval()
        expected = counted(lambda layer=layer: layer(tokens()))
        with mode():
            assert counted(lambda layer=layer: layer(tokens(learns=False))) == expected


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("hidden", [20, 21])  # grouped products want rows of 16 bytes; others take a loop
def test_experts_behind_a_router(k: int, hidden: int):
    layer = MoE(D, N, hidden, router=TopK(D, k=k, balance=0.0))
    router, experts = 2 * T * D * N, 2 * 2 * T * k * D * hidden
    weighting = 2 * T * k * D
    forward, backward = both_ways(layer, tokens())
    assert forward == router + experts + weighting
    assert backward == 2 * forward


def test_frozen_experts_take_no_gradient_of_their_weights():
    layer = MoE(D, N, H, router=TopK(D, k=K, balance=0.0))
    live, live_backward = both_ways(layer, tokens())
    layer.freeze()
    forward, backward = both_ways(layer, tokens())
    assert forward == live
    # Weights and keys keep still; inputs' and gates' gradients pass on.
    assert live_backward - backward == 2 * T * D * N + 2 * 2 * T * K * D * H


def test_nothing_below_learns_and_nothing_passes_on():
    layer = MoE(D, N, H, router=TopK(D, k=K, balance=0.0))
    x = tokens(learns=False)
    forward, backward = both_ways(layer, x)
    first = 2 * T * K * D * H + 2 * T * D * N
    assert backward == 2 * forward - first


def test_what_finds_no_slot_costs_nothing():
    router = Switch(D, capacity_factor=0.25, min_capacity=1, balance=0.0, jitter=0.0)
    layer = MoE(D, N, H, router=router)
    x_BSD = tokens(24).reshape(2, 12, D)
    _, routing = layer(x_BSD)
    kept = int(routing.kept.sum())
    assert 0 < kept < T
    assert counted(lambda: layer(x_BSD)) == 2 * T * D * N + 2 * 2 * kept * D * H + 2 * kept * D


def test_experts_that_choose():
    layer = MoE(D, N, H, router=ExpertChoice(D, capacity_factor=1.5))
    x_BSD = tokens(24).reshape(2, 12, D)
    _, routing = layer(x_BSD)
    kept = int(routing.kept.sum())
    assert kept == 1.5 * T
    assert counted(lambda: layer(x_BSD)) == 2 * T * D * N + 2 * 2 * kept * D * H + 2 * kept * D


def test_padding_reaches_no_expert():
    layer = MoE(D, N, H, router=TopK(D, k=K, balance=0.0))
    mask = torch.arange(T) < 10
    assert (
        counted(lambda: layer(tokens(), mask=mask)) == 2 * T * D * N + 2 * 2 * 10 * K * D * H + 2 * 10 * K * D
    )


def product_keys(heads: int, k: int, size: int, vectors: int, width: int) -> int:
    """Queries, scores of both sides' sub-keys, and ``vectors`` of each retrieved expert."""
    queries, scores = 2 * T * D * heads * width, 2 * T * heads * 2 * size * (width // 2)
    return queries + scores + vectors * 2 * T * heads * k * D


def product_keys_backward(forward: int, heads: int, k: int, size: int, width: int) -> int:
    """All else twice; of the scores only those of retrieved experts, for queries and for sub-keys."""
    halves = 2 * T * heads * 2 * (width // 2)
    return 2 * (forward - halves * size) + 2 * halves * k


@pytest.mark.parametrize("glu", [False, True])
def test_experts_of_one_neuron(glu: bool):
    layer = PEER(D, 49, heads=2, k=3, key_dim=8, glu=glu)
    forward, backward = both_ways(layer, tokens())
    assert forward == product_keys(2, 3, 7, vectors=3 if glu else 2, width=8)
    assert backward == product_keys_backward(forward, 2, 3, 7, width=8)


@pytest.mark.parametrize("keys", ["shared", "per_head"])
def test_a_product_key_memory(keys: str):
    layer = PKM(D, 49, heads=2, k=3, key_dim=8, retrieval=Retrieval(keys=keys))
    forward, backward = both_ways(layer, tokens())
    assert forward == product_keys(2, 3, 7, vectors=1, width=8)
    assert backward == product_keys_backward(forward, 2, 3, 7, width=8)


@pytest.mark.parametrize("policy", ["compete", "sum"])
def test_cohorts_that_compete_take_no_more_and_cohorts_that_add_do(policy: str):
    layer = PEER(D, 16, heads=2, k=3, key_dim=8, retrieval=Retrieval(policy=policy)).eval()
    one = counted(lambda: layer(tokens()))
    layer.grow(16)
    more = counted(lambda: layer(tokens())) - one
    scores, experts = 2 * T * 2 * 2 * 4 * 4, 2 * 2 * T * 2 * 3 * D
    assert more == scores + (experts if policy == "sum" else 0)


def test_a_causal_language_model():
    width, length, batch, vocabulary, blocks = 16, 12, 3, 40, 2
    dense = partial(DenseFFN, hidden=32)
    model = DecoderLM((length,), vocabulary, dense, width, blocks, ffn_hidden=32)
    x_BS = torch.randint(vocabulary, (batch, length))
    rows = batch * length
    products = rows * (blocks * (4 * width**2 + 2 * width * 32) + width * vocabulary)
    attention = blocks * 2 * batch * length**2 * width
    assert counted(lambda: model(x_BS)) == 2 * (products + attention)
    with CountFlops() as count:
        model(x_BS)[0].sum().backward()
    # A flash kernel computes the scores again: 5 products backward for 2 forward; embeddings are rows.
    assert count.total == 2 * (3 * products + (2 + 5) / 2 * attention)


def test_a_block_at_depth_takes_its_share():
    block = DenseFFN(D, H)
    whole = counted(lambda: block(tokens(48).reshape(2, 24, D)))
    depth = MixtureOfDepths(block, D, capacity=0.25, causal=False)
    assert counted(lambda: depth(tokens(48).reshape(2, 24, D))) == 2 * 48 * D + 0.25 * whole


def test_what_else_strategies_compute():
    a, b, m = torch.randn(5), torch.randn(5), torch.randn(3, 5)
    assert counted(lambda: a @ b) == 2 * 5
    assert counted(lambda: m @ a) == 2 * 15
    assert counted(lambda: torch.addmv(torch.zeros(3), m, a)) == 2 * 15
    assert counted(lambda: torch.addr(torch.zeros(5, 5), a, b)) == 2 * 25
    assert counted(lambda: torch.cdist(m, m, compute_mode="donot_use_mm_for_euclid_dist")) == 2 * 9 * 5
    assert counted(lambda: torch.einsum("ij,kj->ik", m, m)) == 2 * 9 * 5
    assert counted(lambda: F.embedding_bag(torch.tensor([[0, 1], [2, 0]]), m, mode="sum")) == 0


def test_what_is_computed_again_counts_again():
    linear = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
    with CountFlops() as count:
        torch.utils.checkpoint.checkpoint(linear, tokens(), use_reentrant=False).sum().backward()
    # 2 products forward, 4 backward, and the first one again: nothing behind the last one's input is needed.
    assert count.total == 7 * 2 * T * D * H


@pytest.mark.parametrize(
    "make",
    [
        lambda: MoE(D, N, H),
        lambda: MoE(D, N, 21, router=Switch(D, jitter=0.1), dropout=0.3, num_shared=1),
        lambda: PEER(D, 16, heads=2, k=3),
        lambda: PKM(D, 16, heads=2, k=3, query_norm="layer"),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_counting_changes_no_bit(make: Callable[[], nn.Module], autocast: bool):
    results = []
    for counts in (False, True):
        torch.manual_seed(0)
        layer, x = make(), tokens()
        with CountFlops() if counts else torch.enable_grad(), torch.autocast("cpu", enabled=autocast):
            out, routing = layer(x)
            (out.float().square().sum() + sum(routing.losses.values(), torch.zeros(()))).backward()
        results.append([out, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers(), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
