"""What a stream holds, told without training: ``describe=true``."""

from __future__ import annotations

import math
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from cl_moe.schema import check_config
from cl_moe.targets import check_targets
from cl_moe.tracking import overview


def describe(config: DictConfig) -> float:
    """Print what is in a stream and write it into the run's folder; returns NaN, since nothing was measured.

    Raises:
        InputError: a key, a value, or the data are wrong; the model is not built.
    """
    check_targets(config)
    check_config(config)
    stream = instantiate(config.stream)
    folder = Path(config.output_dir).absolute()
    written = ", ".join(path.name for path in overview.write_overview(stream, folder))
    print("\n".join([*overview.table(stream), f"written to {folder}: {written}"]))
    return math.nan
