"""Values of another kind than their parameter's are refused, and nothing that a constructor takes is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from cl_moe.schema import fits, leaves


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -3], [True, 1.0, "1", None, [1]]),
        (float, [0.5, 3], [True, float("nan"), float("inf"), "1", None]),
        (bool, [True, False], [0, "true", None]),
        (str, ["x", ""], [1, None, ["x"]]),
        (type(None), [None], [0, False, ""]),
        (Literal["a", "b"], ["a"], ["c", None, 1]),
        (Sequence[int], [[1], [], (1, 2)], [1, "12", None, True]),
        (Mapping[int, int], [{1: 2}, {}], [3, "x", None]),
        (tuple[float, float], [[0.9, 0.95]], [0.9, None]),
        (Any, [1, "x", {}], []),
    ],
)
def test_kinds(kind: Any, good: list[object], bad: list[object]):
    assert all(fits(value, kind) for value in good)
    assert not any(fits(value, kind) for value in bad)


def test_leaves_stand_under_dotted_keys_and_an_empty_mapping_is_one():
    tree = {"a": {"b": [1, 2], "c": {}}, 3: {"d": None}}
    assert dict(leaves(tree)) == {"a.b": [1, 2], "a.c": {}, "3.d": None}
