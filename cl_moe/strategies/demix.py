"""Experts of a domain (DEMix layers, Gururangan et al. 2021, 2108.05036).

Legend: B batch, S positions, V vocabulary, J domains so far, T = B S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers.precision import wide
from cl_moe.layers.routing import Routing
from cl_moe.strategies.base import Answer, Forward, Outlook, Setting, Strategy

COMPOSES = ("demix", "naive", "rewarming", "shrink_perturb", "si")


class DEMix(Strategy):
    """Every experience trains a cohort of experts of its own, and uses no other; the trunk is shared.

    With ``growth=every_experience`` a cohort is born for each (the paper's is one expert: ``layer.num_experts
    =1 growth.num_experts=1 router.k=1``), and ``growth.init=copy`` starts it as a copy. What an evaluation
    does depends on what the scenario tells:

    - the task-incremental one tells the domain, so its own cohort answers; before it has one, the newest;
    - of a text nothing is told, and all cohorts answer, weighted by the posterior of their domain given the
      tokens so far: ``p(x_t | x_<t) = sum_j p(x_t | x_<t, j) p(j | x_<t)``, ``p(j | x_<t)`` proportional to
      ``p(x_<t | j)`` (equations 3 and 4, with a uniform prior). That takes a pass for each domain.

    Only a language model has a likelihood of its input to tell the domain by; others are refused elsewhere.
    """

    computes = False
    needs_past = True
    reads_batches = True

    def __init__(self) -> None:
        self.groups: list[int] = []  # of each domain so far: its task; -1 where there are none
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def check(self, setting: Setting) -> None:
        """There are cohorts to choose among, and a way to choose."""
        stream, others = setting.stream, [name for name in setting.names if name not in COMPOSES]
        if not setting.model.expert_layers:
            raise InputError(
                got="strategy=demix with a model without experts",
                allowed="layer=moe, peer or pkm, and growth=every_experience",
                key="layer (or strategy)",
            )
        if stream.kind != "language" and stream.scenario != "task":
            raise InputError(
                got=f"strategy=demix with stream.scenario={stream.scenario}, which withholds the domain",
                allowed="stream.scenario=task, or a stream of language, which tells its domain by itself",
                key="stream.scenario (or strategy)",
            )
        if others:
            raise InputError(
                got=f"strategy=demix beside {', '.join(others)}, which mixes domains",
                allowed=f"beside {', '.join(COMPOSES[1:])}",
                key="strategy",
            )

    def begin(self, outlook: Outlook) -> None:
        """From here on a training pass uses the newest cohort."""
        index, experience = outlook.experience.index, outlook.experience
        for layer in outlook.model.expert_layers.values():
            if len(layer.cohorts) != index + 1:
                raise InputError(
                    got=f"strategy=demix with {len(layer.cohorts)} cohorts for {index + 1} experiences",
                    allowed="growth=every_experience: a cohort for each",
                    key="growth",
                )
        group = -1 if outlook.group_of_class is None else int(outlook.group_of_class[experience.classes[0]])
        self.groups = [*self.groups[:index], group]

        def use_own(model: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            if model.training and options.get("cohorts") is None:
                return args, {**options, "cohorts": [index]}
            return None

        self._hook = outlook.model.register_forward_pre_hook(use_own, with_kwargs=True)

    def answer(self, forward: Forward, inputs: Tensor, task_B: Tensor | None) -> Answer:
        """The own domain's answer, or the mixture of all."""
        if not self.groups:
            return forward(None)
        if task_B is None:
            return self._mixture(forward, inputs)
        tasks = task_B.unique().tolist()
        answers = {task: forward(self._cohorts_of(task)) for task in tasks}
        logits, routings = answers[tasks[0]]
        for task in tasks[1:]:  # a batch of several tasks: each row its own
            logits = torch.where((task_B == task).unsqueeze(1), answers[task][0], logits)
        return logits, routings

    def _cohorts_of(self, task: int) -> list[int]:
        own = [domain for domain, group in enumerate(self.groups) if group == task]
        return own or [len(self.groups) - 1]

    def _mixture(self, forward: Forward, inputs_BS: Tensor) -> Answer:
        """log p (B, S, V), and what all passes routed, weighted by the posterior."""
        answers = [forward([domain]) for domain in range(len(self.groups))]
        logs_JBSV = torch.stack([wide(logits).log_softmax(dim=-1) for logits, _ in answers])
        posterior_JBS = posterior(logs_JBSV, inputs_BS)
        mixed_BSV = (posterior_JBS.unsqueeze(-1) + logs_JBSV).logsumexp(dim=0)
        weights_JT = posterior_JBS.exp().flatten(1)
        blocks = answers[0][1]
        return mixed_BSV, {b: _together([r[b] for _, r in answers], weights_JT) for b in blocks}

    def end(self, outlook: Outlook) -> None:
        """An evaluation chooses for itself."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict[str, Any]:
        """Which cohort is of which task."""
        return {"groups": self.groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take that back."""
        self.groups = list(state["groups"])


def posterior(logs_JBSV: Tensor, inputs_BS: Tensor) -> Tensor:
    """(J, B, S) log p(j | x_<t) at each position t, from what each domain said of the tokens before it.

    Args:
        logs_JBSV: log probabilities of the next token, by each domain's experts.
        inputs_BS: the tokens; that at s + 1 is what was predicted at s.
    """
    next_BS = inputs_BS[:, 1:]
    said_JBS = logs_JBSV[:, :, :-1].gather(-1, next_BS.expand(len(logs_JBSV), -1, -1).unsqueeze(-1))
    before_JBS = torch.nn.functional.pad(said_JBS.squeeze(-1).cumsum(dim=-1), (1, 0))
    return before_JBS.log_softmax(dim=0)


def _together(routings: Sequence[Routing], weights_JT: Tensor) -> Routing:
    """One record of what several passes over the same tokens chose, each pass as much as it counts."""
    first = routings[0]
    ragged, T = first.token is not None, first.num_tokens
    weights, kept = [], []
    for routing, weight_T in zip(routings, weights_JT[:, :T], strict=True):
        share = weight_T[routing.token] if routing.token is not None else weight_T.unsqueeze(1)
        weights.append(routing.weight * share.to(routing.weight))
        kept.append(routing.kept)
    along = 0 if ragged else 1
    asked = [r.asked for r in routings if r.asked is not None]
    return first._replace(
        expert=torch.cat([r.expert for r in routings], dim=along),
        weight=torch.cat(weights, dim=along),
        kept=torch.cat(kept, dim=along),
        token=torch.cat([r.token for r in routings if r.token is not None]) if ragged else None,
        asked=torch.cat(asked, dim=along) if asked else None,
        scores=None,
        losses={},
    )
