import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_moe.errors import InputError
from cl_moe.layers import DenseFFN, ExpertPool, GShard, MoE, Routing, Scores, Switch, TopK


def naive(layer, x_TD, mask_T, k, gates_over_all, kept=None):
    """One token after the other, one expert after the other."""
    weights = [(c, e) for c in layer.cohorts for e in range(c.num_experts)]
    rows = []
    for t in range(x_TD.shape[0]):
        out = torch.zeros_like(x_TD[t])
        if mask_T[t]:
            logit = torch.stack([c.key[e] @ x_TD[t] for c, e in weights])
            chosen = sorted(range(len(weights)), key=lambda i: (-logit[i].item(), i))[:k]
            total = logit.exp().sum() if gates_over_all else logit[chosen].exp().sum()
            for i in chosen:
                c, e = weights[i]
                hidden = x_TD[t] @ c.w_in[e] + (0 if c.b_in is None else c.b_in[e])
                value = c.activation(hidden) @ c.w_out[e] + (0 if c.b_out is None else c.b_out[e])
                if kept is None or kept[t]:
                    out = out + logit[i].exp() / total * value
        rows.append(out)
    return torch.stack(rows)


def gradients(layer, x, out):
    tensors = [x, *layer.parameters()]
    probe = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).reshape(out.shape)
    return torch.autograd.grad((out * probe).sum(), tensors, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("dim", "hidden", "bias", "activation"), [(8, 12, True, "gelu"), (5, 7, False, "relu")]
)
@pytest.mark.parametrize("normalize", ["selected", "all"])
def test_forward_and_gradients_equal_a_loop_over_tokens(dtype, dim, hidden, bias, activation, normalize):
    torch.manual_seed(0)
    layer = MoE(dim, 3, hidden, lambda dim: TopK(dim, 2, normalize), activation, bias)
    layer.grow(4)
    layer = layer.to(dtype)
    x = torch.randn(2, 9, dim, dtype=dtype, requires_grad=True)
    mask = torch.rand(2, 9) > 0.2
    out, routing = layer(x, mask)
    expected = naive(layer, x.reshape(-1, dim), mask.reshape(-1), 2, normalize == "all").reshape(x.shape)
    close = {"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-10}
    torch.testing.assert_close(out, expected, **close)
    for ours, theirs in zip(gradients(layer, x, out), gradients(layer, x, expected), strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    assert routing.expert.shape == (18, 2)
    assert not routing.kept[~mask.reshape(-1)].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_switch_with_drops_equals_a_loop_over_tokens(dtype):
    torch.manual_seed(0)
    layer = MoE(8, 4, 8, lambda dim: Switch(dim, min_capacity=1, eval_capacity_factor=0.7)).to(dtype).eval()
    x = torch.randn(3, 8, 8, dtype=dtype, requires_grad=True)
    mask = torch.rand(3, 8) > 0.2
    out, routing = layer(x, mask)
    assert (~routing.kept[mask.reshape(-1)]).any()
    expected = naive(layer, x.reshape(-1, 8), mask.reshape(-1), 1, True, routing.kept[:, 0]).reshape(x.shape)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(gradients(layer, x, out), gradients(layer, x, expected), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert out[~routing.kept.reshape(3, 8)].abs().max() == 0


def test_one_expert_equals_the_dense_layer():
    dense = DenseFFN(8, 16)
    for router in (Switch, lambda dim: TopK(dim, 1, "selected"), lambda dim: TopK(dim, 1, "all")):
        layer = MoE(8, 1, 16, router).eval()
        cohort = layer.cohorts[0]
        with torch.no_grad():
            cohort.w_in[0], cohort.b_in[0] = dense.linear_in.weight.t(), dense.linear_in.bias
            cohort.w_out[0], cohort.b_out[0] = dense.linear_out.weight.t(), dense.linear_out.bias
        x = torch.randn(4, 6, 8)
        out, routing = layer(x)
        torch.testing.assert_close(out, dense(x)[0])
        assert (routing.weight == 1).all()


def test_all_experts_chosen_is_the_softmax_weighted_sum():
    layer = MoE(8, 5, 8, lambda dim: TopK(dim, 5))
    x = torch.randn(7, 8)
    out, _ = layer(x)
    c = layer.cohorts[0]
    hidden = torch.relu(torch.einsum("td,edh->teh", x, c.w_in) + c.b_in)
    values = torch.einsum("teh,ehd->ted", hidden, c.w_out) + c.b_out
    gates = (x @ c.key.t()).softmax(dim=-1)
    torch.testing.assert_close(out, torch.einsum("te,ted->td", gates, values))


def test_a_ragged_routing_equals_the_regular_one():
    layer = MoE(8, 4, 8)
    x = torch.randn(6, 8, requires_grad=True)
    out, routing = layer(x)
    token, expert, weight, kept = routing.pairs()
    shuffle = torch.randperm(token.numel())
    ragged = Routing(expert[shuffle], weight[shuffle], kept[shuffle], 6, 4, token=token[shuffle])
    torch.testing.assert_close(layer.cohorts(x, ragged), out)


@given(st.data())
def test_the_fast_path_equals_the_loop_for_any_choice(data):
    num_tokens, k = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 3))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    last = data.draw(st.integers(0, sum(sizes) - 1))  # 0: all tokens to one expert, later ones empty
    torch.manual_seed(data.draw(st.integers(0, 9)))
    layer = MoE(4, sizes[0], 4, lambda dim: TopK(dim, 1))
    for size in sizes[1:]:
        layer.grow(size)
    expert = torch.randint(last + 1, (num_tokens, k))
    kept = torch.rand(num_tokens, k) > 0.3
    weight = torch.randn(num_tokens, k).masked_fill(~kept, 0)
    routing = Routing(expert, weight, kept, num_tokens, sum(sizes))
    x = torch.randn(num_tokens, 4, requires_grad=True)
    fast = layer.cohorts(x, routing)
    fast.sum().backward()
    fast_grad, x.grad = x.grad, None
    slow = layer.double().cohorts(x.double(), routing)  # float64 takes the loop over experts
    slow.sum().backward()
    torch.testing.assert_close(fast, slow.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast_grad, x.grad, atol=1e-5, rtol=1e-4)


def test_padding_is_neutral_even_when_not_a_number():
    for router in (lambda dim: Switch(dim, min_capacity=1, jitter=0), lambda dim: TopK(dim, 2, z_loss=1.0)):
        layer = MoE(8, 4, 8, router)
        x = torch.randn(2, 5, 8)
        out, routing = layer(x)
        padded = torch.cat([x, torch.full((2, 3, 8), float("nan"))], dim=1)
        mask = torch.tensor([True] * 5 + [False] * 3).expand(2, 8)
        padded_out, padded_routing = layer(padded, mask)
        assert (padded_out[:, 5:] == 0).all()
        torch.testing.assert_close(padded_out[:, :5], out)
        for name, loss in routing.losses.items():
            torch.testing.assert_close(padded_routing.losses[name], loss)
        assert torch.equal(padded_routing.kept.reshape(2, 8, -1)[:, :5], routing.kept.reshape(2, 5, -1))


@pytest.mark.parametrize("router", [Switch, TopK])
def test_two_runs_are_bit_identical(router):
    def run():
        torch.manual_seed(3)
        layer = MoE(16, 6, 16, router)
        x = torch.randn(4, 32, 16, requires_grad=True)
        out, routing = layer(x)
        (out.square().sum() + sum(routing.losses.values())).backward()
        return [out, x.grad, *(p.grad for p in layer.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_autocast_computes_experts_in_bfloat16_and_routes_in_float32():
    layer = MoE(16, 4, 16)
    x = torch.randn(3, 8, 16, requires_grad=True)
    plain, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out, routing = layer(x)
    assert routing.scores.dtype == torch.float32
    assert out.dtype == torch.float32
    assert torch.equal(routing.scores, layer(x)[1].scores)
    assert not torch.equal(out, plain)
    torch.testing.assert_close(out, plain, atol=0.02, rtol=0.05)
    out.sum().backward()
    assert layer.cohorts[0].w_in.grad.dtype == torch.float32


@pytest.mark.parametrize("router", [TopK, Switch, GShard])
def test_a_router_in_bfloat16_computes_scores_and_gates_there(router):
    layer = MoE(16, 4, 16, lambda dim: router(dim, scores=Scores(precision="bfloat16"))).eval()
    x = torch.randn(3, 8, 16)
    out, routing = layer(x)
    scores = torch.nn.functional.linear(x.bfloat16(), layer.cohorts[0].key.bfloat16()).flatten(0, 1)
    assert torch.equal(routing.scores, scores.float())
    assert torch.equal(routing.weight, routing.weight.bfloat16().float())
    assert out.dtype == torch.float32
    sum(routing.losses.values(), out.sum()).backward()
    assert layer.cohorts[0].key.grad.abs().sum() > 0
    with pytest.raises(InputError, match=r"router\.scores\.precision"):
        Scores(precision="float16")


def test_state_names_are_for_life():
    layer = MoE(8, 4, 8)
    layer.grow(2)
    names = [f"cohorts.{c}.{name}" for c in (0, 1) for name in ("w_in", "b_in", "w_out", "b_out", "key")]
    assert sorted(layer.state_dict()) == sorted(names)
    assert isinstance(layer.cohorts, ExpertPool)
    assert isinstance(layer.cohorts[1:], ExpertPool)


def test_wrong_input_is_refused():
    layer = MoE(8, 4, 8)
    layer.grow(1)
    x = torch.randn(3, 8)
    with pytest.raises(InputError, match=r"router\.k"):
        MoE(8, 1, 8)
    with pytest.raises(InputError, match=r"router\.k"):
        layer(x, cohorts=[1])
    for bad in ([], [0, 0], [2], [-1]):
        with pytest.raises(InputError, match="cohorts"):
            layer(x, cohorts=bad)
    with pytest.raises(InputError, match="mask"):
        layer(x, mask=torch.ones(3))
    with pytest.raises(InputError, match="dim"):
        layer(torch.randn(3, 7))
    with pytest.raises(InputError, match=r"layer\.activation"):
        MoE(8, activation="tanh")
