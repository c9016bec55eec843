"""What product-key layers are held against: every score of every expert, one token after the other."""

import itertools
import math

import torch

from cl_moe.layers import PEER, PKM, Retrieval

OPTIONS = {
    "keys": ("shared", "per_head"),
    "queries": ("shared", "per_cohort"),
    "gate": ("softmax", "sigmoid"),
    "policy": ("compete", "sum"),
    "grow_by": ("grid", "shell"),
}
EVERY = [Retrieval(*values) for values in itertools.product(*OPTIONS.values())]


def name_of(retrieval):
    changed = [value for value, (name, values) in zip(vars(retrieval).values(), OPTIONS.items(), strict=True)
               if value != values[0]]  # fmt: skip
    return "-".join(changed) or "paper"


def newborns(layer, rows=1):
    """How many experts make the next growth by so many rows."""
    grid = math.isqrt(layer.num_experts)
    return (grid + rows) ** 2 - grid**2 if layer.retrieval.grow_by == "shell" else 9


def queries_of(owner, x_TD, mask_T, heads):
    query_TF = x_TD @ owner.query.weight.t() + owner.query.bias
    norm = owner.query_norm
    if norm is not None and type(norm).__name__ == "MaskedBatchNorm":
        real = query_TF if mask_T is None else query_TF[mask_T]
        still = norm.statistics_frozen or not norm.training
        mean = norm.running_mean if still else real.mean(0)
        var = norm.running_var if still else real.var(0, unbiased=False)
        query_TF = (query_TF - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
    elif norm is not None:
        per_head = query_TF.reshape(len(x_TD), heads, -1)
        centred = per_head - per_head.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        query_TF = scaled.reshape(query_TF.shape) * norm.weight + norm.bias
    return query_TF.reshape(len(x_TD), heads, 2, -1)


def sub_key_scores(layer, cohort, query_ThSH, side):
    """(T, h, rows of the cohort)."""
    keys = cohort.keys if cohort.keys.dim() == 4 else cohort.keys.expand(layer.heads, *cohort.keys.shape)
    return torch.einsum("thd,hrd->thr", query_ThSH[:, :, side], keys[:, side])


def all_scores(layer, x_TD, mask_T=None):
    """(T, h, N) scores of all experts, ids for life, written down cell by cell."""
    per_side = []
    for cohort in layer.cohorts:
        owner = cohort if layer.retrieval.queries == "per_cohort" else layer
        query = queries_of(owner, x_TD, mask_T, layer.heads)
        per_side.append([sub_key_scores(layer, cohort, query, side) for side in range(2)])
    if layer.retrieval.grow_by == "shell":
        per_side = [[torch.cat(side, dim=-1) for side in zip(*per_side, strict=True)]]
    return torch.cat([cell_by_cell(*sides) for sides in per_side], dim=-1)


def cell_by_cell(a_Thm, b_Thm):
    """(T, h, m^2) in the order of ids: shell by shell, along its column down, then along its row back."""
    cells = []
    for shell in range(a_Thm.shape[-1]):
        cells += [(row, shell) for row in range(shell + 1)]
        cells += [(shell, column) for column in range(shell - 1, -1, -1)]
    return torch.stack([a_Thm[..., i] + b_Thm[..., j] for i, j in cells], dim=-1)


def groups(layer, cohorts=None):
    """The ids among which one top-k is taken."""
    bounds = [0, *torch.tensor(layer.cohort_sizes).cumsum(0).tolist()]
    chosen = range(len(layer.cohorts)) if cohorts is None else cohorts
    parts = [list(range(bounds[c], bounds[c + 1])) for c in chosen]
    return parts if layer.retrieval.policy == "sum" else [list(itertools.chain(*parts))]


def naive(layer, x_TD, mask_T=None, cohorts=None):
    """One (token, head, expert) after the other."""
    scores = all_scores(layer, x_TD, mask_T)
    tables = {name: torch.cat([getattr(c, name) for c in layer.cohorts]) for name in layer.cohorts[0].tables}
    rows = []
    for t, x in enumerate(x_TD):
        out = torch.zeros_like(x)
        heads = layer.heads if mask_T is None or mask_T[t] else 0
        for h, ids in itertools.product(range(heads), groups(layer, cohorts)):
            best = scores[t, h, ids].topk(layer.k)
            gates = best.values.sigmoid() if layer.retrieval.gate == "sigmoid" else best.values.softmax(-1)
            for gate, place in zip(gates, best.indices, strict=True):
                out = out + gate * expert(layer, tables, ids[int(place)], x)
        rows.append(out)
    return torch.stack(rows)


def expert(layer, tables, i, x):
    if isinstance(layer, PKM):
        return tables["v"][i]
    hidden = layer.activation(tables["u"][i] @ x)
    if layer.glu:
        hidden = hidden * (tables["w"][i] @ x)
    return hidden * tables["v"][i]


def make(kind, retrieval, dim=6, num_experts=16, heads=2, k=3, query_norm="batch"):
    if kind == "pkm":
        return PKM(dim, num_experts, heads, k, query_norm=query_norm, retrieval=retrieval)
    return PEER(
        dim, num_experts, heads, k, query_norm=query_norm, glu=kind == "peer glu", retrieval=retrieval
    )
