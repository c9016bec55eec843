"""Weight aligning: new rows as long as old ones on average, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch

from cl_moe.errors import InputError
from cl_moe.strategies import ICaRL, LwF, Outlook, Replay, Strategy, WeightAligning


class Before(Strategy):
    """The head as training left it."""

    def end(self, outlook: Outlook) -> None:
        self.rows = {n: p.detach().clone() for n, p in outlook.model.named_parameters()}


def test_new_rows_get_the_old_ones_mean_length(walk, new_model, new_stream) -> None:
    before, changed = Before(), 0
    strategies = {"replay": Replay(memory_size=10), "before": before, "s": WeightAligning(), "lwf": LwF()}
    for moment, learner in walk(new_model(), new_stream(), strategies):
        if moment == "adapted":
            continue
        index, head = learner.experience.index, learner.model.head
        for name, value in learner.model.named_parameters():
            if index and name == f"head.cohorts.{index}.weight":
                old = torch.cat([before.rows[f"head.cohorts.{i}.weight"] for i in range(index)])
                gamma = old.norm(dim=1).mean() / before.rows[name].norm(dim=1).mean()
                torch.testing.assert_close(value.detach(), gamma * before.rows[name])
                changed += int(abs(gamma - 1) > 1e-3)
            else:
                assert torch.equal(value, before.rows[name]), name
        teacher = strategies["lwf"].teacher.values
        assert torch.equal(teacher[f"head.cohorts.{index}.weight"], head.cohorts[index].weight)
    assert changed == 2


def test_rows_of_a_frozen_head_stay(new_model, new_stream, outlook) -> None:
    strategy, experience = WeightAligning(), new_stream()[1]
    seen = outlook(experience)
    seen.model.head.grow([0, 1])
    seen.model.head.grow([2, 3])
    seen.model.head.cohorts[1].requires_grad_(False)
    kept = seen.model.head.cohorts[1].weight.clone()
    strategy.load_state_dict({"trained": [0, 1]})
    strategy.end(seen)
    assert torch.equal(seen.model.head.cohorts[1].weight, kept)
    assert strategy.state_dict() == {"trained": [0, 1, 2, 3]}


@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_scenarios_without_competition_are_refused(train, new_model, new_stream, scenario: str) -> None:
    with pytest.raises(InputError, match="weight_aligning with stream"):
        train(new_model(), new_stream(scenario), {"s": WeightAligning()})


def test_beside_a_classifier_without_a_head_it_is_refused(train, new_model, new_stream) -> None:
    strategies = {"icarl": ICaRL(memory_size=10), "s": WeightAligning()}
    with pytest.raises(InputError, match="without the head"):
        train(new_model(), new_stream(), strategies)
