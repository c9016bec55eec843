"""What the stream tests share."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.utils.data import TensorDataset

from cl_moe.stream import Stream

ELSEWHERE = {"intents": "clinc150.parquet", "split_fashion_mnist": "fashion_mnist_10k.npz"}
QUICK = {
    "hf": ["stream.columns.domain=domain"],
    "arriving": [f"stream.files={Path(__file__).parents[2]}/tasks/data/bible_e*.parquet"],
    "text_domains": ["stream.train_bytes=20000", "stream.test_bytes=5000"],
    "text_languages": ["stream.train_bytes=20000", "stream.test_bytes=5000"],
    "linear_tasks": ["stream.num_experiences=12"],
    "permuted_mnist": ["stream.num_experiences=2"],
    "corrupted_mnist": ["stream.transform.corruptions=[clean,noise]"],
    "coloured_mnist": ["stream.dataset=digits", "stream.transform.hues=[0,120]"],
    "rotated_mnist": ["stream.transform.degrees=[0,20]"],
}


@pytest.fixture(autouse=True, scope="session")
def named_data() -> Iterable[str | None]:
    """Only the package's own data, whatever the machine has; a test that wants the named folder sets it."""
    named = os.environ.get("CL_MOE_DATA") or None
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CL_MOE_DATA", raising=False)
        yield named


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt to open a connection fails the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a stream reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def rows() -> Callable[[Iterable[TensorDataset]], Counter[bytes]]:
    """The multiset of (input, target) rows of several data sets."""

    def count(parts: Iterable[TensorDataset]) -> Counter[bytes]:
        counted: Counter[bytes] = Counter()
        for part in parts:
            columns = [tensor.reshape(len(part), -1).to(torch.float64) for tensor in part.tensors]
            counted.update(row.tobytes() for row in torch.cat(columns, dim=1).numpy())
        return counted

    return count


@pytest.fixture
def with_data(named_data: str | None, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``with_data("hwu64.parquet")`` puts the named folder back, or skips by the file's name without one."""

    def need(name: str) -> None:
        if named_data is None:
            pytest.skip(f"{name} is looked for in CL_MOE_DATA, which is not set")
        monkeypatch.setenv("CL_MOE_DATA", named_data)

    return need


@pytest.fixture
def build(
    named_data: str | None, monkeypatch: pytest.MonkeyPatch, composed: Callable[..., DictConfig]
) -> Callable[..., Stream]:
    """``build("split_mnist", ...)``: the stream of a YAML; skips where its data are not at hand."""

    def made(name: str, *overrides: str) -> Stream:
        if name in ELSEWHERE:
            if named_data is None:
                pytest.skip(f"{name} needs {ELSEWHERE[name]} in CL_MOE_DATA")
            monkeypatch.setenv("CL_MOE_DATA", named_data)
        return instantiate(composed(f"stream={name}", *QUICK.get(name, []), *overrides).stream)

    return made
