"""Arms by their names: the same for the same configuration, however it was written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cl_moe import launch


@pytest.fixture
def arms(command: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """``arms("layer=moe", ...)``: the arms that a command would run."""
    found: list[str] = []

    def note(config: DictConfig) -> float:
        labels = {group: str(HydraConfig.get().runtime.choices.get(group)) for group in launch.GROUPS}
        labels["strategy"] = "+".join(map(str, config.strategy))
        found.append(launch.arm_of(config, labels, None))
        return 0.0

    monkeypatch.setattr(launch, "run", note)

    def run(*arguments: str) -> list[str]:
        found.clear()
        done = command(*arguments)
        assert done.status == 0, done.text
        return list(found)

    return run


SAME = [
    (("strategy=replay", "strategy.replay.memory_size=200"), ("strategy=replay",)),
    (("optimizer=sgd",), ()),
    (("trainer.epochs=10", "++model.width=256", "optimizer=sgd"), ()),
    (("optimizer=adamw", "optimizer.betas=[0.9,0.95]"), ("optimizer=adamw",)),
    (("stream=permuted_digits", "trainer.batch_size=32"), ("stream=permuted_digits",)),
    (("layer=moe", "router.k=2", "layer.hidden=64"), ("layer=moe",)),
]
OTHERS = [
    ("strategy=replay", "strategy.replay.memory_size=199"),
    ("model=mlp", "optimizer=adamw"),
    ("optimizer=adamw", "optimizer.lr=0.1"),  # the default of the optimizer that it replaces
    ("model.width=128",),
    ("+model.more=null",),
    ("~optimizer.weight_decay",),
]


@pytest.mark.parametrize(("given", "short"), SAME, ids=lambda words: " ".join(words) or "-")
def test_what_repeats_a_default_makes_no_other_arm(given: tuple, short: tuple, arms: Callable):
    assert arms(*given) == arms(*short)


@pytest.mark.parametrize("given", OTHERS, ids=" ".join)
def test_what_changes_a_value_is_in_the_name(given: tuple, arms: Callable):
    (name,) = arms(*given)
    assert given[-1] in name.split()
    assert "model=mlp" not in name


def test_of_a_sweep_each_arm_has_one_name(arms: Callable):
    names = arms("-m", "strategy=replay", "strategy.replay.memory_size=200,100", "model.width=256,128")
    more = " strategy.replay.memory_size=100"
    wide = "dense replay"
    assert names == [wide, f"{wide} model.width=128", wide + more, f"{wide} model.width=128{more}"]
