"""Nothing leaves its place: names do not become paths, no port opens, nothing is sent, no shell is asked."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cl_moe import checkpoint
from cl_moe.tracking import artifacts

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("trainer.epochs=1", "stream.tune_on_first=2", "hydra.run.dir=out")


def plant(folder: Path, content: bytes) -> None:
    """In place of every checkpoint, one whose name promises just this content."""
    for file in folder.glob("*.pt"):
        file.unlink()
    (folder / f"boundary_001-{hashlib.sha256(content).hexdigest()[:16]}.pt").write_bytes(content)


def archive(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


HOSTILE = [
    "../../outside",
    "/outside",
    "a/b",
    "..",
    "x%2Fy",
    "con\nfig",
    "~/outside",
    "-rf",
    "$(touch outside)",
]


STREAM = f"""
import dataclasses

from cl_moe.stream import Stream
from tasks.split_digits import split_digits


def hostile() -> Stream:
    whole = split_digits(tune_on_first=3)
    names = {HOSTILE!r}
    named = [dataclasses.replace(e, name=names[3 * i] + names[3 * i + 1]) for i, e in enumerate(whole)]
    return dataclasses.replace(whole, name="../../outside/" + names[2], experiences=tuple(named))
"""
YAML = "# @package _global_\ndefaults:\n  - override /model: mlp\nstream:\n  _target_: hostile.hostile\n"


def test_names_of_experiences_stay_inside(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stand in the checkpoint's record, on figures and in tables, and never in a path."""
    place = tmp_path / "deep/er"
    (place / "mine/stream").mkdir(parents=True)
    (place / "mine/stream/hostile.yaml").write_text(YAML)
    (place / "hostile.py").write_text(STREAM)
    monkeypatch.syspath_prepend(str(place))
    before = everything_below(tmp_path)
    words = ("--config-dir", f"{place}/mine", "stream=hostile", "layer=moe", "growth=every_experience")
    done = command(*words, "trainer.epochs=1", "output_dir=deep/er/out", "hydra.run.dir=deep/er/out")
    assert done.status == 0, done.text
    new = everything_below(tmp_path) - before
    allowed = ("deep/er/out", "mlartifacts", "mlflow.db", "deep/er/__pycache__")
    assert {path for path in new if not path.startswith(allowed)} == set()
    inside = {Path(path).name for path in new if path.startswith("deep/er/out")}
    assert not [name for name in inside if "outside" in name]
    state = checkpoint.newest(place / "out/checkpoints")
    assert state is not None
    assert HOSTILE[0] in state["record"]["names"][0], "the names are in the checkpoint"
    assert artifacts.read_matrix(place / "out" / artifacts.MATRIX).names == state["record"]["names"]


def tampered(state: dict) -> dict:
    """Every text in a state, keys too where they are free, made a path that leads outside."""
    if isinstance(state, dict):
        return {key: tampered(value) for key, value in state.items()}
    if isinstance(state, list):
        return [tampered(value) for value in state]
    return "../../outside" if isinstance(state, str) else state


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    "part", ["tracker", *(pytest.param(part, marks=pytest.mark.slow) for part in ("record", "learner"))]
)
def test_a_tampered_checkpoint_writes_nothing_outside(part: str, command: Callable, tmp_path: Path) -> None:
    """Whatever becomes of the run, its folder and the store are all that it touches."""
    assert command(*SMALL, "layer=moe", "growth=every_experience").status == 0
    folder = Path("out/checkpoints")
    state = checkpoint.newest(folder)
    assert state is not None
    if part == "record":
        state[part] = {**tampered(state[part]), "kind": "classification"}
    else:
        keep = {"model", "optimizer", "optimizer_class"}
        state[part] = {k: v if k in keep else tampered(v) for k, v in state[part].items()}
    plant(folder, archive(state))
    before = everything_below(tmp_path.parent)
    done = command("resume=out")
    assert "Traceback" not in done.text
    new = everything_below(tmp_path.parent) - before
    name = tmp_path.name
    assert {path for path in new if not path.startswith((f"{name}/out", f"{name}/mlartifacts"))} == set()


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    "text",
    [
        "../../etc",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("a" * 31, "'; DROP TABLE runs; --", "\0", "/" * 32)
        ),
    ],
)
def test_a_run_id_is_no_path(text: str, command: Callable, tmp_path: Path) -> None:
    assert command(*SMALL).status == 0
    Path("out/mlflow_run_id").write_text(text)
    before = everything_below(tmp_path)
    done = command("resume=out")
    assert done.status == 2, done.text
    assert "run id" in done.text or "run '" in done.text
    assert "Traceback" not in done.text
    assert {path for path in everything_below(tmp_path) - before if not path.startswith("out/")} == set()


# ---- the network


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every attempt of this process to listen or to connect by an internet address, noted and refused."""
    noted: list[str] = []

    def refuse(self: socket.socket, *arguments: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            noted.append(json.dumps([str(word) for word in arguments]))
            raise OSError("no network in this test")

    def no_names(*arguments: object, **_: object) -> None:
        noted.append(str(arguments))
        raise OSError("no network in this test")

    with monkeypatch.context() as patch:
        for name in ("bind", "listen", "connect", "connect_ex", "sendto"):
            original = getattr(socket.socket, name)

            def guarded(self: socket.socket, *words: object, original: Callable = original) -> object:
                refuse(self, *words)
                return original(self, *words)

            patch.setattr(socket.socket, name, guarded)
        patch.setattr(socket, "getaddrinfo", no_names)
        yield noted


def test_a_run_with_a_local_store_touches_no_network(command: Callable, sockets: list[str]) -> None:
    done = command(*SMALL, "layer=moe", "growth=every_experience", "strategy=[replay,lwf]")
    assert done.status == 0, done.text
    assert command("resume=out").status == 0
    assert sockets == []


def test_the_guard_sees_a_connection(sockets: list[str]) -> None:
    with socket.socket() as one, pytest.raises(OSError, match="no network"):
        one.connect(("127.0.0.1", 9))
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("localhost", 9))
    with socket.socket() as one, pytest.raises(OSError, match="no network"):
        one.bind(("127.0.0.1", 0))
    assert len(sockets) == 3


# ---- the source

SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "commands.getoutput"}
LISTEN = {"bind", "listen", "create_server", "HTTPServer", "TCPServer"}


def faults(source: str) -> list[str]:
    """Calls that go through a shell, read a pickle by default, or open a port."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in SHELLS or words.get("shell", "False") != "False":
            found.append(f"line {node.lineno}: {called}: a shell")
        if called in ("torch.load", "load_from_checkpoint") and words.get("weights_only") != "True":
            found.append(f"line {node.lineno}: {called} without weights_only=True")
        if called.endswith(("read_pickle", "unsafe_load")) or (
            called.rpartition(".")[2] in LISTEN and called != "event.listen"  # SQLAlchemy's, on no port
        ):
            found.append(f"line {node.lineno}: {called}")
    return found


@pytest.mark.parametrize(
    "path", sorted(p for f in ("cl_moe", "tasks") for p in (ROOT / f).rglob("*.py")), ids=lambda p: p.name
)
def test_the_source_opens_no_shell_no_pickle_and_no_port(path: Path) -> None:
    assert faults(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "os.system(x)",
        "subprocess.run(x, shell=True)",
        "torch.load(x)",
        "pandas.read_pickle(x)",
        "server.bind(('', 80))",
    ],
)
def test_a_fault_is_seen(source: str) -> None:
    assert len(faults(source)) == 1
    assert not faults("torch.load(x, weights_only=True)\nsubprocess.run(x, shell=False)")
