"""PEER and product-key memories with every option, against a loop over tokens, heads and experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_moe.errors import InputError
from cl_moe.layers import PEER, PKM, DenseFFN, Retrieval, fold_load
from cl_moe.layers.product_keys import Block, search, shell_blocks, shell_coordinates
from tests.layers.product_key_oracle import EVERY, OPTIONS, all_scores, make, naive, name_of, newborns

KINDS = ("peer", "peer glu", "pkm")


@pytest.mark.parametrize("retrieval", EVERY, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_and_every_gradient_equal_a_loop(retrieval, dtype):
    torch.manual_seed(0)
    kind, norm = (
        KINDS[EVERY.index(retrieval) % 3],
        ("batch", "layer", "none")[EVERY.index(retrieval) // 3 % 3],
    )
    layer = make(kind, retrieval, query_norm=norm)
    for rows in (1, 2):
        layer.grow(newborns(layer, rows))
    layer = layer.to(dtype)
    x = torch.randn(2, 4, 6, dtype=dtype, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    out, routing = layer(x, mask)
    expected = naive(layer, x.reshape(-1, 6), mask.reshape(-1)).reshape(x.shape)
    close = {"atol": 3e-6, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-9}
    torch.testing.assert_close(out, expected, **close)
    probe = torch.randn_like(out)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    ours = torch.autograd.grad((out * probe).sum(), [x, *parameters])
    theirs = torch.autograd.grad(
        (expected * probe).sum(), [x, *parameters], allow_unused=True, materialize_grads=True
    )
    for name, a, b in zip(("x", *names), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **close, msg=lambda text, name=name: f"{name}: {text}")
    times = 3 if retrieval.policy == "sum" else 1
    assert routing.expert.shape == routing.weight.shape == (8, 6 * times)
    assert (routing.weight[~mask.reshape(-1)] == 0).all()
    assert fold_load(routing).count.sum() == 7 * 6 * times


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_every_normalisation_with_every_kind_of_expert(kind, norm):
    torch.manual_seed(1)
    layer = make(kind, Retrieval("per_head"), query_norm=norm).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], naive(layer, x))
    torch.testing.assert_close(layer.eval()(x)[0], naive(layer, x))


@given(st.data())
@settings(max_examples=60)
def test_any_size_equals_the_loop(data):
    """Some experts are chosen by nobody, some by all, and a layer may see one token."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    retrieval = Retrieval(*(data.draw(st.sampled_from(values)) for values in OPTIONS.values()))
    grid, heads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    k = data.draw(st.integers(1, min(grid * grid, 5)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    layer = make(data.draw(st.sampled_from(KINDS)), retrieval, 4, grid * grid, heads, k).to(dtype)
    for rows in data.draw(st.lists(st.integers(2, 3), max_size=2)):
        layer.grow(newborns(layer, rows))
    tokens = data.draw(st.integers(1, 5))
    x, mask = torch.randn(tokens, 4, dtype=dtype), torch.rand(tokens) > 0.3
    cohorts = data.draw(st.sets(st.integers(0, len(layer.cohorts) - 1), min_size=1))
    if k > sum(layer.cohort_sizes[c] for c in cohorts):
        cohorts = None
    layer.train(data.draw(st.booleans()) and int(mask.sum()) > 1)
    expected = naive(layer, x, mask, sorted(cohorts) if cohorts else None)
    torch.testing.assert_close(layer(x, mask, cohorts)[0], expected, atol=1e-5, rtol=1e-4)


@given(st.data())
def test_blocks_of_a_grid_are_searched_exactly_with_the_rule_for_ties(data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    levels = data.draw(st.sampled_from([2, 3, 1000]))
    first, stop = data.draw(st.integers(0, 4)), data.draw(st.integers(5, 7))
    k = data.draw(st.integers(1, 30))
    scores = [torch.randint(levels, (3, 7)).float() for _ in range(2)]
    found = search(scores, k, shell_blocks(first, stop))
    row, column = shell_coordinates(torch.arange(first**2, stop**2))
    for q in range(3):
        cells = zip(row.tolist(), column.tolist(), range(first**2, stop**2), strict=True)
        order = sorted((-float(scores[0][q, i] + scores[1][q, j]), max(i, j), i, j, e) for i, j, e in cells)
        assert found.expert[q].tolist() == [cell[-1] for cell in order[:k]]
        assert found.score[q].tolist() == [-cell[0] for cell in order[:k]]
    whole = search([score[:, :stop] for score in scores], k)
    assert torch.equal(whole.expert, search(scores, k, [Block(range(stop), range(stop))]).expert)


@pytest.mark.parametrize("policy", OPTIONS["policy"])
@pytest.mark.parametrize("grow_by", OPTIONS["grow_by"])
def test_equal_scores_go_to_the_older(policy, grow_by):
    layer = make("peer", Retrieval(policy=policy, grow_by=grow_by), num_experts=4, k=4)
    layer.grow(newborns(layer, 1))
    layer.k = 5 if policy == "compete" else 4
    with torch.no_grad():
        for cohort in layer.cohorts:
            cohort.keys.zero_()
    first_shells = [0, 1, 3, 2]  # (0, 0), (0, 1), (1, 0), (1, 1)
    if policy == "compete":
        expected = [[*first_shells, 4]]  # (0, 2), or (0, 0) of the second grid
    else:
        expected = [first_shells, [4, 5, 8, 7] if grow_by == "shell" else [4 + e for e in first_shells]]
    chosen = layer(torch.randn(3, 6))[1].expert.reshape(3, len(expected), 2, layer.k)
    assert (chosen == torch.tensor(expected).unsqueeze(1)).all()


def test_one_retrieved_expert_per_head_equals_a_feed_forward_layer_whatever_the_keys():
    layer = PEER(8, 25, heads=6, k=1, activation="relu", retrieval=Retrieval("per_head"))
    x = torch.randn(10, 8)
    out, routing = layer(x)
    for t in range(10):
        dense = DenseFFN(8, 6)
        with torch.no_grad():
            dense.linear_in.weight.copy_(layer.cohorts[0].u[routing.expert[t]])
            dense.linear_out.weight.copy_(layer.cohorts[0].v[routing.expert[t]].t())
            dense.linear_in.bias.zero_()
            dense.linear_out.bias.zero_()
        torch.testing.assert_close(out[t], dense(x[t])[0])


def test_keys_per_head_are_different_keys_and_shared_ones_the_same():
    x = torch.randn(50, 6)
    for keys, same in (("shared", True), ("per_head", False)):
        layer = make("pkm", Retrieval(keys)).eval()
        with torch.no_grad():  # all heads ask alike
            layer.query.weight.copy_(layer.query.weight[:6].repeat(2, 1))
            layer.query.bias.zero_()
        one, two = layer(x)[1].expert.reshape(50, 2, 3).unbind(1)
        assert torch.equal(one, two) == same


def test_a_memory_starts_as_the_paper_says():
    torch.manual_seed(0)
    layer = PKM(64, 4096, heads=4, k=32)
    cohort = layer.cohorts[0]
    assert cohort.keys.shape == (4, 2, 64, 32)
    assert cohort.keys.abs().max() <= 32**-0.5
    torch.testing.assert_close(cohort.keys.std(), torch.tensor((3 * 32) ** -0.5), atol=0, rtol=0.05)
    torch.testing.assert_close(cohort.v.std(), torch.tensor(64**-0.5), atol=0, rtol=0.05)
    assert sorted(name for name, _ in cohort.named_parameters()) == ["keys", "v"]


@pytest.mark.parametrize("options", [{"glu": True}, {"gate": "sigmoid"}, {"keys": "per_head"}], ids=str)
def test_output_variance_at_the_start_is_about_that_of_the_dense_layer(options):
    torch.manual_seed(0)
    x, dense = torch.randn(300, 64), DenseFFN(64, 256, "gelu")
    for heads, k in ((8, 16), (2, 4)):
        retrieval = Retrieval(**{name: value for name, value in options.items() if name != "glu"})
        layer = PEER(64, 1024, heads, k, glu=options.get("glu", False), retrieval=retrieval)
        assert 0.4 < layer(x)[0].var() / dense(x)[0].var() < 2.5


@pytest.mark.parametrize("name", OPTIONS)
def test_an_unknown_option_names_its_key(name):
    with pytest.raises(InputError) as error:
        Retrieval(**{name: "both"})
    assert error.value.key == f"layer.retrieval.{name}"


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_experts": 15}, "layer.num_experts"),
        ({"num_experts": 16, "k": 17}, "layer.k"),
        ({"k": 0}, "layer.k"),
        ({"heads": 0}, "layer.heads"),
        ({"key_dim": 7}, "layer.key_dim"),
        ({"query_norm": "rms"}, "layer.query_norm"),
    ],
)
def test_a_memory_that_cannot_be_names_its_key(options, key):
    with pytest.raises(InputError) as error:
        PKM(8, **options)
    assert error.value.key == key


def test_scores_are_those_of_the_loop_for_every_expert():
    """With k = N everything is retrieved, so every weight is known."""
    layer = make("pkm", Retrieval("per_head", "per_cohort", "sigmoid", grow_by="shell"), k=16).eval()
    layer.grow(9)
    layer.k, x = 25, torch.randn(4, 6)
    _, routing = layer(x)
    expected = all_scores(layer, x).sigmoid()
    found = torch.zeros(4, 2, 25).scatter(
        2, routing.expert.reshape(4, 2, 25), routing.weight.reshape(4, 2, 25)
    )
    torch.testing.assert_close(found, expected)
