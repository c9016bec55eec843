"""GDumb: the greedy memory by the paper's words, and a model that knows nothing else."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.growth import EveryExperience, PastExperts
from cl_moe.strategies import GDumb, LwF, Outlook, Strategy
from cl_moe.stream import Experience, Stream


def numbered(labels: list[list[int]]) -> Stream:
    """Every training row is a number of its own."""
    experiences, first = [], 0
    for index, targets in enumerate(labels):
        rows = torch.arange(first, first + len(targets)).float().unsqueeze(1)
        data = TensorDataset(rows, torch.tensor(targets))
        experiences.append(Experience(index, f"e{index}", data, data, tuple(sorted(set(targets)))))
        first += len(targets)
    return Stream("numbered", "classification", "class", tuple(experiences), 10, (1,))


@pytest.mark.parametrize("seed", range(3))
def test_the_memory_is_balanced_as_far_as_classes_go(seed: int) -> None:
    stream = numbered([[0] * 20 + [1] * 3, [2] * 9 + [3] * 9, [4] * 2])
    view = GDumb(memory_size=12, seed=seed).view(stream)
    counts = [Counter(experience.train.tensors[1].tolist()) for experience in view]
    for experience in view:
        rows = experience.train.tensors[0][:, 0].tolist()
        assert len(rows) == len(set(rows)) <= 12
        offered = torch.cat([e.train.tensors[1] for e in stream[: experience.index + 1]])  # by its number
        assert [int(offered[int(x)]) for x in rows] == experience.train.tensors[1].tolist()
    assert counts[0][1] == 3, "a small class is kept whole"
    assert counts[2][4] == 2
    large = [counts[2][label] for label in (0, 2, 3)]
    assert max(large) - min(large) <= 1
    assert all(seen.test is e.test for seen, e in zip(view, stream, strict=True))


def by_the_papers_words(size: int, arrived: list[list[int]]) -> list[dict[int, int]]:
    """How many of each class are kept, after each experience: the part that no draw decides."""
    held: Counter[int] = Counter()
    found = []
    for labels in arrived:
        for label in labels:
            classes = {*held, label}
            if label not in held or held[label] < size / len(classes):
                if sum(held.values()) >= size:
                    held[max(held, key=lambda c: held[c])] -= 1
                held[label] += 1
        found.append(dict(held))
    return found


def test_counts_by_the_papers_words(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [[0, 0, 0, 1, 0, 1, 0, 0], [2, 2, 1, 3, 2, 2], [4, 5, 4, 5, 0, 4]]
    monkeypatch.setattr(torch, "randperm", lambda n, generator=None: torch.arange(n))  # as they stand
    view = GDumb(memory_size=7).view(numbered(labels))
    found = [dict(Counter(e.train.tensors[1].tolist())) for e in view]
    assert found == by_the_papers_words(7, labels)


def test_what_is_kept_hangs_on_the_seed_only() -> None:
    stream = numbered([[0] * 20, [1] * 20])
    rows = [GDumb(memory_size=10, seed=s).view(stream)[1].train.tensors[0] for s in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


class Look(Strategy):
    """The weights that each experience's first step begins with."""

    def __init__(self) -> None:
        self.first: list[dict[str, Tensor]] = []
        self.due = False

    def begin(self, outlook: Outlook) -> None:
        self.due, self.model = True, outlook.model

    def batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.due:
            self.first.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
            self.due = False
        return inputs, targets


def test_the_first_step_begins_with_first_weights_and_frozen_ones_stay(walk, new_model, new_stream) -> None:
    gdumb, look = GDumb(memory_size=12), Look()
    born: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    view = gdumb.view(new_stream())
    both = {"gdumb": gdumb, "naive": look}
    for moment, learner in walk(new_model("moe"), view, both, EveryExperience(2), PastExperts()):
        live = dict(learner.model.named_parameters())
        if moment == "adapted":
            born |= {name: p.detach().clone() for name, p in live.items() if name not in born}
            frozen = {name: p.detach().clone() for name, p in live.items() if not p.requires_grad}
        else:
            for name, value in look.first[-1].items():
                assert torch.equal(value, frozen.get(name, born[name])), name
            assert all(torch.equal(live[name], value) for name, value in frozen.items())
    assert frozen
    assert gdumb.buffer_bytes >= 12 * (6 * 4 + 8)


def test_what_it_cannot_serve_is_refused(new_model, new_stream, train) -> None:
    with pytest.raises(InputError, match="scenario=domain"):
        train(new_model(), new_stream("domain"), {"gdumb": GDumb()})
    with pytest.raises(InputError, match="gdumb beside lwf"):
        train(new_model(), new_stream(), {"gdumb": GDumb(), "lwf": LwF()})
    with pytest.raises(InputError, match="5 for 6 classes"):
        train(new_model(), new_stream(), {"gdumb": GDumb(memory_size=5)})
