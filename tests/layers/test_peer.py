import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_moe.errors import InputError
from cl_moe.layers import PEER, DenseFFN
from cl_moe.layers.product_keys import retrieve, shell_coordinates, shell_index


def queries(layer, x_TD, mask_T=None):
    query = layer.query(x_TD)
    if layer.query_norm is not None:
        query = layer.query_norm(query, mask_T)
    return query.reshape(x_TD.shape[0] * layer.heads, 2, -1)


def all_scores(layer, query_QSH):
    """(Q, N): every expert's score, cohort by cohort, ids for life."""
    scores = []
    for cohort in layer.cohorts:
        row, column = shell_coordinates(torch.arange(cohort.num_experts))
        a, b = query_QSH[:, 0] @ cohort.keys[0].t(), query_QSH[:, 1] @ cohort.keys[1].t()
        scores.append(a[:, row] + b[:, column])
    return torch.cat(scores, dim=1)


def naive(layer, x_TD, mask_T):
    """Brute force over all experts, then one (token, head, expert) after the other."""
    scores = all_scores(layer, queries(layer, x_TD, mask_T)).reshape(x_TD.shape[0], layer.heads, -1)
    u, v = (torch.cat([c.get_parameter(name) for c in layer.cohorts]) for name in "uv")
    rows = []
    for t in range(x_TD.shape[0]):
        out = torch.zeros_like(x_TD[t])
        for h in range(layer.heads if mask_T is None or mask_T[t] else 0):
            best = scores[t, h].topk(layer.k)
            for gate, i in zip(best.values.softmax(-1), best.indices, strict=True):
                out = out + gate * layer.activation(u[i] @ x_TD[t]) * v[i]
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grown", [(), (4, 25)])
@pytest.mark.parametrize("options", [{"activation": "relu", "key_dim": 6}, {"query_norm": "none"}])
def test_forward_and_gradients_equal_brute_force(dtype, grown, options):
    torch.manual_seed(0)
    layer = PEER(8, 16, heads=3, k=5, **options)
    for size in grown:
        layer.grow(size)
    layer = layer.to(dtype)
    x = torch.randn(3, 7, 8, dtype=dtype, requires_grad=True)
    mask = torch.rand(3, 7) > 0.2
    out, routing = layer(x, mask)
    expected = naive(layer, x.reshape(-1, 8), mask.reshape(-1)).reshape(x.shape)
    close = {"atol": 2e-6, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-9}
    torch.testing.assert_close(out, expected, **close)
    probe = torch.randn_like(out)
    tensors = [x, *layer.parameters()]
    ours = torch.autograd.grad((out * probe).sum(), tensors)
    theirs = torch.autograd.grad((expected * probe).sum(), tensors)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **close)
    assert routing.expert.shape == routing.weight.shape == (21, 15)
    assert routing.scores is None
    assert not routing.losses
    real = routing.weight[mask.reshape(-1)].reshape(-1, 3, 5)
    torch.testing.assert_close(real.sum(-1), torch.ones_like(real[..., 0]))


@given(st.data())
def test_retrieval_is_exact_with_its_rule_for_ties(data):
    grid, k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    levels = data.draw(st.sampled_from([2, 3, 1000]))  # few levels: many equal scores
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    query = torch.randint(levels, (4, 2, 3)).to(dtype)
    keys = torch.randint(-levels, levels, (2, grid, 3)).to(dtype)
    found = retrieve(query, keys, k)
    for q in range(4):
        order = []
        for i in range(grid):
            for j in range(grid):
                score = float(query[q, 0] @ keys[0, i] + query[q, 1] @ keys[1, j])
                order.append((-score, max(i, j), i, j, int(shell_index(torch.tensor(i), torch.tensor(j)))))
        expected = sorted(order)[: min(k, grid * grid)]
        assert found.expert[q].tolist() == [e[-1] for e in expected]
        assert found.score[q].tolist() == [-e[0] for e in expected]


@given(st.integers(1, 40), st.integers(0, 2**40))
def test_shell_indices_nest_and_invert(grid, expert):
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    index = shell_index(row, column).flatten()
    assert torch.equal(index.sort().values, torch.arange(grid * grid))
    assert int(shell_index(*shell_coordinates(torch.tensor(expert)))) == expert


def test_fewer_experts_than_retrieved_pairs():
    layer = PEER(8, 4, heads=3, k=4).eval()  # 12 pairs per token over 4 experts
    x = torch.randn(6, 8)
    before, _ = layer(x)
    torch.testing.assert_close(before, naive(layer, x, None))
    layer.grow(9)
    torch.testing.assert_close(layer(x)[0], naive(layer, x, None))
    assert torch.equal(layer(x, cohorts=[0])[0], before)
    with torch.no_grad():
        for cohort in layer.cohorts:
            cohort.keys.zero_()
    assert (layer(x)[1].expert < 4).all()  # all scores equal: the older cohort has room for every choice


