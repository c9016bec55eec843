"""DeepSpeed's ZeRO: optimizer state (stage 1), gradients (2) and weights (3) in pieces on the ranks."""

from __future__ import annotations

import importlib.util
from typing import Any

from lightning.pytorch.strategies import Strategy

from cl_moe.engines.base import Device, Engine
from cl_moe.engines.zero_strategy import ZeroPrecision, ZeroStrategy
from cl_moe.errors import InputError


class DeepSpeed(Engine):
    """ZeRO (1910.02054) through DeepSpeed and Lightning's ``DeepSpeedStrategy``.

    Between fits every rank has the whole weights. They are in float32, under bf16-mixed, too, where products
    are computed in bfloat16 as under any other engine.

    Args:
        stage: what lies in pieces: 1 optimizer state; 2 gradients, too; 3 weights, too.
        offload_optimizer: keep the optimizer's state in the CPU's memory, and step there.
        offload_parameters: keep pieces of weights in the CPU's memory; stage 3 only.
    """

    held = ("naive", "joint", "cumulative", "replay", "der", "lwf", "icarl", "lifelong_moe")
    precisions = ("32-true", "bf16-mixed")

    def __init__(
        self, stage: int = 2, offload_optimizer: bool = False, offload_parameters: bool = False
    ) -> None:
        if stage not in (1, 2, 3) or isinstance(stage, bool):
            raise InputError(got=f"stage={stage!r}", allowed="1, 2 or 3", key="trainer.engine.stage")
        for name, value in (("optimizer", offload_optimizer), ("parameters", offload_parameters)):
            if not isinstance(value, bool):
                key = f"trainer.engine.offload_{name}"
                raise InputError(got=f"offload_{name}={value!r}", allowed="true or false", key=key)
        if offload_parameters and stage != 3:
            raise InputError(
                got=f"offload_parameters=true at stage {stage}, where every rank holds all weights",
                allowed="stage 3, or offload_parameters=false",
                key="trainer.engine.offload_parameters (or trainer.engine.stage)",
            )
        self.stage = stage
        self.offload_optimizer, self.offload_parameters = offload_optimizer, offload_parameters

    def check_start(self, num_ranks: int) -> None:
        """DeepSpeed is an extra."""
        if importlib.util.find_spec("deepspeed") is None:
            raise InputError(
                got="trainer=deepspeed without the package deepspeed",
                allowed="DS_BUILD_OPS=0 pip install 'cl-moe[deepspeed]', or trainer=ddp or fsdp",
                key="trainer",
            )

    def strategy(self, device: Device) -> Strategy:
        """The configuration that DeepSpeed gets; what it leaves out is DeepSpeed's default."""
        zero: dict[str, Any] = {"stage": self.stage}
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
        return ZeroStrategy(zero, device)

    def precision(self, name: str, device: Device) -> dict[str, Any]:
        """DeepSpeed does backward passes and steps."""
        return {"plugins": [ZeroPrecision(name, device)]}
