"""Replay: a reservoir that is fair and exact, a share that is met, a restart that changes nothing."""

import io
from itertools import pairwise

import pytest
import torch
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.strategies import Replay
from cl_moe.strategies.herding import herd
from cl_moe.stream import Experience, Stream

SIZES = (10, 30, 20)


def numbered(sizes: tuple[int, ...] = SIZES) -> Stream:
    """Every training row is a number of its own, its target the number times ten; test rows are negative."""
    experiences, first = [], 0
    for index, size in enumerate(sizes):
        row = torch.arange(first, first + size)
        train = TensorDataset(row.float().unsqueeze(1), row * 10)
        test = TensorDataset(-1 - row.float().unsqueeze(1), -row * 10)
        experiences.append(Experience(index, f"e{index}", train, test, (index,)))
        first += size
    return Stream("numbered", "classification", "class", tuple(experiences), len(sizes), (1,))


def filled(outlook, memory_size: int, seed: int = 0, sizes: tuple[int, ...] = SIZES) -> Replay:
    replay = Replay(memory_size=memory_size)
    for experience in numbered(sizes):
        replay.begin(outlook(experience, seed))
        replay.end(outlook(experience, seed))
    return replay


def members(replay: Replay) -> list[int]:
    return replay.memory[0][:, 0].long().tolist()


@pytest.mark.parametrize("memory_size", [1, 7, 10, 11, 59, 60, 100])
def test_the_memory_holds_distinct_training_rows_with_their_targets(outlook, memory_size: int) -> None:
    replay = Replay(memory_size=memory_size)
    offered = 0
    for experience in numbered():
        replay.begin(outlook(experience))
        replay.end(outlook(experience))
        offered += len(experience.train)
        held = members(replay)
        assert len(held) == len(set(held)) == min(memory_size, offered)
        assert all(0 <= row < offered for row in held), "only training rows of what was trained"
        assert replay.memory[1].tolist() == [10 * row for row in held]
        assert replay.seen == offered
    assert replay.buffer_bytes == len(held) * (4 + 8)


def test_every_row_is_kept_equally_often(outlook) -> None:
    """Vitter's algorithm R over a stream of uneven experiences: 60 rows, 15 places, 1,000 seeds."""
    runs, places = 1000, 15
    count = torch.zeros(sum(SIZES))
    for seed in range(runs):
        count[members(filled(outlook, places, seed))] += 1
    chance = places / sum(SIZES)
    sigma = (runs * chance * (1 - chance)) ** 0.5
    assert count.sum() == runs * places
    assert ((count - runs * chance).abs() < 5 * sigma).all()
    for part in count.split(list(SIZES)):  # no experience is favoured as a whole
        assert abs(part.sum() - len(part) * runs * chance) < 5 * sigma * len(part) ** 0.5


def test_a_class_sorted_experience_is_not_kept_in_its_order(outlook) -> None:
    """Rows past a full memory may not be dropped by their place in the data set."""
    kept = torch.zeros(40)
    for seed in range(300):
        kept[members(filled(outlook, 10, seed, sizes=(40,)))] += 1
    assert abs(kept[:10].mean() - kept[-10:].mean()) < 10


def test_the_reservoir_hangs_on_the_seed_only(outlook) -> None:
    torch.manual_seed(1)
    first = members(filled(outlook, 15))
    torch.rand(100)
    assert members(filled(outlook, 15)) == first
    assert members(filled(outlook, 15, seed=1)) != first


@pytest.mark.parametrize("share", [0.5, 0.2, 0.1, 0.3, 0.75, 0.01])
@pytest.mark.parametrize("batch", [32, 7])
def test_the_share_is_met_on_average(outlook, share: float, batch: int) -> None:
    stream = numbered()
    replay = Replay(memory_size=15, share=share)
    replay.begin(outlook(stream[0]))
    replay.end(outlook(stream[0]))
    replay.begin(outlook(stream[1]))
    new, old = 0, 0
    for _ in range(300):
        inputs, targets = replay.batch(torch.full((batch, 1), 500.0), torch.full((batch,), 5000))
        assert torch.equal(inputs[:batch], torch.full((batch, 1), 500.0)), "new rows come first, all of them"
        assert torch.equal(inputs[:, 0].long() * 10, targets)
        assert set(inputs[batch:, 0].long().tolist()) <= set(members(replay))
        new, old = new + batch, old + len(inputs) - batch
        assert abs(old - new * share / (1 - share)) < 1 + 1e-6, "never more than one example off"
    assert old / (new + old) == pytest.approx(share, abs=1 / new)


def test_half_means_as_many_old_as_new_in_every_batch(outlook) -> None:
    replay = filled(outlook, 15)
    for size in (32, 32, 5, 32, 1):
        assert len(replay.batch(torch.zeros(size, 1), torch.zeros(size).long())[0]) == 2 * size


def test_every_memory_is_replayed(outlook) -> None:
    replay = filled(outlook, 15)
    drawn = [replay.batch(torch.full((64, 1), 500.0), torch.zeros(64).long())[0][64:, 0] for _ in range(20)]
    count = torch.bincount(torch.cat(drawn).long(), minlength=60)[members(replay)]
    expected = 64 * 20 / 15
    assert ((count - expected).abs() < 5 * expected**0.5).all()


def test_nothing_is_added_before_there_is_a_memory(outlook) -> None:
    replay = Replay(memory_size=5)
    replay.begin(outlook(numbered()[0]))
    inputs, targets = replay.batch(torch.zeros(8, 1), torch.zeros(8).long())
    assert (len(inputs), len(targets), replay.buffer_bytes) == (8, 8, 0)