def test_one_retrieved_expert_per_head_equals_a_feed_forward_layer_with_a_unit_per_head():
    layer = PEER(8, 25, heads=6, k=1, activation="relu")
    x = torch.randn(10, 8)
    out, routing = layer(x)
    cohort = layer.cohorts[0]
    for t in range(10):
        chosen = routing.expert[t]
        dense = DenseFFN(8, 6)
        with torch.no_grad():
            dense.linear_in.weight.copy_(cohort.u[chosen])
            dense.linear_out.weight.copy_(cohort.v[chosen].t())
            dense.linear_in.bias.zero_()
            dense.linear_out.bias.zero_()
        torch.testing.assert_close(out[t], dense(x[t])[0])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_output_variance_at_the_start_is_that_of_the_dense_layer(activation):
    torch.manual_seed(0)
    x = torch.randn(500, 64)
    dense = DenseFFN(64, 256, activation)
    with torch.no_grad():
        dense.linear_in.bias.zero_()
        dense.linear_out.bias.zero_()
    for heads, k in ((8, 16), (2, 4)):
        layer = PEER(64, 1024, heads, k, activation=activation)
        ratio = layer(x)[0].var() / dense(x)[0].var()
        assert 0.6 < ratio < 1.7


def test_old_experts_win_ties_and_a_head_that_keeps_its_choice_keeps_its_bits():
    torch.manual_seed(0)
    layer = PEER(8, 64, heads=1, k=4).eval()
    x = torch.randn(300, 8)
    before, old = layer(x)
    layer.grow(64, "copy", noise=0.0)
    after, routing = layer(x)
    union = routing.expert.sort(dim=1).values
    assert torch.equal(
        routing.expert[:, 0], old.expert[:, 0]
    )  # the best expert and its twin: the older first
    assert torch.equal(routing.expert[:, 1], old.expert[:, 0] + 64)
    assert (union[:, 2:] >= 64).all()
    layer.cohorts.pop(1)
    layer.grow(16)
    after, routing = layer(x)
    same = (routing.expert < 64).all(dim=1)
    assert same.any()
    assert not same.all()
    assert torch.equal(after[same], before[same])
    assert torch.equal(routing.weight[same], old.weight[same])
    assert torch.equal(layer(x, cohorts=[0])[0], before)
    only_new = layer(x, cohorts=[1])[1]
    assert only_new.expert.min() >= 64
    assert only_new.num_experts == 80


def test_frozen_statistics_stay_and_are_used():
    layer = PEER(8, 16, heads=2, k=3)
    x = torch.randn(50, 8) + 1
    layer(x)
    norm = layer.query_norm
    moved = norm.running_mean.clone()
    assert moved.abs().max() > 0
    layer.freeze(shared=True)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    out, _ = layer.train()(x * 3)
    assert torch.equal(out, layer.eval()(x * 3)[0])
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_padding_is_neutral_even_when_not_a_number():
    layer, twin = (PEER(8, 16, heads=2, k=3) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 8)
    out, routing = layer(x)
    padded = torch.cat([x, torch.full((2, 3, 8), float("nan"))], dim=1).requires_grad_()
    mask = torch.tensor([True] * 5 + [False] * 3).expand(2, 8)
    padded_out, padded_routing = twin(padded, mask)
    assert (padded_out[:, 5:] == 0).all()
    torch.testing.assert_close(padded_out[:, :5], out)
    torch.testing.assert_close(twin.query_norm.running_var, layer.query_norm.running_var)
    assert torch.equal(padded_routing.expert.reshape(2, 8, -1)[:, :5], routing.expert.reshape(2, 5, -1))
    assert torch.equal(padded_routing.kept.any(dim=1), mask.reshape(-1))
    padded_out.sum().backward()
    assert (padded.grad[:, 5:] == 0).all()
    assert all(p.grad.isfinite().all() for p in twin.parameters())


def test_two_runs_are_bit_identical():
    def run():
        torch.manual_seed(3)
        layer = PEER(16, 64, heads=4, k=8)
        layer.grow(64)
        x = torch.randn(4, 32, 16, requires_grad=True)
        out, _ = layer(x)
        out.square().sum().backward()
        return [out, x.grad, *(p.grad for p in layer.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_autocast_leaves_the_layer_in_float32():
    layer = PEER(8, 16, heads=2, k=3).eval()
    x = torch.randn(5, 8)
    plain, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x)[0], plain)
        assert layer(x.bfloat16())[0].dtype == torch.bfloat16


def test_state_names_are_for_life():
    layer = PEER(8, 16)
    layer.grow(4)
    cohorts = [f"cohorts.{c}.{name}" for c in (0, 1) for name in ("keys", "u", "v")]
    shared = ["query.weight", "query.bias"]
    norm = [f"query_norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    assert sorted(layer.state_dict()) == sorted(cohorts + shared + norm)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_experts": 15}, "layer.num_experts"),
        ({"num_experts": 0}, "layer.num_experts"),
        ({"num_experts": 4, "k": 5}, "layer.k"),
        ({"k": 0}, "layer.k"),
        ({"heads": 0}, "layer.heads"),
        ({"key_dim": 7}, "layer.key_dim"),
        ({"query_norm": "rms"}, "layer.query_norm"),
        ({"activation": "tanh"}, "layer.activation"),
    ],
)
def test_wrong_options_name_their_key(options, key):
    with pytest.raises(InputError) as error:
        PEER(8, **options)
    assert error.value.key == key


def test_impossible_growth_and_subsets_name_their_key():
    layer = PEER(8, 16, k=8)
    for size, init in ((5, "fresh"), (25, "copy"), (0, "fresh")):
        with pytest.raises(InputError) as error:
            layer.grow(size, init)
        assert error.value.key == "growth.num_experts"
    layer.grow(4)
    with pytest.raises(InputError, match=r"layer\.k"):
        layer(torch.randn(2, 8), cohorts=[1])
