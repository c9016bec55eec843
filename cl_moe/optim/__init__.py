"""Optimizers as the configuration names them, over dense parameters and rows of tables alike."""

from cl_moe.optim.anew import forget_part
from cl_moe.optim.by_rows import ROW_POLICIES, ByRows
from cl_moe.optim.clipping import clip_gradients
from cl_moe.optim.row_exchange import exchange_rows
from cl_moe.optim.specs import SGD, Adagrad, AdamW, OptimizerSpec
from cl_moe.optim.state import Named, OptimizerState, load_state_by_name, state_by_name

__all__ = [
    "ROW_POLICIES",
    "SGD",
    "Adagrad",
    "AdamW",
    "ByRows",
    "Named",
    "OptimizerSpec",
    "OptimizerState",
    "clip_gradients",
    "exchange_rows",
    "forget_part",
    "load_state_by_name",
    "state_by_name",
]
