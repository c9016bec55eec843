"""Pure formulas, torch only: plain tensors in, a 0-d float64 tensor out, NaN where undefined."""

from cl_moe.metrics.functional.load import (
    dead_fraction,
    drop_rate,
    effective_experts,
    gini,
    max_violation,
    normalized_entropy,
    squared_cv,
    unevenness,
    usage,
)
from cl_moe.metrics.functional.stream import (
    average_accuracy,
    average_anytime_accuracy,
    backward_transfer,
    forgetting,
    forgetting_per_experience,
    forward_transfer,
    intransigence,
    learning_accuracy,
    min_accuracy,
    up_to,
    worst_case_accuracy,
)

__all__ = [
    "average_accuracy",
    "average_anytime_accuracy",
    "backward_transfer",
    "dead_fraction",
    "drop_rate",
    "effective_experts",
    "forgetting",
    "forgetting_per_experience",
    "forward_transfer",
    "gini",
    "intransigence",
    "learning_accuracy",
    "max_violation",
    "min_accuracy",
    "normalized_entropy",
    "squared_cv",
    "unevenness",
    "up_to",
    "usage",
    "worst_case_accuracy",
]
