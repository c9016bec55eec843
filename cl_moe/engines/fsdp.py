"""Fully sharded data parallelism: every rank holds a piece of each parameter (torch's ``fully_shard``)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from cl_moe import agreement
from cl_moe.engines.base import BACKENDS, Device, Engine
from cl_moe.engines.pieces import InPieces, Named, Together
from cl_moe.engines.slices import Sliced
from cl_moe.errors import InputError
from cl_moe.models.attention import Mixer
from cl_moe.models.base import ContinualModel
from cl_moe.optim import OptimizerState, clip_gradients, state_by_name


class FSDP(Engine):
    """Fully sharded data parallelism (FSDP2) through Lightning's ``ModelParallelStrategy``.

    While a model trains, each rank holds its piece of every parameter, gradient and optimizer state; the
    weights of a block are together only while it computes. Between fits every rank has the whole weights.

    With ``tensor_parallel`` so many ranks in a row see the same rows of a batch, and each computes a part of
    the hidden units and of the attention's heads (``slices``); pieces are then of what is left to a rank.

    Args:
        reshard: free a block's weights behind its forward pass and fetch them again for its backward pass:
            less memory for more exchange.
        tensor_parallel: ranks that compute a layer together, a divisor of all; 1: each computes whole layers.
    """

    held = ("naive", "joint", "cumulative", "replay", "der", "lwf", "icarl", "lifelong_moe")

    def __init__(self, reshard: bool = True, tensor_parallel: int = 1) -> None:
        if not isinstance(reshard, bool):
            raise InputError(
                got=f"reshard={reshard!r}", allowed="true or false", key="trainer.engine.reshard"
            )
        _whole_number(tensor_parallel)
        self.reshard, self.tensor_parallel = reshard, tensor_parallel

    def check_start(self, num_ranks: int) -> None:
        """Groups of ranks are of one size."""
        if num_ranks % self.tensor_parallel:
            raise InputError(
                got=f"tensor_parallel={self.tensor_parallel} with {num_ranks} processes",
                allowed="a divisor of trainer.devices x trainer.num_nodes",
                key="trainer.engine.tensor_parallel (or trainer.devices)",
            )

    def strategy(self, device: Device) -> Strategy:
        """The data are split among groups of ranks that compute layers together, the layers in a group."""
        return FSDPStrategy(self.reshard, self.tensor_parallel)


class FSDPStrategy(ModelParallelStrategy, InPieces):
    """Parts the model once strategies against forgetting have begun, since those look at it whole."""

    def __init__(self, reshard: bool, tensor_parallel: int) -> None:
        super().__init__(
            data_parallel_size=agreement.num_ranks() // tensor_parallel,
            tensor_parallel_size=tensor_parallel,
            process_group_backend=BACKENDS["cpu"],  # the group that is there is taken
            timeout=timedelta(minutes=30),
        )
        agreement.hold_pieces()
        self.reshard = reshard
        self.tensor_parallel = tensor_parallel
        self._sharing = agreement.share_layers(tensor_parallel) if tensor_parallel > 1 else None
        self.sliced: Sliced | None = None
        self._used = dict[str, bool]()  # parameters that a rank's examples reached since the last step
        self._pieces = dict[str, nn.Parameter]()

    def setup_environment(self) -> None:
        """Open the ways that pieces are exchanged by, once for all fits."""
        if self._device_mesh is None:
            super().setup_environment()
        else:
            Strategy.setup_environment(self)

    def setup(self, trainer: Any) -> None:
        """The whole model, on its device; no optimizer yet."""
        assert self.model is not None
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.barrier()
        self._reset_optimizers_and_schedulers()
        self.setup_precision_plugin()

    def on_train_start(self) -> None:
        """Part the model, and build its optimizer over the pieces."""
        learner = self.lightning_module
        assert learner is not None
        model = cast(ContinualModel, learner.model)
        self.together = Together(model, lambda: self._part(model))
        if self.sliced is not None:
            state = cast(OptimizerState, learner.optimizer_state)
            own = {name: self.sliced.slices(_inside(name), values) for name, values in state.items()}
            cast(Any, learner).optimizer_state = own
        self.setup_optimizers(learner.trainer)
        self.setup_precision_plugin()

    def _part(self, model: ContinualModel) -> None:
        self.sliced = Sliced(model, self._sharing) if self._sharing is not None else None
        self._pieces, self._used = {name: p for name, p in model.named_parameters() if p.requires_grad}, {}
        mesh = self.device_mesh["data_parallel"]
        if mesh.size() == 1:
            return
        # no model of ours changes what a block returned in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        for block in blocks(model):
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard)
        fully_shard(model, mesh=mesh)
        # a rank whose examples chose none of some experts takes part in the exchange all the same
        cast(FSDPModule, model).set_reduce_scatter_unused_params(True)
        self._pieces = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._watch_use(model)

    def _watch_use(self, model: nn.Module) -> None:
        """Note which parameters get gradients from this rank's examples."""
        self._used = dict.fromkeys(self._pieces, False)
        watched = dict[str, tuple[nn.Parameter, RemovableHandle]]()

        def watch(module: nn.Module, *_: Any) -> None:
            for name, parameter in names[module]:
                held = getattr(*parameter)
                if name not in watched or watched[name][0] is not held:
                    watched[name] = held, held.register_hook(lambda grad, name=name: self._use(name))

        parts = {f"{n}.": m for n, m in model.named_modules() if n and isinstance(m, FSDPModule)}
        names: dict[Any, list[tuple[str, tuple[nn.Module, str]]]] = {m: [] for m in parts.values()}
        names[model] = []
        for name in self._pieces:
            owner: Any = next((m for prefix, m in parts.items() if name.startswith(prefix)), model)
            place, _, last = name.rpartition(".")
            names[owner].append((name, (model.get_submodule(place), last)))
        for module in names:
            module.register_forward_pre_hook(watch)

    def _use(self, name: str) -> None:
        self._used[name] = True

    def post_backward(self, closure_loss: Tensor) -> None:
        """Parameters that no rank's examples reached stand still in a step, as with one process."""
        if self.together is None or not self._used:
            return
        mine = torch.tensor(list(self._used.values()), dtype=torch.uint8)
        for (name, piece), used in zip(self._pieces.items(), agreement.most_each(mine).tolist(), strict=True):
            self._used[name] = bool(used)
            if not used:
                piece.grad = None

    def optimizer_step(self, *arguments: Any, **options: Any) -> Any:
        """After it, use is noted anew."""
        result = super().optimizer_step(*arguments, **options)
        self._used = dict.fromkeys(self._used, False)
        return result

    def weights(self) -> dict[str, Tensor]:
        """As the base class says."""
        model = cast(Any, self.lightning_module).model
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return {name: self._whole(name, value) for name, value in model.state_dict().items()}

    def memory(self, parameters: Named) -> OptimizerState:
        """As the base class says."""
        held = {f"model.{name}": piece for name, piece in self._pieces.items()}
        state = state_by_name(self.optimizers[0], held.items())
        return {
            name: {key: self._whole(_inside(name), value) for key, value in values.items()}
            for name, values in state.items()
        }

    def _whole(self, name: str, value: Any) -> Any:
        """A tensor of pieces and slices put together, on every rank; anything else as it is."""
        value = value.full_tensor() if isinstance(value, DTensor) else value
        return value if self.sliced is None else self.sliced.whole(name, value)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        """As the base class says: slices count with those of the others."""
        if self.sliced is None:
            clip_gradients(parameters, max_norm)
            return
        held = list(parameters)
        cut = {self._pieces[name] for name in self._pieces.keys() & self.sliced.cuts.keys()}
        squares = []
        for some in ([p for p in held if p in cut], [p for p in held if p not in cut]):
            norm = nn.utils.get_total_norm([p.grad for p in some if p.grad is not None])
            squares.append((norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2)
        dist.all_reduce(squares[0], group=self._sharing)
        nn.utils.clip_grads_with_norm_(held, max_norm, (squares[0] + squares[1]).sqrt())


def blocks(model: ContinualModel) -> list[nn.Module]:
    """What is fetched and freed at once: a layer in a feed-forward slot, an attention; the rest."""
    found = [part for part in model.feed_forward if next(part.parameters(), None) is not None]
    return found + [part for part in model.modules() if isinstance(part, Mixer)]


def _inside(name: str) -> str:
    """The name of a learner's parameter in its model."""
    return name.removeprefix("model.")


def _whole_number(size: Any) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        key = "trainer.engine.tensor_parallel"
        raise InputError(got=f"tensor_parallel={size!r}", allowed="a whole number, at least 1", key=key)
