"""Linear tasks: what each round holds, against what the definition says."""

from __future__ import annotations

import pytest
import torch

from cl_moe.errors import InputError
from tasks.linear_tasks import linear_tasks


def by_task(stream) -> dict[str, list]:
    found: dict[str, list] = {}
    for experience in stream:
        found.setdefault(experience.name.partition("task ")[2], []).append(experience)
    return found


def test_targets_of_a_task_are_one_linear_map_of_its_samples() -> None:
    stream = linear_tasks(40, num_tasks=4, features=8, samples=5, train_sets=1)
    tasks = by_task(stream)
    assert len(tasks) == 4
    solved = {}
    for name, rounds in tasks.items():
        x_RD = torch.cat([d.tensors[0].flatten(0, 1) for e in rounds for d in (e.train, e.test)]).double()
        y_R = torch.cat([d.tensors[1].flatten() for e in rounds for d in (e.train, e.test)]).double()
        solved[name] = torch.linalg.lstsq(x_RD, y_R.unsqueeze(1)).solution[:, 0]
        torch.testing.assert_close(x_RD @ solved[name], y_R, rtol=0, atol=1e-5)
    pairs = [(a, b) for a in solved for b in solved if a < b]
    assert all((solved[a] - solved[b]).norm() > 0.1 for a, b in pairs), "each has its own"


def test_every_data_set_shows_its_task_s_signal_once() -> None:
    stream = linear_tasks(30, num_tasks=3, features=8, samples=5, noise=1e-6, test_sets=4)
    signals = {}
    for name, rounds in by_task(stream).items():
        seen = torch.cat([e.test.tensors[0] for e in rounds])
        length_BS = seen.norm(dim=2)
        assert ((length_BS > 0.4) == (length_BS == length_BS.amax(dim=1, keepdim=True))).all()
        loudest = seen[torch.arange(len(seen)), length_BS.argmax(dim=1)]
        strength = loudest.norm(dim=1)
        assert 0.5 <= strength.min() < 0.75
        assert 1.25 < strength.max() <= 1.5
        signals[name] = loudest / strength.unsqueeze(1)
        torch.testing.assert_close(signals[name], signals[name][:1].expand_as(signals[name]))
    directions = torch.stack([signal[0] for signal in signals.values()])
    torch.testing.assert_close(directions @ directions.t(), torch.eye(3), rtol=0, atol=1e-4)


def test_its_shape_and_kind() -> None:
    stream = linear_tasks(3, features=7, samples=4, num_tasks=2, train_sets=2, test_sets=5)
    assert (stream.kind, stream.scenario, stream.num_classes) == ("regression", "domain", 0)
    assert stream.input_shape == (4, 7)
    for experience in stream:
        assert [t.shape for t in experience.train.tensors] == [(2, 4, 7), (2, 4)]
        assert [t.shape for t in experience.test.tensors] == [(5, 4, 7), (5, 4)]
        assert experience.classes == ()


def test_a_longer_stream_begins_like_a_shorter_one_and_seeds_draw_others() -> None:
    for short, long in zip(linear_tasks(3), linear_tasks(6)[:3], strict=True):
        assert short.name == long.name
        assert torch.equal(short.train.tensors[0], long.train.tensors[0])
    one, two = linear_tasks(2, data_seed=0), linear_tasks(2, data_seed=1)
    assert not torch.equal(one[0].train.tensors[0], two[0].train.tensors[0])
    moved = linear_tasks(3, order=[2, 0, 1])
    assert torch.equal(moved[0].test.tensors[1], linear_tasks(3)[2].test.tensors[1])


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"num_experiences": 0}, "stream.num_experiences"),
        ({"features": 1}, "stream.features"),
        ({"num_tasks": 11}, "stream.num_tasks"),
        ({"samples": 10}, "stream.samples"),
        ({"noise": 0.0}, "stream.noise"),
        ({"noise": float("nan")}, "stream.noise"),
        ({"train_sets": 0}, "stream.train_sets"),
        ({"test_sets": 0}, "stream.test_sets"),
        ({"scenario": "class"}, "stream.scenario"),
        ({"order": [0]}, "stream.order"),
        ({"data_seed": None}, "seed.data"),
        ({"shape": {"label_noise": 0.1}}, "stream.shape"),
    ],
)
def test_what_is_refused(arguments: dict, key: str) -> None:
    with pytest.raises(InputError) as caught:
        linear_tasks(**arguments)
    assert caught.value.key == key
