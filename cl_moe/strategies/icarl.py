"""iCaRL: exemplars by herding, distillation, nearest-mean classification (Rebuffi et al. 2017, 1611.07725).

Legend: B batch, C columns of logits, D width of the features, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_moe.layers.precision import wide
from cl_moe.models.base import ContinualModel
from cl_moe.seeds import derive_seed
from cl_moe.strategies.base import Batch, Outlook, Setting, Step, Strategy, tensor_bytes
from cl_moe.strategies.checks import check_new_classes, check_room
from cl_moe.strategies.herding import herd
from cl_moe.strategies.memory import check_memory_size
from cl_moe.strategies.passes import features_of
from cl_moe.strategies.teacher import Teacher

FARTHEST = -5.0
"""Score of a class without a mean: below that of any, since unit vectors are at most 4 apart (squared)."""


class ICaRL(Strategy):
    """Learns features with old answers as targets, and classifies by the nearest mean of exemplars.

    - Training (algorithm 3): new data and exemplars together, every one of them equally often; the loss is a
      binary cross-entropy for each class, summed over classes and averaged over examples, whose target is the
      label for the experience's classes and the old model's answer for those before them. It stands in place
      of the task loss: ``icarl_task`` takes that out.
    - Exemplars (algorithms 4, 5): ``memory_size / classes`` of each class, chosen one by one so that the mean
      of the chosen stays next to the mean of the class; features are normalised to length 1. As classes come,
      each list loses its end.
    - Classification (algorithm 1): the class whose exemplars' mean feature, computed with the model as it is
      after the experience and normalised again, is nearest. Inside an experience, while its classes have no
      exemplars yet, the head's logits are looked at instead.

    Args:
        memory_size: exemplars in all; at least one for each class.
    """

    replaces_task_loss = True

    def __init__(self, memory_size: int = 200) -> None:
        check_memory_size(memory_size, "strategy.icarl.memory_size")
        self.memory_size = memory_size
        self.exemplars: dict[int, Tensor] = {}  # inputs of each class, the most telling first
        self.means: dict[int, Tensor] = {}  # (D,)
        self.teacher = Teacher()
        self._columns: tuple[list[int], list[int]] = ([], [])  # of old classes, of the experience's
        self._column_of: dict[int, int] = {}
        self._per_new, self._owed = 0.0, 0.0
        self._draw = torch.Generator()

    def check(self, setting: Setting) -> None:
        """Means are of classes, and new ones have to come."""
        check_new_classes("icarl", setting.stream)
        check_room("icarl", self.memory_size, setting.stream)

    def begin(self, outlook: Outlook) -> None:
        """Note which columns are old and which are new."""
        model, now = outlook.model, outlook.experience.classes
        self.teacher.meet(model)
        self._column_of = {label: column for column, label in enumerate(model.head.classes)}
        old = [self._column_of[label] for label in self.exemplars if label not in now]
        self._columns = old, [self._column_of[label] for label in now]
        kept = sum(len(inputs) for inputs in self.exemplars.values())
        self._per_new, self._owed, self.means = kept / max(len(outlook.experience.train), 1), 0.0, {}
        self._draw.manual_seed(derive_seed(outlook.seed, outlook.experience.index, "icarl"))

    def batch(self, inputs: Tensor, targets: Tensor) -> Batch:
        """The batch with exemplars behind it: over an epoch as many as there are, drawn with replacement."""
        if not self.exemplars:
            return inputs, targets
        self._owed += len(inputs) * self._per_new
        count = int(self._owed)
        self._owed -= count
        labels = [label for label, kept in self.exemplars.items() for _ in range(len(kept))]
        rows = torch.randint(len(labels), (count,), generator=self._draw)
        old = torch.cat(list(self.exemplars.values()))[rows].to(inputs)
        return torch.cat([inputs, old]), torch.cat([targets, torch.tensor(labels)[rows].to(targets)])

    def loss(self, step: Step) -> dict[str, Tensor]:
        """``icarl``, the method's loss, and ``icarl_task``, minus the task loss that it replaces."""
        old, new = self._columns
        logits_BC = wide(step.logits)
        columns = [self._column_of[label] for label in step.targets.tolist()]
        column_B = torch.tensor(columns, dtype=torch.int64)
        wanted_BC = F.one_hot(column_B, logits_BC.shape[1]).to(logits_BC)
        if self.teacher and old:
            answer = self.teacher.logits(step.model, step.inputs, step.mask)
            wanted_BC[:, old] = wide(answer[:, old]).sigmoid()
        used = [*old, *new]
        loss = F.binary_cross_entropy_with_logits(logits_BC[:, used], wanted_BC[:, used], reduction="sum")
        assert step.task_loss is not None
        return {"icarl": loss / len(column_B), "icarl_task": -step.task_loss}

    def end(self, outlook: Outlook) -> None:
        """Choose exemplars, shorten the old lists, take the means, become the teacher."""
        inputs, targets = outlook.experience.train.tensors
        if not len(inputs):
            return
        labels = list(dict.fromkeys([*self.exemplars, *outlook.experience.classes]))
        share = self.memory_size // len(labels)
        for label in labels:
            pool = inputs[targets == label]
            if len(pool):
                if label in self.exemplars:  # more of a class: choose again among all there are
                    pool = torch.cat([self.exemplars[label], pool])
                self.exemplars[label] = pool[herd(features_of(outlook.model, pool), share)]
            elif label in self.exemplars:
                self.exemplars[label] = self.exemplars[label][:share].clone()
        self.means = {
            label: F.normalize(F.normalize(wide(features_of(outlook.model, kept)), dim=1).mean(0), dim=0)
            for label, kept in self.exemplars.items()
        }
        self.teacher.learn(outlook.model)

    def predict(self, model: ContinualModel, features: Tensor, logits: Tensor) -> Tensor:
        """Minus the squared distance (B, C) to each class's mean, in [-4, 0]; logits while there is none."""
        if not self.means:
            return logits
        classes = model.head.classes[: logits.shape[1]]
        known = [column for column, label in enumerate(classes) if label in self.means]
        scores_BC = torch.full_like(logits, FARTHEST)
        if known:
            means_KD = torch.stack([self.means[classes[column]] for column in known]).to(features.device)
            unit_BD = F.normalize(wide(features), dim=1)
            away_BK = (unit_BD.unsqueeze(1) - means_KD).square().sum(dim=2)
            scores_BC[:, known] = -away_BK.to(scores_BC.dtype)
        return scores_BC

    def state_dict(self) -> dict[str, Any]:
        """Exemplars, means, teacher, draw."""
        own = {"exemplars": self.exemplars, "means": self.means, "owed": self._owed}
        return {**own, "draw": self._draw.get_state(), "teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.exemplars, self.means = dict(state["exemplars"]), dict(state["means"])
        self._owed = state["owed"]
        self._draw.set_state(state["draw"])
        self.teacher.load_state_dict(state["teacher"])

    @property
    def buffer_bytes(self) -> int:
        """Bytes of exemplars, means and the teacher's own values."""
        kept = (self.exemplars, self.means, self.teacher.values)
        return tensor_bytes(*(value for part in kept for value in part.values()))
