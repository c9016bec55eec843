"""What a run was made with: machine, versions, code, data."""

from __future__ import annotations

import json
import subprocess
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from cl_moe import preflight
from cl_moe.tracking import provenance


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A checkout of the program with one commit: ``cl_moe/code.py`` is tracked."""
    home = tmp_path / "checkout"
    (home / "cl_moe").mkdir(parents=True)
    (home / "cl_moe" / "code.py").write_text("one\n")
    monkeypatch.setattr(provenance.cl_moe, "__file__", str(home / "cl_moe" / "__init__.py"))
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, "/dev/null")

    def run(*words: str) -> str:
        who = ("-c", "user.name=n", "-c", "user.email=e")
        done = subprocess.run(["git", "-C", home, *who, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    run("init", "-q")
    run("add", "-A")
    run("commit", "-qm", "first")
    return run


def test_a_clean_checkout_has_a_commit_and_no_diff(git: Callable):
    assert provenance.checkout() == (git("rev-parse", "HEAD"), "false")
    assert provenance.diff() == b""


def test_a_changed_one_has_the_diff_of_its_tracked_files_only(git: Callable, tmp_path: Path):
    home = tmp_path / "checkout"
    (home / "cl_moe" / "code.py").write_text("two\n")
    (home / "cl_moe" / "staged.py").write_text("three\n")
    git("add", "cl_moe/staged.py")
    (home / "secret.txt").write_text("the password\n")
    git("config", "diff.external", "touch never")
    assert provenance.checkout()[1] == "true"
    text = provenance.diff().decode()
    assert "-one\n+two\n" in text
    assert "+three" in text
    assert "password" not in text
    git("add", "-A")
    git("commit", "-qm", "second")
    assert provenance.diff() == b""


def test_a_diff_applies(git: Callable, tmp_path: Path):
    code = tmp_path / "checkout" / "cl_moe" / "code.py"
    code.write_text("two\n")
    (tmp_path / "git.diff").write_bytes(provenance.diff())
    git("checkout", "-q", "--", ".")
    assert code.read_text() == "one\n"
    git("apply", str(tmp_path / "git.diff"))
    assert code.read_text() == "two\n"


def test_a_long_diff_is_cut_and_says_so(git: Callable, tmp_path: Path):
    (tmp_path / "checkout" / "cl_moe" / "code.py").write_text("a line\n" * 300_000)
    text = provenance.diff()
    assert len(text) < 1_000_100
    *lines, last = text.decode().splitlines()
    assert last.startswith("[cut: ")
    assert lines[-1] == "+a line"


def test_outside_a_checkout_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(provenance.cl_moe, "__file__", str(tmp_path / "cl_moe" / "__init__.py"))
    assert provenance.checkout() == ("unknown", "unknown")
    assert provenance.diff() == b""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.checkout() == ("unknown", "unknown"), "without git"


def test_inside_somebody_elses_checkout_it_is_not_ours(git: Callable, tmp_path: Path, monkeypatch):
    inner = tmp_path / "checkout" / "lib" / "cl_moe" / "__init__.py"
    inner.parent.mkdir(parents=True)
    monkeypatch.setattr(provenance.cl_moe, "__file__", str(inner))
    assert provenance.checkout() == ("unknown", "unknown")
    assert provenance.diff() == b""


def test_the_environment_has_machine_threads_commit_and_versions(git: Callable):
    lines = provenance.environment().splitlines()
    assert f"threads {torch.get_num_threads()}" in lines
    assert f"commit {git('rev-parse', 'HEAD')}" in lines
    assert f"numpy=={metadata.version('numpy')}" in lines
    (processor,) = [line for line in lines if line.startswith("processor ")]
    assert len(processor) > len("processor ")


def test_checksums_of_the_data_are_those_of_zlib(composed: Callable, tmp_path: Path):
    from cl_moe.launch import build

    run = build(composed("stream.tune_on_first=2", "tracking=none", f"output_dir={tmp_path / 'out'}"))
    path = provenance.write_data(run.fingerprint, tmp_path / provenance.DATA)
    found = json.loads(path.read_text())
    assert found["stream"] == run.stream.name
    for experience, (name, *sums) in zip(run.stream, found["experiences"], strict=True):
        tensors = (*experience.train.tensors, *experience.test.tensors)
        assert name == experience.name
        assert sums == [zlib.crc32(np.ascontiguousarray(tensor.numpy()).tobytes()) for tensor in tensors]
    data = run.stream[0].train
    other = TensorDataset(data.tensors[0] + 1, data.tensors[1])
    assert preflight._checksum(other.tensors[0]) != found["experiences"][0][1]
