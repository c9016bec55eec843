"""Growth when the training data ask for it: drift, a plateau, saturation. Pure decisions over the census."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.growth.budget import GrowthBudget
from cl_moe.growth.census import Census
from cl_moe.growth.schedules import Birth, Decision, GrowthSchedule
from cl_moe.growth.trace import Looks
from cl_moe.metrics.functional import dead_fraction, effective_experts, usage

Measure = Literal["effective", "usage", "alive"]


class Trigger(GrowthSchedule):
    """A cohort whenever the census says so; never before the first experience."""

    num_experts: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Always the same."""
        return (self.num_experts,)

    def newborns(self, census: Census) -> int:
        """What ``decide`` says."""
        return self.decide(census).num_experts

    def most(self, num_experiences: int) -> list[int]:
        """As if it triggered at every boundary."""
        return [0, *[self.num_experts] * (num_experiences - 1)]

    @property
    def planned(self) -> bool:
        """The data decide."""
        return False

    def _decision(self, alarm: bool, measure: str, value: float, threshold: float, **more: float) -> Decision:
        return Decision(self.num_experts if alarm else 0, measure, value, threshold, more)


class OnDrift(Trigger):
    """A cohort before an experience whose first training examples the model does worse on than on the last.

    The losses of the first ``samples`` training examples of the next experience, under the model as it is,
    are held against the losses of the newest ``samples`` examples of the experience before, each taken in the
    first pass and before the step on it: by a one-sided test of Mann and Whitney (1947; ``scipy``, with
    correction for ties). So both samples are of examples that the model had not seen, and no test data are
    needed. A class that the head does not know yet has an infinite loss: the highest rank, no special case.

    The share of false alarms on a stationary stream is at most ``level`` at each boundary as long as more
    training on the same distribution does not raise the loss on new examples. While a model still learns the
    test errs to the safe side; where many passes over few examples overfit, the gap to the last first pass
    can look like drift, which ``effect`` is for. A distribution that comes back after it was forgotten is
    drift, one that is easier than the last is not: growth is for what the model does worse on.

    Args:
        num_experts: size of each cohort.
        level: of the test, in (0, 1): false alarms per boundary.
        samples: examples on either side, at least 8; of a shorter experience all there are.
        effect: also ask that a new example's loss be above an old one's with at least this probability, ties
            counted half; in [.5, 1], .5 asks nothing.
        init: ``fresh``, ``copy`` or ``zero_output``.
        noise: relative noise of copies.
        hidden: hidden width of the newborns, as in ``EveryExperience``.
        budget: how large the model may become; None: any size.
    """

    def __init__(
        self,
        num_experts: int,
        level: float = 0.01,
        samples: int = 256,
        effect: float = 0.6,
        init: str = "copy",
        noise: float = 0.01,
        hidden: int | None = None,
        budget: GrowthBudget | None = None,
    ) -> None:
        self.num_experts, self.birth = Birth.of(num_experts, init, noise, hidden, budget)
        self.level = _between("level", level, 0, 1, ends=False)
        self.effect = _between("effect", effect, 0.5, 1)
        self.samples = _count("samples", samples, least=8)

    @property
    def looks(self) -> Looks:
        """Single losses."""
        return Looks(samples=self.samples)

    def decide(self, census: Census) -> Decision:
        """Grow if the test's p is at most ``level``; without losses on both sides nothing is born."""
        if census.reference is None or census.coming is None:
            return Decision(0)
        if len(census.reference) == 0 or len(census.coming) == 0:
            return Decision(0)
        p, effect = higher(census.coming[: self.samples], census.reference[-self.samples :])
        alarm = p <= self.level and effect >= self.effect
        return self._decision(alarm, "drift", p, self.level, effect=effect)


class OnPlateau(Trigger):
    """A cohort when the training loss stands still above a target: what there is does not suffice.

    Counted are the experiences trained since the last birth (or the start). The statistic is the share by
    which the lowest loss of the last ``patience`` of them is below the lowest before those; it triggers
    where that is at most ``improvement`` and the newest loss is above ``target`` (the relative rule of
    torch's ``ReduceLROnPlateau``). Made for streams without boundaries, or cut into many experiences.

    Args:
        num_experts: size of each cohort.
        patience: experiences without improvement; at least 1.
        improvement: relative improvement that counts as none, >= 0.
        target: loss at which nothing need grow, nats per example or token or squared error, >= 0.
        init: ``fresh``, ``copy`` or ``zero_output``.
        noise: relative noise of copies.
        hidden: hidden width of the newborns, as in ``EveryExperience``.
        budget: how large the model may become; None: any size.
    """

    def __init__(
        self,
        num_experts: int,
        patience: int = 2,
        improvement: float = 0.02,
        target: float = 0.0,
        init: str = "copy",
        noise: float = 0.01,
        hidden: int | None = None,
        budget: GrowthBudget | None = None,
    ) -> None:
        self.num_experts, self.birth = Birth.of(num_experts, init, noise, hidden, budget)
        self.patience = _count("patience", patience, least=1)
        self.improvement = _between("improvement", improvement, 0, math.inf)
        self.target = _between("target", target, 0, math.inf)

    @property
    def looks(self) -> Looks:
        """Mean losses."""
        return Looks(losses=True)

    def decide(self, census: Census) -> Decision:
        """Grow on a plateau; nothing is born before there are ``patience`` + 1 experiences to tell it by."""
        since = [loss for loss in census.losses[census.last_birth :] if math.isfinite(loss)]
        if len(since) <= self.patience:
            return Decision(0)
        before, recent = min(since[: -self.patience]), min(since[-self.patience :])
        gain = (before - recent) / before if before > 0 else 0.0
        alarm = gain <= self.improvement and since[-1] > self.target
        return self._decision(alarm, "plateau", gain, self.improvement, loss=since[-1])


