"""What the machine does while a run trains, by MLflow's monitor: processor, memory, disk, network, GPU."""

from __future__ import annotations

import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING, final

from cl_moe.errors import InputError

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

_PATIENCE = 5.0  # seconds that the end of a run waits for the last points; the store may be away


@final
class SystemMetrics:
    """Points ``system/*`` every ten seconds (``MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL`` seconds).

    They go to the store directly, not by the outbox: they belong to the machine and to the moment, and a
    store that is away loses them, with a warning.

    Raises:
        InputError: psutil is not installed.
    """

    def __init__(self) -> None:
        if find_spec("psutil") is None:
            raise InputError(
                got="tracking.system_metrics=true without the package psutil",
                allowed="pip install 'cl-moe[system]', or tracking.system_metrics=false",
                key="tracking.system_metrics",
            )
        self._monitor: SystemMetricsMonitor | None = None

    def start(self, uri: str, run_id: str) -> None:
        """Begins; in a run that goes on behind the last step that stands."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
        self._monitor.start()

    def stop(self) -> None:
        """Ends it, and sends what it has; waits a few seconds at most."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:  # its own end waits for a store as long as that takes
            ending = threading.Thread(target=monitor.finish, daemon=True, name="end of SystemMetricsMonitor")
            ending.start()
            ending.join(_PATIENCE)
