"""What a reader sees in a browser: pages of MLflow and reports, drawn by headless Chromium. No test."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHARTS = "#/experiments/{experiment}/runs?compareRunsMode=CHART&viewStateShareKey={view}"
_LINE = re.compile(r'class="js-line"[^>]*? d="([^"]*)"')
_STROKE = re.compile(r'class="js-line"[^>]*? style="[^"]*?stroke: rgb\((\d+), (\d+), (\d+)\)')
_CURVE = re.compile(r'<path(?=[^>]*class="curve")[^>]*? d="([^"]*)"')


def chromium() -> str | None:
    """The browser's program, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def _browse(url: str, *words: str, size: tuple[int, int], seconds: float) -> str:
    program = chromium()
    assert program is not None
    with tempfile.TemporaryDirectory(prefix="browser-") as profile:
        flags = ["--headless=new", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # it refuses to be root without
        flags += [f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        flags += [f"--virtual-time-budget={int(1000 * seconds)}"]
        done = subprocess.run(
            [program, *flags, *words, url], capture_output=True, text=True, timeout=300, check=True
        )
    return done.stdout


def document(url: str, size: tuple[int, int] = (1600, 1400), seconds: float = 120) -> str:
    """The page's document after so many seconds of its own time, its scripts run."""
    return _browse(url, "--dump-dom", size=size, seconds=seconds)


def picture(url: str, path: Path, size: tuple[int, int] = (1600, 1400), seconds: float = 120) -> Path:
    """The page as a PNG."""
    path.unlink(missing_ok=True)
    _browse(url, f"--screenshot={path.absolute()}", size=size, seconds=seconds)
    return path


def curves(page: str) -> list[int]:
    """How many points each curve of a page has: MLflow's charts (plotly) and those of a report."""
    return [len(re.findall("[ML]", path)) for path in [*_LINE.findall(page), *_CURVE.findall(page)]]


def strokes(page: str) -> set[str]:
    """The colours of MLflow's curves: ``#882255``."""
    return {"#" + bytes(map(int, found)).hex() for found in _STROKE.findall(page)}


@contextmanager
def mlflow_server(uri: str) -> Iterator[str]:
    """The address of an MLflow server on a store, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        _wait(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}/"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait(url: str, server: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if time.monotonic() > end or server.poll() is not None:
                raise
        time.sleep(0.2)
