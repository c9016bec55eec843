"""A LightningModule without costs and refusals that this program has no use for."""

from __future__ import annotations

from typing import Any

import lightning as L  # noqa: N812
import torch


class LeanModule(L.LightningModule):
    """Abstract: a learner's part that speaks of Lightning only."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the name of the running hook some 46 times in a step, and a module's own way of
        # setting attributes, which looks for tensors, makes that a twentieth of a small network's step.
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Experiences lie in CPU memory: on the CPU there is nothing to look through and to move."""
        if device.type == "cpu":
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm; Lightning refuses a fused optimizer in bf16-mixed, though nothing is scaled there."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(held, gradient_clip_val)
