"""Every router with MoE against loops over tokens, choices and experts: forward, losses and gradients."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_moe.layers import Capacity, ExpertChoice, GShard, MoE, Scores, Switch, TopK

TIGHT = Capacity(0.8, 0.8, 1)
ROUTERS = {
    "switch": partial(Switch, jitter=0, capacity_factor=0.8, min_capacity=1),
    "switch_sigmoid": partial(Switch, jitter=0, min_capacity=1, scores=Scores("sigmoid")),
    "top_k": partial(TopK, k=2, z_loss=0.1),
    "top_k_all": partial(TopK, k=3, normalize="all"),
    "top_k_sigmoid": partial(TopK, k=2, scores=Scores("sigmoid", 1e-3)),
    "top_k_sigmoid_all": partial(TopK, k=2, normalize="all", scores=Scores("sigmoid")),
    "top_k_softmax_biased": partial(TopK, k=2, scores=Scores("softmax", 1e-3)),
    "gshard": partial(GShard, second="all", capacity=TIGHT),
    "gshard_threshold": partial(GShard, second="threshold", threshold=0.4, capacity=TIGHT),
    "gshard_none": partial(GShard, second="none", capacity=Capacity(0.5, 0.5, 0, "floor")),
    "gshard_sigmoid": partial(GShard, second="all", scores=Scores("sigmoid", 1e-3)),
    "expert_choice": partial(ExpertChoice, capacity_factor=1.3, z_loss=0.1),
    "expert_choice_floor": partial(ExpertChoice, capacity_factor=1.7, rounding="floor"),
}


def build(name, dim=4, sizes=(3, 2), seed=0, **options):
    torch.manual_seed(seed)
    layer = MoE(dim, sizes[0], 4, ROUTERS[name], **options)
    for size in sizes[1:]:
        layer.grow(size)
    for cohort in layer.cohorts:
        if cohort.selection_bias is not None:  # as after many steps
            cohort.selection_bias.uniform_(-0.3, 0.3)
    return layer


def slots(real, factor, experts, rounding):
    return getattr(math, rounding)(round(real * factor / experts, 9))


def score_rows(router, logits):
    """Score and score-for-choosing of one token's experts."""
    exps = [x.exp() for x in logits]
    if router.scores.function == "sigmoid":
        return [1 / (1 + (-x).exp()) for x in logits]
    return [e / sum(exps) for e in exps]


def choices(router, tokens, biases, training):
    """``[(position, expert, gate)]`` and ``[(position, expert)]`` for the balance loss, of one sequence."""
    scores = [score_rows(router, logits) for logits in tokens]
    num = len(biases)
    if isinstance(router, ExpertChoice):
        take = slots(len(tokens), router.capacity_factor, num, router.rounding)
        pairs = []
        for e in range(num):
            best = sorted(range(len(tokens)), key=lambda t: (-scores[t][e].item(), t))[:take]
            pairs += [(t, e, scores[t][e]) for t in best]
        return pairs, []
    k = {Switch: 1, GShard: 2}.get(type(router)) or router.k
    ranked = [sorted(range(num), key=lambda e: (-row[e].item() - biases[e], e))[:k] for row in scores]
    normal = isinstance(router, GShard) or getattr(router, "normalize", "all") == "selected"
    sums = [sum(row[e] for e in best) if normal else 1.0 for row, best in zip(scores, ranked, strict=True)]
    capacity, taken, pairs = math.inf, [0] * num, []
    if isinstance(router, Switch | GShard):
        c = router.capacity
        factor = c.factor if training else c.eval_factor
        capacity = max(c.min_slots, slots(len(tokens), factor, num, c.rounding))
    for turn in range(k):
        for t, best in enumerate(ranked):
            gate = scores[t][best[turn]] / sums[t]
            if turn == 1 and isinstance(router, GShard):
                asked = {"all": True, "none": False, "threshold": gate > router.threshold}[router.second]
                if not asked:
                    continue
            if taken[best[turn]] < capacity:
                taken[best[turn]] += 1
                pairs.append((t, best[turn], gate))
    counted = 1 if isinstance(router, GShard) else k
    return pairs, [(t, e) for t, best in enumerate(ranked) for e in best[:counted]]


