"""Lightning's part of ZeRO: a model that DeepSpeed takes to pieces for each fit."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import Tensor, nn

from cl_moe import agreement
from cl_moe.engines.base import BACKENDS, Device
from cl_moe.engines.pieces import InPieces, Named, Together
from cl_moe.memory import optimizer_bytes
from cl_moe.optim import OptimizerState

_BUCKET = 2**23  # numbers


class ZeroStrategy(DeepSpeedStrategy, InPieces):
    """Parts the model once strategies against forgetting have begun; runs on CPUs, too."""

    def __init__(self, zero: dict[str, Any], device: Device) -> None:
        os.environ["DS_ACCELERATOR"] = device
        super().__init__(config={"zero_optimization": zero}, logging_level=logging.ERROR)
        self.zero, self.engine = zero, cast(Any, None)
        agreement.hold_pieces()
        self._joined = False
        self._group = dict[str, int]()  # of every parameter that learns, by name

    def setup_environment(self) -> None:
        """Tell DeepSpeed of the process group that is there, once for all fits."""
        Strategy.setup_environment(self)
        if self._joined:
            return
        with _quiet():
            import deepspeed
        # it would try what it could build with a C++ compiler, to sum faster on one machine's CPUs
        vars(deepspeed.ops)["__compatible_ops__"] = {}
        warnings.filterwarnings("ignore", ".*torch.distributed.* is deprecated", FutureWarning)
        self.set_world_ranks()
        deepspeed.init_distributed(BACKENDS["cpu"], timeout=timedelta(minutes=30), verbose=False)
        self._joined = True

    def setup(self, trainer: Any) -> None:
        """The whole model, on its device; no optimizer yet."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model = self.lightning_module
        self.model_to_device()
        self.barrier()
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def on_train_start(self) -> None:
        """Part the model, and build its optimizer over the pieces."""
        learner = cast(Any, self.lightning_module)
        with _quiet():
            self.together = Together(learner.model, lambda: self._part(learner))
        if learner.optimizer_state:
            self._remember(learner.optimizer_state, learner.named_parameters())
            learner.optimizer_state = {}
        self.optimizers = [self.engine.optimizer]
        self.setup_precision_plugin()

    def _part(self, learner: Any) -> None:
        import deepspeed

        for module in learner.model.modules():  # DeepSpeed never lets go of a parameter that it has seen
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.data, parameter.requires_grad)
        optimizer = self._optimizer(learner)
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # stage 3 begins with a step, to make the optimizer's state
        self.engine, *_ = deepspeed.initialize(
            model=_Holder(learner.model),
            model_parameters=[p for p in learner.model.parameters() if p.requires_grad],
            optimizer=optimizer,
            config=self._config(learner),
            dist_init_required=False,
        )
        for group, rate in zip(self.engine.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        for _, flat in self._flats():
            for value in self.engine.optimizer.state.get(flat, {}).values():
                if isinstance(value, Tensor):
                    value.zero_()

    def _optimizer(self, learner: Any) -> torch.optim.Optimizer:
        """Of whole parameters; those that have made another number of steps are another group.

        DeepSpeed makes one tensor of a group, and counts its steps together.
        """
        optimizer = learner.optimizer_spec.build(learner.named_parameters())
        optimizer.state.clear()
        names = {parameter: name for name, parameter in learner.named_parameters()}
        groups: list[dict[str, Any]] = []
        self._group = {}
        for group in optimizer.param_groups:
            parts: dict[str, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                known = _numbers(learner.optimizer_state.get(names[parameter], {"new": True}))
                parts.setdefault(str(known), []).append(parameter)
            for held in parts.values():
                self._group |= dict.fromkeys((names[parameter] for parameter in held), len(groups))
                groups.append(group | {"params": held})
        optimizer.param_groups[:] = groups
        return cast(torch.optim.Optimizer, optimizer)

    def _config(self, learner: Any) -> dict[str, Any]:
        # buffers of so many numbers are there from the start: DeepSpeed's 500 million are 2 GB each
        learning = sum(p.numel() for p in learner.model.parameters() if p.requires_grad)
        bucket = min(learning + learning % 2, _BUCKET)  # stages 1 and 2 take even numbers only
        buckets = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        return {
            "train_micro_batch_size_per_gpu": 1,  # for its log only
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # Lightning says when a step is due
            "gradient_clipping": learner.trainer.gradient_clip_val or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"overlap_comm": False, **buckets, **self.zero},
        }

    def training_step(self, *arguments: Any) -> Any:
        """Through DeepSpeed, which fetches what each module needs."""
        with self.precision_plugin.train_step_context():
            return self.engine(cast(Any, self.lightning_module).training_step, *arguments)

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Lightning does."""
        return False

    # ---- the whole

    def weights(self) -> dict[str, Tensor]:
        """As the base class says."""
        model = cast(Any, self.lightning_module).model
        parameters, state = dict(model.named_parameters()), dict[str, Tensor]()
        for name, value in model.state_dict().items():
            with self._fetched(parameters[name]) if name in parameters else nullcontext():
                state[name] = parameters.get(name, value).detach().clone()
        return state

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        """DeepSpeed does, as its configuration says."""

    def gather(self) -> None:
        """As the base class says; DeepSpeed lets go of the model."""
        if self.engine is None:
            return
        self.remembered = agreement.num_ranks() * optimizer_bytes(self.optimizers)
        self.engine.optimizer.state.clear()  # first, since the whole weights need its room
        super().gather()
        self.engine.destroy()
        self.engine, self.optimizers = None, []

    def memory(self, parameters: Named) -> OptimizerState:
        """As the base class says."""
        from deepspeed.utils import safe_get_full_optimizer_state

        flats = dict(self._flats())
        found: OptimizerState = {}
        for name, parameter in parameters:
            if name in self._group:
                state = self._state(parameter, flats[self._group[name]])
                numbers = _numbers(state)
                whole = {k: safe_get_full_optimizer_state(parameter, k) for k in state if k not in numbers}
                found[name] = {key: value.clone() for key, value in (whole | numbers).items()}
        return found

    def _remember(self, known: Mapping[str, Mapping[str, Any]], parameters: Named) -> None:
        """Put an optimizer's state, by name, to where its pieces are."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        flats = dict(self._flats())
        for name, parameter in parameters:
            if name not in self._group or name not in known:
                continue
            flat = flats[self._group[name]]
            numbers, state = _numbers(known[name]), self._state(parameter, flat)
            for key, value in known[name].items():
                if key in numbers:
                    state[key] = value.clone() if isinstance(value, Tensor) else value
                    continue
                state.setdefault(key, torch.zeros_like(flat))
                if self.zero["stage"] == 3:
                    safe_set_local_optimizer_state(parameter, _piece(value, parameter), key)
                else:
                    self._state(parameter, flat)
                    safe_set_full_optimizer_state(parameter, value, key)

    def _state(self, parameter: Any, flat: Tensor) -> dict[str, Any]:
        """What is remembered of a group, in which stages 1 and 2 look up the parameter's part."""
        state: dict[str, Any] = self.engine.optimizer.state[flat]
        if getattr(parameter, "_hp_mapping", None) is not None:
            parameter._hp_mapping.set_optim_state_fragment(flat, state)
        return state

    def _flats(self) -> list[tuple[int, Tensor]]:
        """This rank's piece of each group of parameters, in one tensor."""
        held = self.engine.optimizer
        if self.zero["stage"] == 3:
            return [
                (held.sub_group_to_group_id[i], f) for i, f in enumerate(held.fp32_partitioned_groups_flat)
            ]
        return list(enumerate(held.single_partition_of_fp32_groups))

    @contextmanager
    def _fetched(self, parameter: nn.Parameter) -> Iterator[None]:
        """A parameter is whole inside."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero["stage"] == 3):
            yield


class ZeroPrecision(Precision):
    """Lets DeepSpeed do the backward pass and the step; bf16-mixed as it is elsewhere."""

    def __init__(self, name: str, device: Device) -> None:
        self.precision, self.device = cast(Any, name), device

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Products in bfloat16, if asked for."""
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            yield

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *rest: Any, **options: Any) -> None:
        """Gradients in pieces."""
        with model.charges.backward():
            model.trainer.strategy.engine.backward(tensor)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **options: Any
    ) -> Any:
        """Of the pieces; weights are exchanged behind it."""
        result = closure()
        self._after_closure(model, optimizer)
        model.trainer.strategy.engine.step()
        return result


class _Holder(nn.Module):
    """What DeepSpeed takes for the model: whatever is called in it may use the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return call(*arguments)


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed uses what torch gives up; its users can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer remembers that is one number for a whole parameter: its steps."""
    return {k: v for k, v in state.items() if not isinstance(v, Tensor) or v.dim() == 0}


def _piece(value: Tensor, parameter: Any) -> Tensor:
    """This rank's piece of what belongs to a parameter, as stage 3 cuts it: flat, the last one padded."""
    size = parameter.partition_numel()
    padded = nn.functional.pad(value.flatten(), (0, size * agreement.num_ranks() - value.numel()))
    return padded.narrow(0, size * agreement.rank(), size)
