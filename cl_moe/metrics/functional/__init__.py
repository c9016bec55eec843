"""Pure formulas, torch only: plain tensors in, a 0-d float64 tensor out, NaN where undefined."""

from cl_moe.metrics.functional.calibration import (
    binned_calibration_error,
    calibration_bins,
    calibration_error,
)
from cl_moe.metrics.functional.decomposition import (
    Forgotten,
    decomposed_forgetting,
    forgetting_routing,
    forgetting_weights,
)
from cl_moe.metrics.functional.language import unit_perplexity
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
from cl_moe.metrics.functional.plasticity import dormant_fraction, effective_rank
from cl_moe.metrics.functional.routing import (
    Choices,
    cohort_shares,
    expected_information,
    leak,
    router_saturation,
    routing_drift,
    task_information,
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
    "Choices",
    "Forgotten",
    "average_accuracy",
    "average_anytime_accuracy",
    "backward_transfer",
    "binned_calibration_error",
    "calibration_bins",
    "calibration_error",
    "cohort_shares",
    "dead_fraction",
    "decomposed_forgetting",
    "dormant_fraction",
    "drop_rate",
    "effective_experts",
    "effective_rank",
    "expected_information",
    "forgetting",
    "forgetting_per_experience",
    "forgetting_routing",
    "forgetting_weights",
    "forward_transfer",
    "gini",
    "intransigence",
    "leak",
    "learning_accuracy",
    "max_violation",
    "min_accuracy",
    "normalized_entropy",
    "router_saturation",
    "routing_drift",
    "squared_cv",
    "task_information",
    "unevenness",
    "unit_perplexity",
    "up_to",
    "usage",
    "worst_case_accuracy",
]
