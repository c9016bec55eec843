"""Joint and cumulative training: what is trained on, and what stays untouched."""

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.strategies import Cumulative, Joint, LwF, Naive, Replay, Strategy

SCENARIOS = ["class", "domain", "task"]


def rows(parts: Iterable[TensorDataset]) -> Counter[tuple[float, ...]]:
    """The multiset of (input, target) rows."""
    return Counter(
        (*inputs.tolist(), target.item())
        for part in parts
        for inputs, target in zip(*part.tensors, strict=True)
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_joint_trains_on_everything_at_first(new_stream, scenario: str) -> None:
    stream = new_stream(scenario)
    view = Joint().view(stream)
    assert rows([view[0].train]) == rows(e.train for e in stream)
    assert len(view[0].train) == sum(len(e.train) for e in stream)
    assert [len(e.train) for e in view[1:]] == [0, 0]
    assert view[0].classes == tuple(range(stream.num_classes))
    assert [e.classes for e in view[1:]] == [(), ()]
    assert view[0].train.tensors[0].dtype == stream[0].train.tensors[0].dtype


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_cumulative_trains_on_all_so_far(new_stream, scenario: str) -> None:
    stream = new_stream(scenario)
    view = Cumulative().view(stream)
    for experience in view:
        past = stream[: experience.index + 1]
        assert rows([experience.train]) == rows(e.train for e in past)
    assert [e.classes for e in view] == [e.classes for e in stream]


@pytest.mark.parametrize("strategy", [Joint(), Cumulative(), Naive(), Replay(), LwF()])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_evaluation_is_untouched(new_stream, strategy: Strategy, scenario: str) -> None:
    stream = new_stream(scenario)
    before = [rows([e.train]) for e in stream]
    view = strategy.view(stream)
    assert [rows([e.train]) for e in stream] == before, "the stream itself was changed"
    assert len(view) == len(stream)
    for seen, given in zip(view, stream, strict=True):
        assert seen.test is given.test
        assert (seen.index, seen.name, seen.task_label) == (given.index, given.name, given.task_label)
    assert (view.num_classes, view.scenario, view.kind) == (stream.num_classes, scenario, stream.kind)


def test_one_view_at_most(new_stream) -> None:
    from cl_moe.preflight import training_view

    stream = new_stream()
    with pytest.raises(InputError) as caught:
        training_view(stream, {"joint": Joint(), "replay": Replay(), "cumulative": Cumulative()})
    assert caught.value.key == "strategy"
    assert "joint" in caught.value.allowed
    assert "cumulative" in caught.value.allowed
    assert training_view(stream, {"replay": Replay(), "lwf": LwF()}) is stream
    assert training_view(stream, {}) is stream
    view = training_view(stream, {"replay": Replay(), "cumulative": Cumulative()})
    assert rows([view[2].train]) == rows(e.train for e in stream)


def test_joint_knows_every_class_where_naive_knows_the_last_ones(new_model, new_stream, train) -> None:
    """The two ends of every comparison stand where they should."""
    stream = new_stream()
    inputs, targets = (torch.cat(columns) for columns in zip(*(e.train.tensors for e in stream), strict=True))

    def right(strategy: Strategy) -> float:
        learner = train(new_model("moe"), strategy.view(stream), {"s": strategy}, epochs=15)
        answer = learner.model.eval()(inputs)[0].argmax(dim=1)
        answer = torch.tensor(learner.model.head.classes)[answer]
        return (answer == targets).double().mean().item()

    assert right(Naive()) < 0.5
    assert right(Joint()) > 0.9
    assert right(Cumulative()) > 0.9
