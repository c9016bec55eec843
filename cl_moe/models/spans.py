"""Which tokens a masked objective hides: spans, drawn as T5 draws them (1910.10683, section 3.1.4).

Legend: B sequences, S positions, P spans per sequence, M the longest sequence's tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_moe.errors import InputError


class SpanMasking:
    """Hides a share of each sequence's real tokens, in spans of a mean length (T5 and Switch: .15 and 3).

    A sequence of L real tokens loses round(share x L) of them, at least one and, where L > 1, not all, in
    round(that / mean_length) spans, at least one. Hidden and shown stretches alternate, cut at random places;
    then all is turned round by a random offset, so that no position is hidden more often than another (a span
    that meets the end goes on at the start).

    Args:
        share: of the real tokens, in (0, 1).
        mean_length: tokens per span, >= 1.
    """

    def __init__(self, share: float = 0.15, mean_length: float = 3.0) -> None:
        if not 0 < share < 1:
            raise InputError(got=f"mask_share={share}", allowed="between 0 and 1", key="model.mask_share")
        if not mean_length >= 1:
            raise InputError(
                got=f"span_length={mean_length}", allowed="a number >= 1", key="model.span_length"
            )
        self.share, self.mean_length = share, mean_length

    def __call__(self, length_B: Tensor, num_positions: int, draw: torch.Generator) -> Tensor:
        """(B, S) bool, True where a token is hidden, for sequences whose real tokens are the first L.

        Args:
            length_B: (B,) int64 on the CPU, L of each sequence, 0 .. S.
            num_positions: S.
            draw: a CPU generator.
        """
        hidden_B = (length_B * self.share).round().long().clamp_min(1)
        hidden_B = torch.minimum(hidden_B, (length_B - 1).clamp_min(1)).where(length_B > 0, 0)
        shown_B = length_B - hidden_B
        spans_B = (hidden_B / self.mean_length).round().long().clamp_min(1)
        spans_B = torch.minimum(spans_B, shown_B.clamp_min(1))
        lengths_BP2 = torch.stack(
            [_pieces(shown_B, spans_B, num_positions, draw), _pieces(hidden_B, spans_B, num_positions, draw)],
            dim=-1,
        )
        ends_BP = lengths_BP2.flatten(1).cumsum(dim=1)
        offset_B = (torch.rand(len(length_B), generator=draw, dtype=torch.float64) * length_B).long()
        position_S = torch.arange(num_positions)
        turned_BS = (position_S + offset_B.unsqueeze(1)) % length_B.clamp_min(1).unsqueeze(1)
        stretch_BS = torch.searchsorted(ends_BP, turned_BS, right=True)
        return (stretch_BS % 2 == 1) & (position_S < length_B.unsqueeze(1))


def _pieces(count_B: Tensor, parts_B: Tensor, most: int, draw: torch.Generator) -> Tensor:
    """(B, P) lengths of ``parts_B`` pieces that make up ``count_B`` tokens, every cut as likely as another.

    No piece is empty unless there are no tokens at all; rows with fewer pieces than P end in zeros.
    """
    place_M = torch.arange(most)
    chance_BM = torch.rand(len(count_B), most, generator=draw, dtype=torch.float64)
    inner_BM = (place_M > 0) & (place_M < count_B.unsqueeze(1))  # where a piece after the first may begin
    rank_BM = chance_BM.masked_fill(~inner_BM, 2.0).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    begins_BM = inner_BM & (rank_BM < parts_B.unsqueeze(1) - 1)
    piece_BM = begins_BM.cumsum(dim=1)
    real_BM = (place_M < count_B.unsqueeze(1)).long()
    widest = int(parts_B.max()) if len(parts_B) else 1
    return torch.zeros(len(count_B), widest, dtype=torch.int64).scatter_add(1, piece_BM, real_BM)
