import pytest
import torch

from cl_moe.layers import PEER, PKM, ExpertChoice, GShard, MoE, Switch, TopK

LAYERS = {
    "switch": lambda: MoE(8, 4, 8, Switch),
    "top_k": lambda: MoE(8, 4, 8, lambda dim: TopK(dim, 2, z_loss=1e-2)),
    "gshard": lambda: MoE(8, 4, 8, GShard),
    "expert_choice": lambda: MoE(8, 4, 8, ExpertChoice),
    "peer": lambda: PEER(8, 16, heads=2, k=4),
    "pkm": lambda: PKM(8, 16, heads=2, k=4),
}


def train(layer, optimizer, steps=5):
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        x = torch.randn(4, 10, 8, requires_grad=True)
        out, routing = layer(x)
        (out.square().mean() + sum(routing.losses.values())).backward()
        optimizer.step()
    return x


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shared", [False, True])
def test_frozen_is_frozen_and_the_rest_learns(name, shared):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    train(layer, optimizer)  # momentum is warm, and every parameter has a stale gradient
    layer.grow(16)
    layer.freeze([0], shared=shared)
    assert layer.frozen_cohorts == (True, False)
    frozen = dict(layer.cohorts[0].state_dict(prefix="cohorts.0."))
    if shared and isinstance(layer, PEER | PKM):
        frozen |= layer.query.state_dict(prefix="query.") | layer.query_norm.state_dict(prefix="query_norm.")
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    optimizer.step()  # before any zero_grad: a stale gradient would still move it
    for key in frozen:
        assert torch.equal(layer.state_dict()[key], before[key]), key
    optimizer.add_param_group({"params": list(layer.cohorts[1].parameters())})
    x = train(layer, optimizer)
    assert x.grad.abs().max() > 0
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]) == (key in frozen), key
    assert all(p.grad is None for p in layer.cohorts[0].parameters())
    assert all(p.grad is not None for p in layer.cohorts[1].parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_a_frozen_layer_passes_the_gradient_of_its_input(name):
    torch.manual_seed(0)
    layer = LAYERS[name]().double().eval()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    (live,) = torch.autograd.grad(layer(x)[0].sum(), x)
    layer.freeze(shared=True)
    (frozen,) = torch.autograd.grad(layer(x)[0].sum(), x)
    torch.testing.assert_close(frozen, live)
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("name", ["top_k", "peer"])
def test_a_live_cohort_that_nobody_chose_has_gradients_of_zero(name):
    layer = LAYERS[name]()
    layer.grow(16)
    with torch.no_grad():
        if name == "peer":  # one bias of the query against all sub-keys of the newborn
            layer.query_norm = None
            layer.query.weight.zero_()
            layer.query.bias.fill_(1.0)
            layer.cohorts[1].keys.fill_(-100.0)
            x = torch.randn(5, 8)
        else:
            layer.cohorts[1].key.fill_(-100.0)
            x = torch.rand(5, 8) + 0.1
    out, routing = layer(x)
    assert routing.expert.max() < layer.cohort_sizes[0]
    out.sum().backward()
    assert all(p.grad is not None for p in layer.cohorts[1].parameters())
    names = ("u", "v") if name == "peer" else ("w_in", "w_out", "b_in", "b_out")
    assert all((layer.cohorts[1].get_parameter(n).grad == 0).all() for n in names)
