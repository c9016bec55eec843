"""The regressor: slots between numbers and numbers."""

import torch
from torch import nn

from cl_moe.layers import DenseFFN, MoE, TopK
from cl_moe.models import Regressor


def test_it_is_the_layers_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = Regressor((5, 4), 0, DenseFFN, num_blocks=2)
    x = torch.randn(3, 5, 4)
    one, two = (block.linear_in for block in model.blocks)
    numbers, routings = model(x)
    assert routings == {}
    torch.testing.assert_close(
        numbers, (torch.relu(x @ one.weight.t() + one.bias) @ two.weight[0]) + two.bias[0]
    )
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"blocks"}
    assert model(x[:, 0])[0].shape == (3,)


def test_linear_experts_move_by_the_least_that_meets_the_samples() -> None:
    """Gradient descent on fewer samples than features ends at the paper's update (2406.16437, equation 6)."""
    torch.manual_seed(0)
    layer = lambda dim: MoE(dim, 3, None, lambda dim: TopK(dim, 1, level="sequence"), bias=False)  # noqa: E731
    model = Regressor((4, 6), 0, layer).double()
    x, y = torch.randn(1, 4, 6, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    before = model.blocks[0].cohorts[0].w_in.detach().clone()
    chosen = int(model(x)[1][0].expert[0, 0])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4000):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x)[0], y).backward()
        optimizer.step()
    after = model.blocks[0].cohorts[0].w_in.detach()
    others = [e for e in range(3) if e != chosen]
    assert torch.equal(after[others], before[others])
    was, X = before[chosen][:, 0], x[0]
    least = was + torch.linalg.pinv(X) @ (y[0] - X @ was)
    torch.testing.assert_close(after[chosen][:, 0], least, rtol=0, atol=1e-6)
    assert torch.equal(after[chosen][:, 1:], before[chosen][:, 1:]), "what is not read does not move"
