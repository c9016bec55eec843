"""Measures of a language model that do not depend on how its text is cut into tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_moe.errors import InputError


def unit_perplexity(loss: Tensor, tokens: Tensor, units: Tensor) -> Tensor:
    """Perplexity per byte or per word: exp(loss tokens / units), in [1, inf]; NaN of no units.

    A text's probability does not depend on its tokens, so its root by a number of units that are the same
    for every tokenizer compares them (Mielke 2019; ``byte_perplexity`` and ``word_perplexity`` of Gao et al.,
    the evaluation harness). With ``units = tokens`` it is the perplexity per token.

    Args:
        loss: mean loss, nats per token, >= 0.
        tokens: that were predicted, >= 0.
        units: bytes, or words, that those tokens spell, >= 0.

    Raises:
        InputError: a negative number of tokens or units.

    >>> loss = torch.tensor(2.0, dtype=torch.float64)  # nats per token, at four bytes a token
    >>> round(unit_perplexity(loss, torch.tensor(10), torch.tensor(40)).item(), 4)
    1.6487
    """
    if bool((tokens < 0).any()) or bool((units < 0).any()):
        raise InputError(got=f"{tokens} tokens, {units} units", allowed="numbers >= 0", key="tokens, units")
    nats = loss.double() * tokens / units
    return torch.where(units > 0, nats.exp(), torch.nan)
