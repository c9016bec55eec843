"""The hooks: their order, their composition, their state."""

import pytest
import torch
from torch import Tensor

from cl_moe.growth import PastExperts
from cl_moe.strategies import (
    AGEM,
    DER,
    EWC,
    GEM,
    MAS,
    SI,
    BiC,
    ContinualBackprop,
    Cumulative,
    GDumb,
    ICaRL,
    Joint,
    LatentReplay,
    LifelongMoE,
    LwF,
    Naive,
    Outlook,
    Replay,
    Rewarming,
    RouterFreezing,
    RouterReplay,
    ShrinkPerturb,
    Step,
    Strategy,
    WeightAligning,
)


class Recorder(Strategy):
    """Writes down every call, and does a little of everything."""

    def __init__(self, name: str, book: list[tuple[str, ...]], factor: float = 1.0) -> None:
        self.name, self.book, self.factor = name, book, factor
        self.seen: list[Tensor] = []

    def begin(self, outlook: Outlook) -> None:
        self.book.append((self.name, "begin", str(outlook.experience.index)))

    def batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.book.append((self.name, "batch"))
        self.seen.append(inputs.clone())
        return torch.cat([inputs, inputs[:1]]), torch.cat([targets, targets[:1]])

    def loss(self, step: Step) -> dict[str, Tensor]:
        self.book.append((self.name, "loss"))
        self.step = step
        return {self.name: self.factor * step.logits.square().mean()}

    def gradients(self, model: torch.nn.Module) -> None:
        self.book.append((self.name, "gradients"))
        self.gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.weight = model.stem.weight.detach().clone()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)

    def end(self, outlook: Outlook) -> None:
        self.book.append((self.name, "end", str(outlook.experience.index)))
        self.weight_at_end = outlook.model.stem.weight.detach().clone()


def test_the_order_of_the_hooks(new_model, new_stream, train) -> None:
    book: list[tuple[str, ...]] = []
    stream = new_stream(sizes=(16, 8, 8))
    train(new_model(), stream, {"a": Recorder("a", book), "b": Recorder("b", book)}, epochs=1)
    hooks = [(name, hook) for hook in ("batch", "loss", "gradients") for name in "ab"]
    expected: list[tuple[str, ...]] = []
    for experience, steps in enumerate((2, 1, 1)):
        expected += [(name, "begin", str(experience)) for name in "ab"]
        expected += hooks * steps
        expected += [(name, "end", str(experience)) for name in "ab"]
    assert book == expected


def test_hooks_compose(new_model, new_stream, train) -> None:
    book: list[tuple[str, ...]] = []
    a, b = Recorder("a", book), Recorder("b", book)
    train(new_model(), new_stream(sizes=(8,)), {"a": a, "b": b}, epochs=1, lr=0.1)
    assert (len(a.seen[0]), len(b.seen[0]), len(b.step.inputs)) == (8, 9, 10), "each sees the one before it"
    assert a.step is b.step, "one forward for all"
    assert len(a.step.targets) == len(a.step.logits) == 10
    for name, gradient in a.gradient.items():
        assert torch.equal(b.gradient[name], 0.5 * gradient), name
    step = -0.1 * 0.25 * a.gradient["stem.weight"]
    torch.testing.assert_close(a.weight_at_end, a.weight + step, rtol=0, atol=1e-7)


def test_terms_are_added_to_the_loss(new_model, new_stream, train) -> None:
    stream = new_stream(sizes=(8,))
    notes = {}
    for factor in (0.0, 1.0):
        book: list[tuple[str, ...]] = []
        recorder = Recorder("extra", book, factor)
        train(new_model(), stream, {"extra": recorder}, epochs=1)
        notes[factor] = recorder.gradient["head.cohorts.0.bias"]
    logits = recorder.step.logits
    expected = 2 * logits.detach().sum(0) / logits.numel()
    torch.testing.assert_close(notes[1.0] - notes[0.0], expected, rtol=1e-4, atol=1e-6)


STRATEGIES = {
    "naive": Naive,
    "replay": lambda: Replay(memory_size=10, share=0.3),
    "lwf": LwF,
    "lifelong_moe": lambda: LifelongMoE(l2=0.1),
    "joint": Joint,
    "cumulative": Cumulative,
    "balanced": lambda: Replay(memory_size=10, balance="class"),
    "der": lambda: DER(memory_size=10),
    "ewc": lambda: EWC(samples=5, labels="model"),
    "ewc online": lambda: EWC(samples=5, online=True, gamma=0.5),
    "si": SI,
    "mas": lambda: MAS(samples=5),
    "agem": lambda: AGEM(memory_size=10, sample_size=4),
    "gem": lambda: GEM(memory_size=10),
    "icarl": lambda: ICaRL(memory_size=10),
    "gdumb": lambda: GDumb(memory_size=10),
    "router_freezing": RouterFreezing,
    "herding": lambda: Replay(memory_size=10, policy="herding"),
    "weight_aligning": WeightAligning,
    "router_replay": lambda: RouterReplay(memory_size=10, sample_size=4),
    "shrink_perturb": ShrinkPerturb,
    "rewarming": Rewarming,
    "continual_backprop": lambda: ContinualBackprop(rate=0.2, maturity=1),
    "latent_replay": lambda: LatentReplay(memory_size=10, lower_rate=0.5),
    "bic": lambda: BiC(memory_size=12, held_out=0.2),
    "frozen trunk": lambda: LifelongMoE(trunk="frozen"),
}


DENSE_ONLY = ("continual_backprop",)


@pytest.mark.parametrize("layer", ["moe", "peer"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_restart_at_every_boundary_changes_no_bit(
    new_model, new_stream, walk, growing, name: str, layer: str
) -> None:
    """Growth, freezing, momentum and the strategy's own state go through a file that holds plain data."""

    if name in DENSE_ONLY:
        layer = "dense"

    def parts() -> tuple[torch.nn.Module, dict[str, Strategy]]:
        strategy = STRATEGIES[name]()
        strategy.view(new_stream())  # every process takes its view
        return new_model(layer), {name: strategy}

    def rows(restart: bool) -> list[Tensor]:
        model, strategies = parts()
        stream = strategies[name].view(new_stream())
        options = {"lr": 0.05, "momentum": 0.9, "rebuild": parts if restart else None}
        return [
            torch.cat([value.flatten() for value in learner.model.state_dict().values()])
            for moment, learner in walk(model, stream, strategies, growing[layer], PastExperts(), **options)
            if moment == "trained"
        ]

    for whole, restarted in zip(rows(False), rows(True), strict=True):
        assert torch.equal(whole, restarted)
