"""Linear regression, a task per round (Li et al. 2024, 2406.16437, definition 1).

Legend: T rounds, N tasks, B data sets of one experience, S samples of a data set, D features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.seeds import generator
from cl_moe.stream import Experience, Stream
from tasks.arrange import arrange, finish, whole

_STRENGTH = 0.5, 1.5
"""Of a signal: drawn evenly between."""


def linear_tasks(
    num_experiences: int = 60,
    num_tasks: int = 6,
    features: int = 10,
    samples: int = 6,
    noise: float = 0.4,
    train_sets: int = 5,
    test_sets: int = 16,
    scenario: str = "domain",
    order: Sequence[int] | None = None,
    seed: int | None = None,
    cut: int = 1,
    tune_on_first: int | None = None,
    shape: Mapping[str, object] | None = None,
    data_seed: int = 0,
) -> Stream:
    """Rounds of a few tasks that come again and again; an example is a whole data set, (S, D), and its (S,).

    Each task has a weight vector w, drawn from N(0, 1/D) per entry, and a signal v of length 1, orthogonal to
    those of the others. A round draws a task, and data sets of S < D samples: one of them, at a place drawn
    for it, is v times a strength drawn from U(.5, 1.5), the others are N(0, noise^2). Targets are x . w: one
    data set does not determine w, and the signal alone tells which task it is. The test data of a round are
    data sets of its task drawn anew, so a score is minus the mean of ``(x . (w_model - w))^2``.

    Args:
        num_experiences: T, at least 1.
        num_tasks: N, 1 .. D.
        features: D, at least 2.
        samples: S, 1 .. D - 1.
        noise: standard deviation of the samples that are no signal, above 0.
        train_sets: data sets that a round is trained on, at least 1, which is the paper's.
        test_sets: data sets that a round is tested on, at least 1.
        scenario: ``domain`` only: there are no classes.
        order: the rounds in order of arrival, a permutation of 0 .. T - 1.
        seed: draws that order; null and no ``order``: as drawn.
        cut: how many shorter experiences each round is cut into.
        tune_on_first: keep only so many rounds.
        shape: the shape of time; see ``tasks.shapes.Shape``.
        data_seed: draws tasks, rounds and data.

    Raises:
        InputError: a value that is not allowed.
    """
    if scenario != "domain":
        raise InputError(
            got=f"{scenario!r}", allowed="domain: numbers have no classes", key="stream.scenario"
        )
    whole(num_experiences, "stream.num_experiences", 1)
    whole(features, "stream.features", 2)
    whole(num_tasks, "stream.num_tasks", 1, features, "stream.features")
    whole(samples, "stream.samples", 1, features - 1, "stream.features")
    whole(train_sets, "stream.train_sets", 1)
    whole(test_sets, "stream.test_sets", 1)
    if not isinstance(noise, int | float) or not 0 < noise < math.inf:
        raise InputError(got=f"{noise!r}", allowed="a finite number above 0", key="stream.noise")
    whole(data_seed, "seed.data")
    draw = generator(data_seed, "linear tasks")
    weight_ND = torch.randn(num_tasks, features, generator=draw) / features**0.5
    signal_ND = torch.linalg.qr(torch.randn(features, num_tasks, generator=draw))[0].t()
    task_T = torch.randint(num_tasks, (num_experiences,), generator=draw).tolist()

    def data(round_: int, num: int, purpose: str) -> TensorDataset:
        task = task_T[round_]
        drawn = generator(data_seed, round_, purpose)
        x_BSD = _samples(num, samples, signal_ND[task], noise, drawn)
        return TensorDataset(x_BSD, x_BSD @ weight_ND[task])

    experiences = tuple(
        Experience(
            index=index,
            name=f"round {round_}, task {task_T[round_]}",
            train=data(round_, train_sets, "train"),
            test=data(round_, test_sets, "test"),
        )
        for index, round_ in enumerate(arrange(range(num_experiences), order, seed))
    )
    stream = Stream("linear_tasks", "regression", "domain", experiences, 0, (samples, features))
    return finish(stream, tune_on_first, cut, data_seed, shape)


def _samples(num: int, samples: int, signal_D: Tensor, noise: float, draw: torch.Generator) -> Tensor:
    """(B, S, D): data sets, each of which shows the signal once."""
    x_BSD = noise * torch.randn(num, samples, len(signal_D), generator=draw)
    low, high = _STRENGTH
    strength_B1 = low + (high - low) * torch.rand(num, 1, generator=draw)
    place_B = torch.randint(samples, (num,), generator=draw)
    x_BSD[torch.arange(num), place_B] = strength_B1 * signal_D
    return x_BSD
