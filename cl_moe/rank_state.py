"""What each rank of a distributed run has for itself, in the one checkpoint that rank 0 writes.

Weights, optimizer, strategies and record are the same on all ranks. A rank's own are what it has counted (its
operations, the scores of its rows) and where its generators stand.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from cl_moe.agreement import is_first, num_ranks, of_all, rank

State = dict[str, Any]


def with_all(state: State) -> State:
    """The state of a checkpoint, with what each rank has for itself."""
    return state if num_ranks() == 1 else state | {"ranks": of_all(_own(state))}


def own_of(state: Mapping[str, Any]) -> State:
    """A checkpoint's state as this rank goes on from it.

    With another number of ranks than it was written by, rank 0 goes on from the sums of all, the others from
    nothing, and generators begin as the experience did: what is drawn (dropout) is not what would have been.
    """
    held: list[State] = state.get("ranks") or [_own(state)]
    if len(held) == num_ranks():
        own = held[rank()]
    else:
        own = _merged(held) if is_first() else _merged([])
        own["cost"] = _cost_of(held) if is_first() else _nothing(held[0]["cost"])
    learner = dict(state["learner"])
    learner["online"] = own["online"]
    if learner["restart"] is not None:
        learner["restart"] = learner["restart"] | {"generators": own["generators"]}
    others = {key: value for key, value in state.items() if key != "ranks"}
    return others | {"learner": learner, "cost": own["cost"]}


def _own(state: Mapping[str, Any]) -> State:
    restart = state["learner"]["restart"] or {}
    return {
        "cost": state["cost"],
        "online": state["learner"]["online"],
        "generators": restart.get("generators"),
    }


def _merged(held: Sequence[State]) -> State:
    online = {name: sum(one["online"][name] for one in held) for name in ("total", "count")}
    return {"online": online, "generators": None}


def _cost_of(held: Sequence[State]) -> State:
    cost = copy.deepcopy(held[0]["cost"])
    flops = cost["charges"]["flops"]
    for account in flops:
        flops[account] = sum(one["cost"]["charges"]["flops"][account] for one in held)
    return cost


def _nothing(cost: State) -> State:
    cost = copy.deepcopy(cost)
    cost["charges"] |= {"flops": dict.fromkeys(cost["charges"]["flops"], 0), "known": {}, "passes": {}}
    return cost
