"""A store of one's own for each test of the tracking room."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def uri(ready_store: Path, tmp_path: Path) -> str:
    shutil.copy(ready_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"