def test_a_restart_at_any_boundary_changes_nothing(outlook) -> None:
    sizes = (10, 30, 20, 25)

    def trace(restart_after: int | None) -> list[torch.Tensor]:
        replay, seen = Replay(memory_size=12, share=0.3), []
        for experience in numbered(sizes):
            replay.begin(outlook(experience))
            for _ in range(4):
                seen += replay.batch(torch.full((9, 1), 500.0), torch.full((9,), 5000))
            replay.end(outlook(experience))
            seen += [column.clone() for column in replay.memory]
            if experience.index == restart_after:
                file = io.BytesIO()
                torch.save(replay.state_dict(), file)
                replay = Replay(memory_size=12, share=0.3)
                file.seek(0)
                replay.load_state_dict(torch.load(file, weights_only=True))
        return seen

    whole = trace(None)
    for boundary in range(4):
        restarted = trace(boundary)
        assert all(torch.equal(a, b) for a, b in zip(whole, restarted, strict=True)), boundary


def test_a_loaded_state_is_not_written_to(outlook) -> None:
    stream, replay = numbered(), Replay(memory_size=5)
    replay.end(outlook(stream[0]))
    state = replay.state_dict()
    kept = [column.clone() for column in state["memory"]]
    other = Replay(memory_size=5)
    other.load_state_dict(state)
    other.end(outlook(stream[1]))
    assert not torch.equal(other.memory[0], kept[0])
    assert all(torch.equal(a, b) for a, b in zip(state["memory"], kept, strict=True))


def test_an_experience_without_data_changes_nothing(outlook) -> None:
    replay, before = filled(outlook, 15), members(filled(outlook, 15))
    nothing = TensorDataset(torch.zeros(0, 1), torch.zeros(0).long())
    replay.end(outlook(Experience(3, "empty", nothing, nothing)))
    assert (members(replay), replay.seen) == (before, 60)


def test_in_training_the_memory_never_holds_test_data(new_model, new_stream, walk) -> None:
    stream, replay = new_stream(), Replay(memory_size=1000)
    trained: list[bytes] = []
    for moment, learner in walk(new_model("moe"), stream, {"replay": replay}, epochs=3):
        if moment == "trained":
            trained += [row.numpy().tobytes() for row in learner.experience.train.tensors[0]]
            held = [row.numpy().tobytes() for row in replay.memory[0]]
            assert sorted(held) == sorted(trained), "each training row once, whatever the epochs"
    sizes = [len(experience.train) for experience in stream]
    assert all(a != b for a, b in pairwise(sizes))
    assert replay.seen == sum(sizes)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"memory_size": 0}, "strategy.replay.memory_size"),
        ({"memory_size": 2.5}, "strategy.replay.memory_size"),
        ({"share": 0.0}, "strategy.replay.share"),
        ({"share": 1.0}, "strategy.replay.share"),
        ({"share": float("nan")}, "strategy.replay.share"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, float], key: str) -> None:
    with pytest.raises(InputError) as caught:
        Replay(**options)
    assert caught.value.key == key


def test_a_smaller_memory_takes_over_a_fair_part(outlook) -> None:
    large = filled(outlook, 40)
    small = Replay(memory_size=12)
    small.load_state_dict(large.state_dict())
    held = members(small)
    assert len(held) == len(set(held)) == 12
    assert set(held) < set(members(large))
    assert small.memory[1].tolist() == [10 * row for row in held]
    assert small.seen == large.seen
    small.begin(outlook(numbered()[0]))
    small.end(outlook(numbered()[0]))
    assert len(members(small)) == 12


def test_a_larger_memory_cannot_be_fair_once_rows_were_let_go(outlook) -> None:
    with pytest.raises(InputError) as caught:
        Replay(memory_size=50).load_state_dict(filled(outlook, 40).state_dict())
    assert caught.value.key == "strategy.replay.memory_size"
    whole = filled(outlook, 60)
    larger = Replay(memory_size=90)
    larger.load_state_dict(whole.state_dict())
    assert members(larger) == members(whole)


@pytest.mark.parametrize("policy", ["balanced", "herding"])
def test_every_class_has_its_share_and_herded_ones_are_the_classes_means(
    walk, new_model, new_stream, policy: str
) -> None:
    replay = Replay(memory_size=13, policy=policy)
    offered: dict[int, list[list[float]]] = {}
    for moment, learner in walk(new_model(), new_stream(), {"replay": replay}):
        if moment == "adapted":
            continue
        inputs, targets = learner.experience.train.tensors
        for label in learner.experience.classes:
            offered[label] = inputs[targets == label].tolist()
        count = replay.memory[1].bincount(minlength=len(offered)).tolist()
        whole = policy == "herding"
        assert count == [13 // len(offered) + (not whole and c < 13 % len(offered)) for c in offered]
        for row, label in zip(*(column.tolist() for column in replay.memory), strict=True):
            assert row in offered[label]
        if whole:
            label = learner.experience.classes[0]
            pool = torch.tensor(offered[label])
            model = learner.model.eval()
            features = torch.relu(model.blocks[0](torch.relu(model.stem(pool)))[0])
            model.train()
            kept = replay.memory[0][replay.memory[1] == label]
            expected = pool[herd(features.detach(), len(kept))]
            assert torch.equal(kept, expected)


def test_the_older_name_of_a_balanced_memory(outlook) -> None:
    assert Replay(balance="class").policy == Replay(policy="balanced").policy == "balanced"
    with pytest.raises(InputError, match="herding is balanced"):
        Replay(balance="class", policy="herding")
    with pytest.raises(InputError, match=r"strategy\.replay\.policy"):
        Replay(policy="fifo")
    with pytest.raises(InputError, match="policy=herding that begins with a memory of policy=reservoir"):
        Replay(policy="herding").load_state_dict(filled(outlook, 10).state_dict())
