import pytest
import torch

from cl_moe.errors import InputError
from cl_moe.layers import PEER, PKM, DenseFFN, ExpertChoice, GShard, MoE, Scores, Switch, TopK, fold_load
from cl_moe.layers.product_keys import shell_index

LAYERS = {
    "switch": lambda: MoE(8, 4, 8, Switch),
    "top_k": lambda: MoE(8, 4, 8),
    "loss_free": lambda: MoE(8, 4, 8, lambda dim: TopK(dim, 2, scores=Scores("sigmoid", 1e-3))),
    "gshard": lambda: MoE(8, 4, 8, GShard),
    "expert_choice": lambda: MoE(8, 4, 8, ExpertChoice),
    "peer": lambda: PEER(8, 16, heads=2, k=4),
    "pkm": lambda: PKM(8, 16, heads=2, k=4),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]()


def test_old_names_and_bytes_never_move(layer):
    x = torch.randn(40, 8)
    optimizer_sees = {id(p) for p in layer.parameters()}
    for size, init in ((16, "fresh"), (4, "copy"), (9, "zero_output")):
        old = {name: value.clone() for name, value in layer.state_dict().items()}
        before, total = layer.eval()(x)[0], layer.num_experts
        layer.grow(size, init, load=torch.rand(total))
        assert layer.num_experts == total + size
        assert layer.cohort_sizes[-1] == size
        state = layer.state_dict()
        assert all(torch.equal(state[name], value) for name, value in old.items())
        old_cohorts = range(len(layer.cohorts) - 1)
        assert torch.equal(layer(x, cohorts=list(old_cohorts))[0], before)
        assert fold_load(layer(x)[1]).count.shape == (total + size,)
    assert optimizer_sees < {id(p) for p in layer.parameters()}


def test_newborns_take_dtype_and_are_drawn_from_the_global_generator(layer):
    layer.double()
    torch.manual_seed(5)
    layer.grow(4)
    torch.manual_seed(5)
    layer.grow(4)
    first, second = (list(layer.cohorts[c].parameters()) for c in (1, 2))
    assert all(p.dtype == torch.float64 and p.requires_grad and p.is_leaf for p in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_zero_output_newborns_add_nothing(layer):
    layer.grow(16, "zero_output")
    out, routing = layer(torch.randn(50, 8), cohorts=[1])
    assert (out == 0).all()
    assert routing.kept.any()
    out, _ = layer(torch.randn(50, 8))
    out.sum().backward()
    name = "v" if isinstance(layer, PEER | PKM) else "w_out"
    assert layer.cohorts[1].get_parameter(name).grad.abs().max() > 0


def test_moe_copies_the_most_used_experts_in_turn():
    layer = MoE(8, 3, 8)
    layer.grow(2)
    load = torch.tensor([1.0, 5.0, 0.0, 9.0, 5.0])
    layer.grow(7, "copy", noise=0.0, load=load)
    for name, newborn in layer.cohorts[2].named_parameters():
        old = torch.cat([c.get_parameter(name) for c in layer.cohorts[:2]])
        assert torch.equal(newborn, old[[3, 1, 4, 0, 2, 3, 1]])


def test_copy_noise_is_relative_to_the_copied_tensor():
    layer = MoE(64, 8, 64)
    layer.grow(8, "copy", noise=0.5)
    old, new = (c.w_in for c in layer.cohorts)
    torch.testing.assert_close((new - old).std() / old.std(), torch.tensor(0.5), atol=0.02, rtol=0)
    assert (layer.cohorts[0].key != layer.cohorts[1].key).all()


def test_peer_copies_the_crossing_of_the_most_used_rows_and_columns():
    layer = PEER(8, 9, heads=2, k=2)
    layer.grow(16)
    load = torch.zeros(25)
    load[:9] = 0.1
    for row, column, used in ((3, 0, 5.0), (1, 2, 7.0), (3, 2, 1.0)):
        load[9 + int(shell_index(torch.tensor(row), torch.tensor(column)))] = used
    layer.grow(4, "copy", noise=0.0, load=load)
    source, newborn = layer.cohorts[1], layer.cohorts[2]
    rows, columns = [1, 3], [2, 0]
    assert torch.equal(newborn.keys[0], source.keys[0][rows])
    assert torch.equal(newborn.keys[1], source.keys[1][columns])
    for i in range(2):
        for j in range(2):
            new = int(shell_index(torch.tensor(i), torch.tensor(j)))
            old = int(shell_index(torch.tensor(rows[i]), torch.tensor(columns[j])))
            assert torch.equal(newborn.u[new], source.u[old])
            assert torch.equal(newborn.v[new], source.v[old])


def test_wrong_growth_names_its_key(layer):
    for options, key in (
        ({"num_experts": 0}, "growth.num_experts"),
        ({"num_experts": 4, "init": "clone"}, "growth.init"),
        ({"num_experts": 4, "load": torch.ones(3)}, "load"),
    ):
        with pytest.raises(InputError) as error:
            layer.grow(**options)
        assert error.value.key == key
    with pytest.raises(InputError) as error:
        DenseFFN(8).grow(4)
    assert error.value.key == "layer"
    assert len(layer.cohorts) == 1
