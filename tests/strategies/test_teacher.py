"""The teacher: the old model itself, after growth, freezing and training, without a second model."""

import copy
import io

import pytest
import torch
from torch import nn

from cl_moe.growth import AllPast, NeverFreeze, PastExperts, PastExpertsAndRouter
from cl_moe.strategies import LwF
from cl_moe.strategies.teacher import Teacher

POLICIES = [NeverFreeze(), PastExperts(), PastExpertsAndRouter(), AllPast()]
PROBE = torch.randn(40, 6, generator=torch.Generator().manual_seed(9)) * 3


@pytest.mark.parametrize("layer", ["dense", "moe", "peer"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", ["all", "added"])
def test_the_teacher_is_the_old_model(new_model, new_stream, walk, growing, layer, policy, slots) -> None:
    """Against a true copy made at the boundary, after newborns and statistics moved, up to a rounding."""
    strategy = LwF(alpha=0.5)
    model = new_model(layer, num_blocks=2, slots=slots)
    old: nn.Module | None = None
    teacher = Teacher()
    for moment, learner in walk(model, new_stream(), {"lwf": strategy}, growing[layer], policy):
        if moment == "adapted":
            continue
        if old is not None:
            answer = teacher.logits(learner.model, PROBE, None)
            torch.testing.assert_close(answer, old(PROBE)[0], rtol=0, atol=1e-6)
            assert all(part.training for part in learner.model.modules()), "the mode is put back"
            now = copy.deepcopy(learner.model).eval()(PROBE)[0][:, : answer.shape[1]]
            if layer != "dense" or not isinstance(policy, AllPast):
                assert (now - answer).abs().max() > 1e-4, "the living model has moved on"
        old, teacher = copy.deepcopy(learner.model).eval(), copy.deepcopy(strategy.teacher)
    assert learner.experience.index == 2


@pytest.mark.parametrize("layer", ["moe", "peer"])
def test_old_cohorts_only(new_model, new_stream, walk, growing, layer) -> None:
    strategy = LwF()
    steps = walk(new_model(layer), new_stream(), {"lwf": strategy}, growing[layer], PastExperts())
    for moment, learner in steps:
        if moment == "adapted" and learner.experience.index:
            body = learner.model.blocks[0]
            expected = strategy.teacher.logits(learner.model, PROBE, None)
            with torch.no_grad():  # whatever the newborns do, the teacher does not hear of it
                for parameter in body.cohorts[-1].parameters():
                    parameter.add_(100.0)
                assert torch.equal(strategy.teacher.logits(learner.model, PROBE, None), expected)
                for parameter in body.cohorts[-1].parameters():
                    parameter.sub_(100.0)
            assert expected.shape[1] == 2 * learner.experience.index


@pytest.mark.parametrize("layer", ["moe", "peer"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_teacher_keeps_only_what_can_still_change(
    new_model, new_stream, walk, growing, layer, policy
) -> None:
    strategy = LwF()
    for moment, learner in walk(new_model(layer), new_stream(), {"lwf": strategy}, growing[layer], policy):
        if moment != "trained":
            continue
        model, values = learner.model, strategy.teacher.values
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        statistics = {name for name, _ in model.named_buffers()}
        if isinstance(policy, PastExpertsAndRouter | AllPast) and learner.experience.index:
            statistics = set()  # PEER's only ones stopped with its query net
        assert set(values) == learning | statistics
        own = {t.data_ptr() for t in model.state_dict().values()}
        assert not own & {value.data_ptr() for value in values.values()}, "copies, no views of living weights"
        assert not any(value.requires_grad for value in values.values())
        size = sum(value.numel() * value.element_size() for value in values.values())
        assert strategy.buffer_bytes == size > 0


@pytest.mark.parametrize("layer", ["moe", "peer"])
def test_teaching_leaves_the_model_and_the_graph_alone(new_model, new_stream, train, growing, layer) -> None:
    strategy = LwF()
    learner = train(new_model(layer), new_stream(), {"lwf": strategy}, growing[layer])
    model = learner.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strategy.teacher.learn(model)
    answer = strategy.teacher.logits(model, PROBE, None)
    assert not answer.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} moved: a statistic or a weight"


def test_a_restarted_teacher_answers_the_same(new_model, new_stream, train, growing) -> None:
    strategy = LwF()
    learner = train(new_model("peer"), new_stream(), {"lwf": strategy}, growing["peer"], PastExperts())
    file = io.BytesIO()
    torch.save(strategy.state_dict(), file)
    file.seek(0)
    other = LwF()
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for parameter in learner.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    one, two = (s.teacher.logits(learner.model, PROBE, None) for s in (strategy, other))
    assert torch.equal(one, two)
    assert other.teacher.num_classes == 6
    assert other.trained == strategy.trained == list(range(6))


def test_a_fresh_teacher_is_none_yet(new_model) -> None:
    teacher = Teacher()
    assert not teacher
    model = new_model()
    model.head.grow([0])
    teacher.learn(model)
    assert teacher


def test_uneven_layers_are_refused(new_model) -> None:
    model = new_model("moe", num_blocks=2)
    model.head.grow([0])
    model.blocks[0].grow(2)
    with pytest.raises(ValueError, match="numbers of cohorts"):
        Teacher().learn(model)


def test_a_teacher_chooses_among_the_candidates_of_its_time(new_model) -> None:
    model = new_model("moe").eval()
    model.head.grow([0, 1])
    model.blocks[0].grow(2)
    model.blocks[0].prune([0])
    teacher, expected = Teacher(), model(PROBE)[0]
    teacher.learn(model)
    model.blocks[0].grow(2)
    again = Teacher()
    again.load_state_dict(teacher.state_dict())
    torch.testing.assert_close(again.logits(model, PROBE, None), expected)
    assert not torch.allclose(model(PROBE, cohorts=[0, 1])[0], expected)
