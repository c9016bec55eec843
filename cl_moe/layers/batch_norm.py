"""Batch normalisation over real tokens only, whose statistics can be frozen.

Legend: T tokens, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl_moe.layers.precision import wide
from cl_moe.layers.ranks import several_ranks, sum_over_ranks
from cl_moe.layers.recomputing import recomputing


class MaskedBatchNorm(nn.Module):
    """Batch normalisation (1502.03167, algorithm 1) of (T, F), in float32 or wider.

    While training it uses the batch's statistics over real tokens, summed over ranks, and moves the running
    ones; a batch of fewer than two real tokens has no variance, so it uses the running ones and leaves them
    alone. In evaluation, and for good after ``freeze_statistics()``, it uses the running ones. A batch counts
    once: what activation checkpointing computes again during the backward pass moves no running statistic.

    Args:
        num_features: F.
        momentum: share of the batch in a running statistic's move, in [0, 1].
        eps: added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.statistics_frozen = False
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def freeze_statistics(self) -> None:
        """Never move the running statistics again, and use them in training too."""
        self.statistics_frozen = True

    def forward(self, x_TF: Tensor, valid_T: Tensor | None = None) -> Tensor:
        """(T, F) normalised, scaled and shifted; ``valid_T`` is False on padding."""
        x_TF = wide(x_TF)
        if valid_T is None and self._is_plain(x_TF):
            return self._plain(x_TF)
        if self.training and not self.statistics_frozen:
            mean_F, var_F = self._batch_statistics(x_TF, valid_T)
        else:
            mean_F, var_F = self.running_mean, self.running_var
        scale_F = wide(self.weight) * (wide(var_F) + self.eps).rsqrt()
        return (x_TF - wide(mean_F)) * scale_F + wide(self.bias)

    def _is_plain(self, x_TF: Tensor) -> bool:
        """Whether torch's own kernel, several times as fast, computes the same."""
        moves = self.training and not self.statistics_frozen and len(x_TF) >= 2
        known = self.weight.dtype == x_TF.dtype and not torch.compiler.is_compiling()
        return moves and known and not several_ranks()

    def _plain(self, x_TF: Tensor) -> Tensor:
        running = self.running_mean, self.running_var
        if recomputing():  # the kernel keeps them for its gradient: they are needed, but shall not move
            running = running[0].clone(), running[1].clone()
        return nn.functional.batch_norm(
            x_TF, *running, self.weight, self.bias, training=True, momentum=self.momentum, eps=self.eps
        )

    def _batch_statistics(self, x_TF: Tensor, valid_T: Tensor | None) -> tuple[Tensor, Tensor]:
        real_T1 = torch.ones_like(x_TF[:, :1]) if valid_T is None else valid_T.unsqueeze(-1).to(x_TF.dtype)
        totals = torch.cat([(x_TF * real_T1).sum(dim=0), real_T1.sum(dim=0)])
        totals = sum_over_ranks(totals) if torch.is_grad_enabled() else totals
        count = totals[-1].detach().clamp_min(1.0)
        mean_F = totals[:-1] / count
        squares_F = ((x_TF - mean_F) * real_T1).square().sum(dim=0)
        squares_F = sum_over_ranks(squares_F) if torch.is_grad_enabled() else squares_F
        enough = totals[-1].detach() >= 2
        if not recomputing():
            self._move(mean_F.detach(), squares_F.detach() / (count - 1).clamp_min(1.0), enough)
        var_F = squares_F / count
        return torch.where(enough, mean_F, self.running_mean), torch.where(enough, var_F, self.running_var)

    @torch.no_grad()
    def _move(self, mean_F: Tensor, unbiased_var_F: Tensor, enough: Tensor) -> None:
        share = torch.where(enough, self.momentum, 0.0).to(mean_F.dtype)
        # Behind autograd's back, as torch's kernel does: it keeps them for a gradient and does not read them.
        running_mean, running_var = self.running_mean.data, self.running_var.data
        running_mean.lerp_(mean_F.to(running_mean.dtype), share.to(running_mean.dtype))
        running_var.lerp_(unbiased_var_F.to(running_var.dtype), share.to(running_var.dtype))
