"""ZeRO's ranks learn what one process learns."""

from __future__ import annotations

import pytest

from tests.test_ranks import WITH_ALL, compare

pytestmark = [pytest.mark.usefixtures("no_drawing"), pytest.mark.slow]
pytest.importorskip("deepspeed", reason="the extra deepspeed is absent")
ALL = tuple(word for word in WITH_ALL if word != "trainer.precision=64-true")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_three_grown_experiences_end_as_with_one_process(composed, tmp_path, stage):
    compare(composed, tmp_path, ALL, ("trainer=deepspeed", f"trainer.engine.stage={stage}"), 1e-5)
