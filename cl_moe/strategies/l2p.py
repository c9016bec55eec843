"""Learning to prompt (Wang et al. 2022, 2112.08654): a frozen body, and prompts chosen by what it sees.

Legend: B batch, S patches, D width, M prompts in the pool, N chosen ones, L tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.precision import wide
from cl_moe.models.attention import Mixer
from cl_moe.models.base import ContinualModel
from cl_moe.models.patch_transformer import PatchTransformer
from cl_moe.seeds import generator
from cl_moe.strategies.base import Outlook, Setting, Step, Strategy, tensor_bytes
from cl_moe.strategies.checks import check_beside
from cl_moe.strategies.passes import learning, quiet
from cl_moe.strategies.teacher import check_weight

LEARNING = (
    *("agem", "continual_backprop", "distill_from", "gem", "icarl", "latent_replay", "lifelong_moe", "lwf"),
    *("router_freezing", "router_replay", "shrink_perturb", "sparse_memory"),
)
"""Strategies made for a body that learns, or whose teacher would be asked with the prompts of now."""


class Chosen(NamedTuple):
    """What was chosen for a batch.

    Args:
        prompts: (B, N L, D).
        distance: (B,) sum over the chosen keys of 1 - cosine(query, key).
    """

    prompts: Tensor
    distance: Tensor


class L2P(Strategy):
    """After its pretraining the body stands still; a pool of prompts and the head learn.

    A query q(x), the mean of what the frozen body makes of the patches, chooses the ``top_n`` prompts whose
    keys are nearest by cosine (equation 3). They stand before the patches, and the head reads the mean over
    their positions. The loss is the task's plus ``pull * mean sum (1 - cos(q, k))`` over the chosen keys
    (equation 5). Prompts and keys learn by an Adam of their own.

    The first ``pretraining`` experiences train the body as without this strategy. Or begin with a body that
    is trained: ``branch=<run>@2 strategy.l2p.pretraining=2``. What ``load_model`` loads is the body alone.

    Args:
        pool_size: M.
        length: L.
        top_n: N.
        pull: lambda of the keys' term, >= 0.
        lr: of prompts and keys, > 0.
        pretraining: experiences in which the body learns.
        seed: prompts and keys are drawn from it, uniform in [-1, 1].
    """

    stops_learning = True

    def __init__(
        self,
        pool_size: int = 10,
        length: int = 5,
        top_n: int = 5,
        pull: float = 0.5,
        lr: float = 0.03,
        pretraining: int = 1,
        seed: int = 0,
    ) -> None:
        check_weight(pull, "strategy.l2p.pull")
        check_weight(lr, "strategy.l2p.lr", above=True)
        least = {"pool_size": (pool_size, 1), "length": (length, 1), "pretraining": (pretraining, 0)}
        for name, (value, low) in {**least, "top_n": (top_n, 1)}.items():
            if not isinstance(value, int) or value < low or (name == "top_n" and value > pool_size):
                allowed = f"a whole number, at least {low}" + (
                    ", at most the pool" if name == "top_n" else ""
                )
                raise InputError(got=f"{name}={value!r}", allowed=allowed, key=f"strategy.l2p.{name}")
        self.pool_size, self.length, self.top_n = pool_size, length, top_n
        self.pull, self.lr, self.pretraining, self.seed = pull, lr, pretraining, seed
        self.active, self.needs_past = False, pretraining > 0
        self.prompts_MLD, self.keys_MD = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
        self._optimizer: torch.optim.Optimizer | None = None
        self._chosen: Chosen | None = None  # of the pass under way
        self._pulls: list[Tensor] = []  # of the step's training passes

    def check(self, setting: Setting) -> None:
        """The model reads patches; its passes are led through the prompts from here on."""
        model = setting.model
        check_beside("l2p", setting, LEARNING, "is made for a body that learns")
        if not isinstance(model, PatchTransformer) or not isinstance(model.mixers[0], Mixer) or model.depths:
            raise InputError(
                got=f"strategy=l2p with {type(model).__name__}",
                allowed="model=patch_transformer (no body that reads tokens), without model.depth, its first "
                "block with attention",
                key="model (or strategy)",
            )
        width = model.head.dim
        draw = generator(self.seed, "l2p")
        prompts = torch.rand(self.pool_size, self.length, width, generator=draw) * 2 - 1
        keys = torch.rand(self.pool_size, width, generator=draw) * 2 - 1
        self.prompts_MLD, self.keys_MD = nn.Parameter(prompts), nn.Parameter(keys)
        self._optimizer = torch.optim.Adam([self.prompts_MLD, self.keys_MD], lr=self.lr)
        model.register_forward_pre_hook(self._choose)
        model.mixers[0].register_forward_pre_hook(self._stand_before)
        model.norm.register_forward_hook(self._read_prompts)
        model.register_forward_hook(self._forget)

    def _choose(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Ask the body, without prompts, and choose; for the pass that comes now."""
        self._chosen = None
        if not self.active:
            return
        assert isinstance(model, PatchTransformer)
        with quiet(model), torch.no_grad():
            query_BD = model.read(args[0])[0].mean(dim=1)
        self._chosen = choose(query_BD, self.keys_MD, self.prompts_MLD, self.top_n)
        if model.training and torch.is_grad_enabled():
            self._pulls.append(self._chosen.distance.mean())

    def _stand_before(self, mixer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._chosen is None:
            return None
        x_BSD = args[0]
        return (torch.cat([self._chosen.prompts.to(x_BSD), x_BSD], dim=1), *args[1:])

    def _read_prompts(self, norm: nn.Module, args: tuple[Any, ...], out_BSD: Tensor) -> Tensor | None:
        if self._chosen is None:
            return None
        return out_BSD[:, : self.top_n * self.length]

    def _forget(self, model: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self._chosen = None

    def begin(self, outlook: Outlook) -> None:
        """Prompts are used from the end of the pretraining on."""
        device = next(outlook.model.parameters()).device
        for own in (self.prompts_MLD, self.keys_MD):
            own.data = own.data.to(device)
        self.active = outlook.experience.index >= self.pretraining

    def loss(self, step: Step) -> dict[str, Tensor]:
        """The keys' term, for the pass of the batch."""
        pulls, self._pulls = self._pulls, []
        return {"l2p": self.pull * pulls[0]} if pulls else {}

    def gradients(self, model: ContinualModel) -> None:
        """Prompts and keys make their step; the body gets none."""
        if not self.active:
            return
        head = {id(parameter) for parameter in model.head.parameters()}
        for parameter in learning(model).values():
            if id(parameter) not in head:
                parameter.grad = None
        assert self._optimizer is not None
        self._optimizer.step()
        self._optimizer.zero_grad()

    def costs(self, model: ContinualModel) -> dict[str, float]:
        """Parameters of prompts and keys, which are not among the model's."""
        return {"cost/prompt_params": self.prompts_MLD.numel() + self.keys_MD.numel()}

    def state_dict(self) -> dict[str, Any]:
        """Prompts, keys, their optimizer, whether they are used."""
        assert self._optimizer is not None
        own = {"prompts": self.prompts_MLD.detach().clone(), "keys": self.keys_MD.detach().clone()}
        return {**own, "optimizer": self._optimizer.state_dict(), "active": self.active}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        assert self._optimizer is not None
        self.prompts_MLD.data.copy_(state["prompts"])
        self.keys_MD.data.copy_(state["keys"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.active = state["active"]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of prompts and keys, and of what their Adam remembers."""
        states = self._optimizer.state.values() if self._optimizer is not None else ()
        return tensor_bytes(self.prompts_MLD, self.keys_MD, *(v for state in states for v in state.values()))


def choose(query_BD: Tensor, keys_MD: Tensor, prompts_MLD: Tensor, top_n: int) -> Chosen:
    """The prompts of the nearest keys, the nearest first, and how far those are (equations 3 and 5)."""
    near_BM = F.normalize(wide(query_BD), dim=1) @ F.normalize(wide(keys_MD), dim=1).t()
    best_BN = near_BM.topk(top_n, dim=1)
    return Chosen(prompts_MLD[best_BN.indices].flatten(1, 2), (1 - best_BN.values).sum(dim=1))
