"""What growing and freezing leave alone in PEER and product-key memories, with every option."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cl_moe.errors import InputError
from cl_moe.growth.adapt import apply, replay
from cl_moe.layers import PEER, PKM, Retrieval
from cl_moe.layers.product_keys import shell_index
from cl_moe.models import MLPClassifier
from tests.layers.product_key_oracle import EVERY, all_scores, make, name_of, newborns

KINDS = ("peer", "peer glu", "pkm")


def options(*policies):
    return pytest.mark.parametrize("retrieval", [r for r in EVERY if r.policy in policies], ids=name_of)


every_option = options("compete", "sum")


def kind_of(retrieval):
    return KINDS[EVERY.index(retrieval) % 3]


@every_option
def test_old_ids_bytes_and_scores_never_move(retrieval):
    torch.manual_seed(0)
    layer, x = make(kind_of(retrieval), retrieval).eval(), torch.randn(30, 6)
    for init in ("fresh", "copy", "zero_output"):
        old = {name: value.clone() for name, value in layer.state_dict().items()}
        (before, routed), scores = layer(x), all_scores(layer, x)
        sizes, total = layer.cohort_sizes, layer.num_experts
        layer.grow(newborns(layer), init, load=torch.rand(total))
        assert layer.cohort_sizes == (*sizes, layer.num_experts - total)
        assert all(torch.equal(layer.state_dict()[name], value) for name, value in old.items())
        after, again = layer(x, cohorts=range(len(sizes)))
        assert torch.equal(after, before)
        assert torch.equal(again.expert, routed.expert)
        assert torch.equal(again.weight, routed.weight)
        assert torch.equal(all_scores(layer, x)[..., :total], scores)
        young = layer(x, cohorts=[len(sizes)])[1].expert
        assert young.min() >= total
        assert young.max() < layer.num_experts


@options("sum")
def test_zero_output_newborns_beside_a_sum_change_nothing(retrieval):
    torch.manual_seed(0)
    layer, x = make(kind_of(retrieval), retrieval), torch.randn(30, 6)
    layer(x)  # statistics that are not those of the start
    for training in (False, True):
        before, routed = layer.train(training)(x)
        layer.grow(newborns(layer), "zero_output")
        after, routing = layer(x)
        assert torch.equal(after, before)
        places = routed.expert.shape[1]
        assert torch.equal(routing.expert[:, :places], routed.expert)
        assert torch.equal(routing.weight[:, :places], routed.weight)
        assert (routing.weight[:, places:] > 0).all()


@options("compete")
def test_a_head_that_chose_no_newborn_keeps_its_bits(retrieval):
    torch.manual_seed(0)
    layer, x = make(kind_of(retrieval), retrieval, num_experts=49, heads=1).eval(), torch.randn(200, 6)
    before, old = layer(x)
    layer.grow(15 if retrieval.grow_by == "shell" else 9)
    after, routing = layer(x)
    same = (routing.expert < 49).all(dim=1)
    assert same.any()
    assert not same.all()
    assert torch.equal(routing.weight[same], old.weight[same])
    assert torch.equal(after[same], before[same])


@pytest.mark.parametrize("keys", ["shared", "per_head"])
def test_a_grid_grows_in_place_by_shells(keys):
    layer = make("peer", Retrieval(keys, grow_by="shell"), num_experts=9)
    layer.grow(16)  # 3 x 3 to 5 x 5
    layer.grow(11)
    assert layer.cohort_sizes == (9, 16, 11)
    assert [c.rows for c in layer.cohorts] == [range(3), range(3, 5), range(5, 6)]
    shapes = [tuple(c.keys.shape) for c in layer.cohorts]
    assert shapes == [(2,) * (keys == "per_head") + (2, rows, 3) for rows in (3, 2, 1)]
    assert [c.u.shape[0] for c in layer.cohorts] == [9, 16, 11]


@pytest.mark.parametrize("queries", ["shared", "per_cohort"])
def test_copied_shells_cross_the_most_used_rows_and_columns(queries):
    torch.manual_seed(0)
    layer = make("peer", Retrieval(queries=queries, grow_by="shell"), num_experts=9)
    if queries == "per_cohort":
        layer(torch.randn(20, 6))
    load = torch.zeros(9)
    for row, column, used in ((2, 0, 5.0), (1, 2, 7.0), (2, 2, 1.0)):
        load[int(shell_index(torch.tensor(row), torch.tensor(column)))] = used
    old, x = layer.cohorts[0], torch.randn(5, 6)
    layer.grow(16, "copy", noise=0.0, load=load)
    new, rows, columns = layer.cohorts[1], [0, 1, 2, 1, 2], [0, 1, 2, 2, 0]
    assert torch.equal(new.keys[0], old.keys[0][rows[3:]])
    assert torch.equal(new.keys[1], old.keys[1][columns[3:]])
    scores = all_scores(layer.eval(), x)
    for i in range(5):
        for j in range(5):
            born = int(shell_index(torch.tensor(i), torch.tensor(j)))
            source = int(shell_index(torch.tensor(rows[i]), torch.tensor(columns[j])))
            if born >= 9:
                assert torch.equal(new.u[born - 9], old.u[source])
                assert torch.equal(new.v[born - 9], old.v[source])
                torch.testing.assert_close(scores[..., born], scores[..., source])


def test_a_copied_grid_asks_as_its_source_asked():
    layer = make("pkm", Retrieval(queries="per_cohort"))
    layer(torch.randn(40, 6) + 1)
    layer.grow(16, "copy", noise=0.0)
    for name, value in layer.cohorts[0].state_dict().items():
        assert torch.equal(layer.cohorts[1].state_dict()[name], value), name


def train(layer, steps=4):
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(40, 6) + 0.5)[0].square().mean().backward()
        optimizer.step()


@every_option
def test_frozen_is_frozen_and_the_rest_learns(retrieval):
    torch.manual_seed(0)
    layer = make(kind_of(retrieval), retrieval)
    train(layer)
    layer.grow(newborns(layer))
    layer.freeze([0])
    own, x = retrieval.queries == "per_cohort", torch.randn(20, 6)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    scores = all_scores(layer.eval(), x)[..., :16]
    train(layer.train())
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("cohorts.0."), name
    assert torch.equal(all_scores(layer.eval(), x)[..., :16], scores) == own
    assert layer.frozen_cohorts == (True, False)
    assert ("cohorts.0.query_norm.running_mean" in before) == own
    assert bool(layer.shared_router) != own


def test_newborn_shells_move_old_sub_keys_unless_these_are_frozen():
    layer = make("peer", Retrieval(grow_by="shell"))
    layer.grow(9)
    old, x = layer.cohorts[0], torch.randn(200, 6)
    layer(x, cohorts=[1])[0].square().sum().backward()
    assert old.keys.grad.abs().max() > 0
    assert old.v.grad is None
    layer.freeze([0])
    layer(x, cohorts=[1])[0].square().sum().backward()
    assert old.keys.grad is None
    assert layer.cohorts[1].keys.grad.abs().max() > 0


@every_option
def test_a_ledger_rebuilds_the_shape_and_the_weights_fit(retrieval):
    kind, events = kind_of(retrieval), []
    factory = partial(PKM if kind == "pkm" else PEER, num_experts=16, heads=2, k=3, retrieval=retrieval)
    models = [MLPClassifier((5,), 2, factory, width=6) for _ in range(2)]
    for model in models:
        model.head.grow([0, 1])
    layer = models[0].expert_layers[0]
    for init in ("copy", "zero_output"):
        events.append({"act": "freeze", "layer": 0, "cohorts": [len(layer.cohorts) - 1], "shared": True})
        size = newborns(layer)
        events.append({"act": "grow", "layer": 0, "num_experts": size, "init": init, "noise": 0.1})
        for event in events[-2:]:
            apply(models[0], event, {})
    models[0](torch.randn(9, 5))
    replay(models[1], events)
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(9, 5)
    for training in (False, True):
        outs = [model.train(training)(x)[0] for model in models]
        assert torch.equal(*outs)
    assert models[1].expert_layers[0].frozen_cohorts == layer.frozen_cohorts == (True, True, False)
    assert all(
        p.requires_grad == q.requires_grad for p, q in zip(*(m.parameters() for m in models), strict=True)
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("queries", ["shared", "per_cohort"])
def test_activation_checkpointing_changes_nothing(queries, reentrant):
    def run(wrap):
        torch.manual_seed(0)
        layer = make("peer", Retrieval(queries=queries, policy="sum"))
        layer.grow(9)
        x = torch.randn(12, 6, requires_grad=True)
        for _ in range(2):
            out, routing = wrap(layer, x)
            out.square().sum().backward()
        grads = [x.grad, *(p.grad for p in layer.parameters())]
        return [out, routing.expert, routing.weight, *grads, *layer.state_dict().values()]

    plain = run(lambda layer, x: layer(x))
    again = run(lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@every_option
def test_low_precision_weights_and_autocast_retrieve_in_float32(retrieval):
    layer = make(kind_of(retrieval), retrieval).to(torch.bfloat16).eval()
    layer.grow(newborns(layer))
    x = torch.randn(7, 6, dtype=torch.bfloat16)
    out, routing = layer(x)
    assert out.dtype == torch.bfloat16
    wide = make(kind_of(retrieval), retrieval)
    wide.grow(newborns(wide))
    wide.load_state_dict({name: value.float() for name, value in layer.state_dict().items()})
    with torch.autocast("cpu", torch.bfloat16):
        expected, same = wide.eval()(x.float())
    assert torch.equal(routing.expert, same.expert)
    assert torch.equal(routing.weight, same.weight)
    assert torch.equal(out, expected.bfloat16())


@pytest.mark.parametrize(
    ("options", "growth", "allowed"),
    [
        ({"grow_by": "shell"}, {"num_experts": 16}, "9 or 20"),
        ({"grow_by": "shell"}, {"num_experts": 1}, "9 or 20"),
        ({"grow_by": "shell"}, {"num_experts": 84, "init": "copy"}, "at most 4 rows"),
        ({"grow_by": "grid"}, {"num_experts": 9 + 11}, "16 or 25"),
        ({"grow_by": "grid"}, {"num_experts": 25, "init": "copy"}, "at most 4 rows"),
        ({"policy": "sum"}, {"num_experts": 1}, "at least 3"),
    ],
)
def test_impossible_growth_says_what_is_possible(options, growth, allowed):
    layer = make("pkm", Retrieval(**options))
    with pytest.raises(InputError, match=allowed) as error:
        layer.grow(**growth)
    assert error.value.key == "growth.num_experts"
    assert len(layer.cohorts) == 1


def test_a_plan_of_growths_by_shells_is_checked_one_after_the_other():
    layer = make("peer", Retrieval(grow_by="shell"))
    layer.check_growths([9, 11, 28], "copy")  # to 5 x 5, 6 x 6, 8 x 8
    for sizes in ([9, 9], [11], [9, 11, 27]):
        with pytest.raises(InputError):
            layer.check_growths(sizes, "fresh")
    assert layer.num_experts == 16
    make("peer", Retrieval()).check_growths([9, 9], "copy")
    with pytest.raises(InputError):
        make("peer", Retrieval()).check_growths([9, 10], "fresh")


def test_too_few_experts_in_use():
    layer = make("pkm", Retrieval(policy="sum"), k=16)
    assert layer(torch.randn(2, 6))[1].expert.shape == (2, 32)
    with pytest.raises(InputError) as error:
        make("pkm", Retrieval(policy="sum"), k=17)
    assert error.value.key == "layer.k"


COMPILED = [
    Retrieval(),
    Retrieval("per_head", "per_cohort", "sigmoid", "sum", "shell"),
]


@pytest.mark.slow
@pytest.mark.parametrize("retrieval", COMPILED, ids=name_of)
def test_compiled_whole_and_once_more_for_each_growth(retrieval):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, counter = make("peer glu", retrieval), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for growth in range(3):
        if growth:
            layer.grow(newborns(layer))
        for _ in range(2):
            x = torch.randn(5, 6)
            results = []
            for run in (compiled, layer):
                layer.zero_grad()
                out, routing = run(x)
                out.square().sum().backward()
                results.append((out, routing.weight, *(p.grad for p in layer.parameters())))
            torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
        assert counter.frame_count == growth + 1
    torch._dynamo.reset()