def naive(layer, x_GSD, mask_GS, cohorts=None):
    """Output, number of pairs kept, and auxiliary losses."""
    chosen = [c for i, c in enumerate(layer.cohorts) if cohorts is None or i in cohorts]
    experts = [(c, e) for c in chosen for e in range(c.num_experts)]
    biases = [0.0 if c.selection_bias is None else c.selection_bias[e].item() for c, e in experts]
    out, computed, counted, shares, squares = torch.zeros_like(x_GSD), 0, [], [], []
    rows = [list(row) for row in out]
    for g in range(x_GSD.shape[0]):
        real = [s for s in range(x_GSD.shape[1]) if mask_GS[g, s]]
        tokens = [[(c.key[e] * x_GSD[g, s]).sum() for c, e in experts] for s in real]
        pairs, choice = choices(layer.router, tokens, biases, layer.training)
        for t, index, gate in pairs:
            c, e = experts[index]
            if e >= len(c.w_in):  # a no-op: it has a key and adds nothing
                continue
            hidden = c.activation(x_GSD[g, real[t]] @ c.w_in[e] + c.b_in[e])
            if c.w_up is not None:
                hidden = hidden * (x_GSD[g, real[t]] @ c.w_up[e] + c.b_up[e])
            rows[g][real[t]] = rows[g][real[t]] + gate * (hidden @ c.w_out[e] + c.b_out[e])
        computed += len(pairs)
        for t, logits in enumerate(tokens):
            row = score_rows(layer.router, logits)
            squares.append(sum(x.exp() for x in logits).log() ** 2)
            counted += [e for u, e in choice if u == t]
            shares += [[s / sum(row) for s in row]] * sum(u == t for u, _ in choice)
    losses = {}
    if layer.router.balance and counted:
        share = [counted.count(e) / len(counted) for e in range(len(experts))]
        mean = [sum(row[e] for row in shares) / len(shares) for e in range(len(experts))]
        product = sum(f * p for f, p in zip(share, mean, strict=True))
        losses["balance"] = layer.router.balance * len(experts) * product
    if layer.router.z_loss and squares:
        losses["z_loss"] = layer.router.z_loss * sum(squares) / len(squares)
    return torch.stack([torch.stack(row) for row in rows]), computed, losses


def gradients(layer, x, out, losses):
    probe = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).reshape(out.shape)
    total = (out * probe).sum() + sum(losses.values())
    tensors = [x, *layer.parameters()]
    return torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"num_noops": 2}, {"glu": True, "activation": "silu"}], ids=["plain", "noops", "glu"]
)
@pytest.mark.parametrize("name", ROUTERS)
def test_forward_losses_and_gradients_equal_the_loops(name, options, dtype):
    layer = build(name, **options).to(dtype)
    x = torch.randn(2, 7, 4, dtype=dtype, requires_grad=True)
    mask = torch.rand(2, 7) > 0.2
    out, routing = layer(x, mask)
    expected, computed, losses = naive(layer, x, mask)
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-9}
    torch.testing.assert_close(out, expected, **close)
    assert int(routing.kept.sum()) == computed
    assert routing.losses.keys() == losses.keys()
    for key, loss in losses.items():
        torch.testing.assert_close(routing.losses[key], loss, **close)
    ours, theirs = gradients(layer, x, out, routing.losses), gradients(layer, x, expected, losses)
    for mine, oracle in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, oracle, **close)
    assert out[~mask].abs().sum() == 0


