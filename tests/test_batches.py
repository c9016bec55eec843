"""Batches: every row once, in an order that hangs on (seed, experience, epoch) and on nothing else."""

import lightning as L  # noqa: N812
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from cl_moe.batches import Order, evaluation_loader, training_loader
from cl_moe.trainer import TrainerSpec


def rows(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count).float().unsqueeze(1), torch.arange(count))


def epoch(loader: DataLoader, number: int) -> list[list[int]]:
    loader.sampler.set_epoch(number)
    return [targets.tolist() for _, targets in loader]


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (1, 8), (7, 8), (8, 8), (9, 8), (23, 4), (16, 1)])
def test_every_row_once_and_remainders_kept(count: int, batch: int) -> None:
    for loader in (training_loader(rows(count), batch, 0, 0), evaluation_loader(rows(count), batch)):
        batches = list(loader)
        assert len(batches) == len(loader) == -(-count // batch)
        assert sorted(torch.cat([targets for _, targets in batches]).tolist()) == list(range(count))
        assert [len(targets) for _, targets in batches[:-1]] == [batch] * (len(batches) - 1)
        for inputs, targets in batches:
            assert torch.equal(inputs[:, 0].long(), targets), "inputs and targets go together"


def test_evaluation_stands_in_order() -> None:
    assert epoch(evaluation_loader(rows(10), 4), 3) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_the_order_hangs_on_seed_experience_and_epoch() -> None:
    def order(seed: int = 0, experience: int = 0, number: int = 0) -> list[list[int]]:
        return epoch(training_loader(rows(40), 8, seed, experience), number)

    first = order()
    assert first == order()
    others = [order(seed=1), order(experience=1), order(number=1), order(number=2), order(seed=1, number=1)]
    for index, other in enumerate(others):
        assert other not in [first, *others[:index]]


def test_an_epochs_order_does_not_hang_on_those_before_it() -> None:
    walked = training_loader(rows(40), 8, 0, 0)
    for number in range(3):
        epoch(walked, number)
    assert epoch(walked, 3) == epoch(training_loader(rows(40), 8, 0, 0), 3)


def test_order_and_global_generator_leave_each_other_alone() -> None:
    torch.manual_seed(5)
    first, expected = epoch(training_loader(rows(20), 8, 0, 0), 0), torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), expected), "a pass drew from the global generator"
    assert epoch(training_loader(rows(20), 8, 0, 0), 0) == first


def test_order_counts_batches_not_rows() -> None:
    assert [len(Order(count, 8)) for count in (0, 1, 8, 9)] == [0, 1, 1, 2]


class Notebook(L.LightningModule):
    """Writes down which rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.epochs: list[list[int]] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.epochs[-1] += batch[1].tolist()
        return (self.weight * batch[0]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_trainer_shuffles_anew_in_every_epoch_of_every_fit() -> None:
    spec = TrainerSpec(epochs=2, accelerator="cpu")
    trainer, module = spec.build(), Notebook()
    for _ in range(2):
        spec.raise_epochs(trainer)
        trainer.fit(module, train_dataloaders=training_loader(rows(20), 8, 0, experience=0))
    assert len(module.epochs) == 4
    assert len({tuple(order) for order in module.epochs}) == 4, "an order came back"
    for number, order in enumerate(module.epochs):
        assert sorted(order) == list(range(20))
        assert order == [row for part in epoch(training_loader(rows(20), 8, 0, 0), number) for row in part]