class OnSaturation(Trigger):
    """A cohort when the experts are used up: little is left over for what comes.

    Counted are the experts that learn, by their mean load in training since their birth; frozen ones are used
    up. The statistic is, on average over layers: ``effective``, exp of the loads' entropy over the number of
    experts (FORMULAS 3), 1 if all are used alike; ``usage``, the share of them that was chosen at all;
    ``alive``, of those with at least a tenth of their mean. Newborns start unused, so the statistic falls at
    a birth and growth waits till they are taken up. A router that balances well is saturated at once.

    Args:
        num_experts: size of each cohort.
        measure: ``"effective"``, ``"usage"`` or ``"alive"``.
        threshold: triggers at this value and above it, in (0, 1].
        init: ``fresh``, ``copy`` or ``zero_output``.
        noise: relative noise of copies.
        hidden: hidden width of the newborns, as in ``EveryExperience``.
        budget: how large the model may become; None: any size.
    """

    def __init__(
        self,
        num_experts: int,
        measure: Measure = "effective",
        threshold: float = 0.8,
        init: str = "copy",
        noise: float = 0.01,
        hidden: int | None = None,
        budget: GrowthBudget | None = None,
    ) -> None:
        self.num_experts, self.birth = Birth.of(num_experts, init, noise, hidden, budget)
        if measure not in get_args(Measure):
            raise InputError(
                got=f"measure={measure!r}", allowed=" or ".join(get_args(Measure)), key="growth.measure"
            )
        self.measure = measure
        self.threshold = _between("threshold", threshold, 0, 1)

    @property
    def looks(self) -> Looks:
        """Loads in training."""
        return Looks(loads=True)

    def decide(self, census: Census) -> Decision:
        """Grow where the mean over layers reaches the threshold; nothing is born before there are loads."""
        layers = [layer for layer in census.layers.values() if layer.trained is not None]
        loads = [layer.of_cohorts(layer.trained, layer.live) for layer in layers]  # type: ignore[arg-type]
        found = [_used(load_n, self.measure) for load_n in loads if float(load_n.sum()) > 0]
        if not found:
            return Decision(0)
        value = sum(found) / len(found)
        return self._decision(value >= self.threshold, "saturation", value, self.threshold)


def higher(new_n: Tensor, old_m: Tensor) -> tuple[float, float]:
    """One-sided test of Mann and Whitney (1947): are the values of one sample larger?

    Args:
        new_n: (n,) no NaN; inf is larger than all others, and equal to itself.
        old_m: (m,) likewise.

    Returns:
        p in [0, 1] under the hypothesis that both samples are of one distribution; and the probability in
        [0, 1] that a new value is above an old one, ties counted half.

    >>> p, effect = higher(torch.tensor([3.0, 4, 5, 6]), torch.tensor([0.0, 1, 2, 2]))
    >>> round(p, 3), effect
    (0.015, 1.0)
    """
    from scipy.stats import mannwhitneyu  # takes most of a second to load

    new, old = new_n.double().cpu(), old_m.double().cpu()
    if bool((torch.cat([new, old]) == new[0]).all()):
        return 1.0, 0.5  # nothing to rank
    found = mannwhitneyu(new.numpy(), old.numpy(), alternative="greater")
    return float(found.pvalue), float(found.statistic) / (len(new) * len(old))


def _used(load_n: Tensor, measure: Measure) -> float:
    if measure == "effective":
        return (effective_experts(load_n) / len(load_n)).item()
    return usage(load_n).item() if measure == "usage" else 1 - dead_fraction(load_n).item()


def _between(name: str, value: float, low: float, high: float, ends: bool = True) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (low <= value <= high if ends else low < value < high):
        allowed = f"a number, at least {low:g}"
        if high < math.inf:
            allowed = f"a number from {low:g} to {high:g}" + ("" if ends else ", neither of them")
        raise InputError(got=f"{name}={value!r}", allowed=allowed, key=f"growth.{name}")
    return float(value)


def _count(name: str, value: int, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        allowed = f"a whole number, at least {least}"
        raise InputError(got=f"{name}={value!r}", allowed=allowed, key=f"growth.{name}")
    return value