@settings(max_examples=60)
@given(st.data())
def test_any_shape_mask_and_crowd_equals_the_loops(data):
    name = data.draw(st.sampled_from(sorted(ROUTERS)))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=0, max_size=2))
    options = {"num_noops": data.draw(st.integers(0, 2)), "glu": data.draw(st.booleans())}
    layer = build(name, sizes=(3, *sizes), seed=data.draw(st.integers(0, 9)), **options)
    layer.train(data.draw(st.booleans()))
    groups, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    if data.draw(st.booleans()):  # all tokens to one expert, most experts empty
        with torch.no_grad():
            layer.cohorts[-1].key[data.draw(st.sampled_from([0, -1]))] = 3.0
    x = torch.rand(groups, length, 4) + 0.1 if data.draw(st.booleans()) else torch.randn(groups, length, 4)
    mask = torch.rand(groups, length) > data.draw(st.sampled_from([-1.0, 0.4, 1.0]))
    cohorts = [0, *data.draw(st.sets(st.integers(1, max(len(sizes), 1)), max_size=len(sizes)))]
    if data.draw(st.booleans()):
        layer, x = layer.double(), x.double()
    if length == 1 and name not in ("gshard_none", "expert_choice_floor") and data.draw(st.booleans()):
        out, routing = layer(x[:, 0], mask[:, 0], cohorts)  # single tokens
        out = out.unsqueeze(1)
    else:
        out, routing = layer(x, mask, cohorts)
    expected, computed, losses = naive(layer, x, mask, cohorts)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert int(routing.kept.sum()) == computed
    for key, loss in routing.losses.items():
        expected = torch.as_tensor(losses.get(key, 0.0)).to(loss)
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_shared": 1}, {"glu": True, "num_noops": 1}])
@pytest.mark.parametrize("name", ROUTERS)
def test_bfloat16_weights_choose_as_the_same_in_float32_and_compute_close_to_them(name, options):
    layer = build(name, **options).to(torch.bfloat16)
    wide = build(name, **options)
    wide.load_state_dict({key: value.float() for key, value in layer.state_dict().items()})
    x = torch.randn(2, 9, 4).bfloat16()
    mask = torch.rand(2, 9) > 0.2
    (out, routing), (expected, same) = layer(x, mask), wide(x.float(), mask)
    assert out.dtype == torch.bfloat16
    assert torch.equal(routing.expert, same.expert)
    assert torch.equal(routing.kept, same.kept)
    assert torch.equal(routing.weight, same.weight)
    torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_changes_nothing_even_when_not_a_number(name):
    layer = build(name)
    x = torch.randn(2, 5, 4)
    out, routing = layer(x)
    padded = torch.cat([x, torch.full((2, 3, 4), float("nan"))], dim=1)
    padded_out, padded_routing = layer(padded, torch.tensor([True] * 5 + [False] * 3).expand(2, 8))
    torch.testing.assert_close(padded_out[:, :5], out)
    assert (padded_out[:, 5:] == 0).all()
    assert int(padded_routing.kept.sum()) == int(routing.kept.sum())
    for key, loss in routing.losses.items():
        torch.testing.assert_close(padded_routing.losses[key], loss)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_balanced_router_pays_its_weight(name):
    layer = build(name, sizes=(4,))
    with torch.no_grad():  # all logits 0: uniform, whatever is chosen
        layer.cohorts[0].key.zero_()
    losses = layer(torch.randn(2, 6, 4))[1].losses
    if layer.router.balance:
        torch.testing.assert_close(losses["balance"], torch.tensor(layer.router.balance))
    else:
        assert "balance" not in losses
        assert isinstance(layer.router, ExpertChoice)


@pytest.mark.parametrize("name", ROUTERS)
def test_two_runs_are_bit_identical(name):
    def run():
        layer = build(name)
        x = torch.randn(2, 9, 4, requires_grad=True)
        out, routing = layer(x)
        return [out, *gradients(layer, x, out, routing.losses)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("name", ROUTERS)
def test_autocast_leaves_the_router_in_float32(name):
    layer = build(name)
    x = torch.randn(2, 9, 4)
    _, plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out, routing = layer(x)
    for name in ("scores", "weight", "expert", "kept"):
        assert torch.equal(getattr(routing, name), getattr(plain, name))
    assert routing.scores.dtype == routing.weight.dtype == torch.float32
    assert all(torch.equal(loss, plain.losses[key]) for key, loss in routing.losses.items())
    assert out.dtype == torch.float32
