import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_moe.errors import InputError
from cl_moe.losses import distillation_loss, load_balancing_loss, router_z_loss


@given(st.integers(1, 6), st.integers(1, 3))
def test_balance_is_one_at_uniform(experts, k):
    k = min(k, experts)
    tokens = 4 * experts
    choice = (torch.arange(tokens * k) % experts).reshape(tokens, k)
    loss = load_balancing_loss(torch.zeros(tokens, experts), choice)
    torch.testing.assert_close(loss, torch.tensor(1.0))


@given(st.data())
def test_balance_equals_its_definition_token_by_token(data):
    tokens, experts = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 5))
    k = data.draw(st.integers(1, experts))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(tokens, experts, dtype=torch.float64)
    choice = logits.topk(k).indices
    valid, live = torch.rand(tokens) > 0.3, torch.rand(experts) > 0.3
    chosen = [(t, int(e)) for t in range(tokens) for e in choice[t] if valid[t] and live[e]]
    expected = 0.0
    for i in range(experts):
        if live[i] and chosen:
            share = sum(e == i for _, e in chosen) / len(chosen)
            weight = [logits[t, i].exp() / logits[t, live].exp().sum() for t, _ in chosen]
            expected += int(live.sum()) * share * float(sum(weight)) / len(chosen)
    assert float(load_balancing_loss(logits, choice, valid, live)) == pytest.approx(expected, abs=1e-12)


def test_balance_pulls_on_live_scores_only():
    logits = torch.randn(10, 4, requires_grad=True)
    live = torch.tensor([False, True, True, False])
    loss = load_balancing_loss(logits, logits.topk(2).indices, live_N=live)
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad[:, ~live] == 0).all()
    assert grad[:, live].abs().max() > 0


def test_z_loss_equals_its_definition_on_real_tokens():
    logits, valid = torch.randn(9, 4), torch.rand(9) > 0.3
    expected = logits[valid].exp().sum(-1).log().square().mean()
    torch.testing.assert_close(router_z_loss(logits, valid), expected)
    torch.testing.assert_close(router_z_loss(logits[valid]), expected)
    assert router_z_loss(logits, torch.zeros(9, dtype=torch.bool)) == 0


@given(st.floats(0.1, 10), st.integers(0, 9))
def test_distillation_is_the_kl_divergence_of_softened_outputs(temperature, seed):
    torch.manual_seed(seed)
    student, teacher = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, temperature), expected)


def test_distillation_teaches_the_student_only():
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / 3)
    with pytest.raises(InputError, match="temperature"):
        distillation_loss(student, teacher, 0.0)
