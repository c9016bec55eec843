"""What is measured beside the accuracy matrix: the ``eval`` node, and the past that it is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.metrics.functional import Choices
from cl_moe.models.base import ContinualModel
from cl_moe.models.rewind import RouterState

Decomposition = Literal["end", "always", "never"]


class Measuring:
    """When forgetting is told apart into weights and routing, and what routing is held against.

    Args:
        decomposition: ``"end"``: at the last boundary; ``"always"``: at every one; ``"never"``. A pass over
            the test data of each old experience whose router, experts or head rows changed since.
        samples: test examples of each experience, >= 0, drawn once, the same in every run: their choices of
            experts are remembered, so that drift and saturation can be told; plasticity is measured on
            those of the newest experience; and ``every`` evaluates on them. 0: none of this.
        cumulative: run id or folder of a finished run of the same stream under ``strategy=cumulative``, for
            ``stream/intransigence``; None: none.
        every: optimizer steps between two evaluations inside an experience, on ``samples`` test examples of
            each experience learnt so far and of the present one, for the stability gap (De Lange et al.
            2023); None: none.
        window: only in so many steps after each boundary; None: in the whole experience.

    Attributes:
        matrix: (T + 1, T) accuracy matrix of the cumulative run, once it is read; None without one.

    Raises:
        InputError: another word, or a negative number.
    """

    def __init__(
        self,
        decomposition: Decomposition = "end",
        samples: int = 128,
        cumulative: str | None = None,
        every: int | None = None,
        window: int | None = None,
    ) -> None:
        if decomposition not in get_args(Decomposition):
            raise InputError(
                got=f"decomposition={decomposition!r}",
                allowed=" or ".join(get_args(Decomposition)),
                key="eval.decomposition",
            )
        if not isinstance(samples, int) or samples < 0:
            raise InputError(got=f"samples={samples!r}", allowed="a whole number >= 0", key="eval.samples")
        if cumulative is not None and not (isinstance(cumulative, str) and cumulative.strip()):
            raise InputError(
                got=f"cumulative={cumulative!r}",
                allowed="a run id or run folder, or null",
                key="eval.cumulative",
            )
        _check_inside(every, window, samples)
        self.decomposition, self.samples, self.cumulative = decomposition, samples, cumulative
        self.every, self.window = every, window
        self.matrix: Tensor | None = None

    def due(self, steps: int) -> bool:
        """Whether to evaluate inside an experience, so many optimizer steps after its boundary."""
        if self.every is None or steps < 1 or steps % self.every:
            return False
        return self.window is None or steps <= self.window

    def decomposes(self, boundary: int, num_experiences: int) -> bool:
        """Whether forgetting is decomposed after so many experiences; before the second none is old."""
        due = self.decomposition == "always" or (self.decomposition == "end" and boundary == num_experiences)
        return due and boundary >= 2


class Past:
    """What later rows are held against: of each trained experience, how it was routed at its end.

    Attributes:
        routers: all that chose then, by experience; only router parts, and one copy of what did not change.
        choices: experts of its probe set then, by experience and expert layer.
    """

    def __init__(self) -> None:
        self.routers: dict[int, RouterState] = {}
        self.choices: dict[int, dict[int, Choices]] = {}

    def remember(
        self, experience: int, model: ContinualModel, choices: Mapping[int, Choices], measuring: Measuring
    ) -> None:
        """Take up an experience that was just trained and evaluated."""
        if measuring.decomposition != "never":
            before = self.routers.get(experience - 1)
            self.routers[experience] = RouterState.of(model, before)
        self.choices[experience] = dict(choices)

    def forget(self) -> None:
        """Hold nothing."""
        self.routers, self.choices = {}, {}

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds, each tensor once."""
        held = [value for then in self.routers.values() for value in then.values.values()]
        held += [part for row in self.choices.values() for found in row.values() for part in found[:2]]
        return sum(t.numel() * t.element_size() for t in {id(tensor): tensor for tensor in held}.values())

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python only."""
        return {
            "routers": {index: then.state_dict() for index, then in self.routers.items()},
            "choices": {
                index: {layer: tuple(found) for layer, found in row.items()}
                for index, row in self.choices.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.routers = {index: RouterState(**then) for index, then in state["routers"].items()}
        self.choices = {
            index: {layer: Choices(*found) for layer, found in row.items()}
            for index, row in state["choices"].items()
        }


def uneven_layers(model: ContinualModel) -> list[int]:
    """Blocks whose experts drop tokens or take those they like: not every token is computed by as many."""
    routers = {block: getattr(layer, "router", None) for block, layer in model.expert_layers.items()}
    return [
        block
        for block, router in routers.items()
        if router is not None and (router.cost_varies or not router.causal)
    ]


def _check_inside(every: int | None, window: int | None, samples: int) -> None:
    for name, steps in (("every", every), ("window", window)):
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise InputError(
                got=f"{name}={steps!r}",
                allowed="a whole number of steps, at least 1, or null",
                key=f"eval.{name}",
            )
    if window is not None and (every is None or window < every):
        raise InputError(
            got=f"window={window} with every={every}: no evaluation inside an experience",
            allowed="eval.every, at most as large as eval.window",
            key="eval.window (or eval.every)",
        )
    if every is not None and samples == 0:
        raise InputError(
            got=f"every={every} with samples=0: nothing to evaluate on",
            allowed="eval.samples of at least 1, or eval.every=null",
            key="eval.samples (or eval.every)",
        )
