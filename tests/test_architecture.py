"""The laws about the house, proved from its syntax trees: floors, fences, sizes.

The checkers are pure functions of text, and each is shown a snippet that it must refuse.
"""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS: dict[str, int] = {
    **dict.fromkeys(("", "errors", "files", "seeds", "stopping", "layers", "losses", "stream", "batches"), 0),
    **dict.fromkeys(("metrics.functional", "tracking.record", "counting", "agreement"), 0),
    **dict.fromkeys(("models", "optim", "metrics"), 1),
    **dict.fromkeys(("growth", "strategies", "scoring"), 2),
    **dict.fromkeys(("learner", "lean", "tracking", "checkpoint", "progress", "trainer", "measuring"), 3),
    **dict.fromkeys(("failures", "memory", "watchdog", "upcycling", "engines"), 3),
    **dict.fromkeys(("experiment", "run", "preflight", "ending", "leaving", "evaluation", "cost"), 4),
    **dict.fromkeys(("anytime", "plasticity", "reading", "foresight", "spending"), 4),
    **dict.fromkeys(("rank_state", "starting"), 4),
    **dict.fromkeys(("cli", "__main__", "arguments", "words", "folder", "schema", "targets"), 5),
    **dict.fromkeys(("launch", "branching", "distilling", "stored"), 5),
    **dict.fromkeys(("ranks", "handing", "torchrun", "worker"), 5),
    **dict.fromkeys(("reproducing", "repeating", "loading", "describing", "sweeping"), 5),
}
"""Rooms of ``cl_moe``; "" is the package itself. A module is in the longest room its name begins with."""

EVERYBODY = {
    "": "the package's version",
    "errors": "every room refuses input in the same three parts",
    "seeds": "every room draws by (seed, purpose)",
    "files": "every room writes files whole or not at all",
}
SIBLINGS: dict[tuple[str, str], str] = {
    ("layers", "losses"): "a router returns its named auxiliary losses (law 6); their formulas are losses'",
    ("agreement", "layers"): "the group in which layers sum over ranks is opened with the others",
    **dict.fromkeys((("trainer", "engines"), ("lean", "engines")), "how ranks train, in what pieces"),
    ("batches", "stream"): "batches are cut from what the contract of a stream holds",
    ("tracking.record", "layers"): "a record is plain data in floor 0's words: expert loads",
    ("tracking.record", "stream"): "a record is plain data in floor 0's words: kinds of stream",
    **dict.fromkeys((("tracking", "memory"), ("engines", "memory")), "bytes are counted and said in one way"),
    ("failures", "memory"): "a refused allocation is told with who holds how much",
    ("watchdog", "failures"): "where a run hangs is told in the words of where one fails",
    **dict.fromkeys((("experiment", n) for n in ("run", "evaluation", "foresight")), "the loop drives it"),
    **dict.fromkeys((("foresight", "anytime"), ("spending", "anytime")), "they look and leave no trace"),
    **dict.fromkeys((("run", "spending"), ("foresight", "evaluation")), "what a run is told by and held to"),
    ("preflight", "cost"): "an objective may be a cost",
    ("checkpoint", "failures"): "memory that ran out while a checkpoint was read does not make it a bad one",
    ("learner", "lean"): "a learner is a LightningModule",
    ("__main__", "cli"): "python -m cl_moe is the command line",
    ("cli", "launch"): "the command line starts the run",
    **dict.fromkeys((("launch", n) for n in ("words", "schema", "targets")), "what is launched was checked"),
    **dict.fromkeys((("launch", n) for n in ("stored", "branching")), "it meets what an earlier one left"),
    **dict.fromkeys((("launch", n) for n in ("describing", "reproducing")), "other things to do with a run"),
    **dict.fromkeys((("launch", n) for n in ("distilling", "ranks")), "who learns from whom, and with whom"),
    **dict.fromkeys((("ranks", n) for n in ("handing", "stored", "torchrun")), "what ranks are started with"),
    **dict.fromkeys((("worker", n) for n in ("handing", "launch", "torchrun")), "a rank is a run"),
    **dict.fromkeys((("run", n) for n in ("evaluation", "cost", "anytime")), "a run measures"),
    **dict.fromkeys((("run", n) for n in ("preflight", "starting", "rank_state")), "how a run begins"),
    **dict.fromkeys((("run", n) for n in ("ending", "leaving")), "how a run ends"),
    **dict.fromkeys((("starting", n) for n in ("rank_state", "cost", "preflight")), "a branch is set up"),
    **dict.fromkeys((("cli", n) for n in ("words", "sweeping", "arguments")), "words stand for others"),
    **dict.fromkeys((("sweeping", n) for n in ("words", "arguments")), "a sweep goes on by its words"),
    ("arguments", "folder"): "resume reads what a launch wrote",
    ("stored", "folder"): "what a launch writes is what the next one reads",
    ("stored", "schema"): "what is stored is the checked configuration",
    ("stored", "arguments"): "both know which keys may change when a run goes on",
    ("branching", "folder"): "a branch reads what its parent stored",
    ("branching", "schema"): "a branch is held against its parent key by key",
    ("branching", "arguments"): "a branch may come from a file as well",
    ("arguments", "words"): "arguments are made of words",
    ("stored", "words"): "both know which keys may change when a run goes on",
    ("distilling", "folder"): "a teacher is built from what its run stored",
    **dict.fromkeys((("describing", "schema"), ("describing", "targets")), "what is built was checked first"),
    ("distilling", "branching"): "a teacher is found and told of like the parent of a branch",
    ("distilling", "arguments"): "a teacher may come from a file as well",
    ("distilling", "loading"): "a teacher is a model that is loaded",
    **dict.fromkeys((("loading", "folder"), ("loading", "targets")), "a model may be a stranger's"),
    ("arguments", "repeating"): "reproduce stands for the arguments of a run",
    **dict.fromkeys((("repeating", "folder"), ("repeating", "words")), "reproduce reads a stored command"),
    **dict.fromkeys(
        (("reproducing", n) for n in ("folder", "schema", "words")), "it compares what was stored"
    ),
    **{(a, b): "a row" for a in ("experiment", "preflight") for b in ("plasticity", "reading")},
    ("distilling", "targets"): "a teacher's folder may come from somebody else",
}
"""Imports along a floor, tolerated with a reason. None of them may have its way back in this table."""

ASIDE = {"stream", "errors", "seeds", ""}
"""What ``tasks`` may know of ``cl_moe``."""
parse = lru_cache(maxsize=None)(ast.parse)
DYNAMIC = {"import_module", "__import__"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of a ``cl_moe`` module: ``cl_moe.metrics.functional.load`` -> ``metrics.functional``."""
    words = module.split(".")[1:]
    if len(words) == 1 and words[0].startswith("__") and words[0] != "__main__":
        return ""  # a name of the package, such as __version__
    for length in range(len(words), 0, -1):
        if ".".join(words[:length]) in FLOORS:
            return ".".join(words[:length])
    return words[0] if words else ""


def imports(source: str, module: str, package: bool = False) -> Iterator[str]:
    """Every module a source names, wherever: in functions, for type checkers, by ``import_module("...")``."""
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            around = module.split(".")[: len(module.split(".")) - node.level + package] if node.level else []
            base = ".".join([*around, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in DYNAMIC:
            yield from (str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant))


def floor_faults(source: str, module: str, package: bool = False) -> list[str]:
    """Imports between our own rooms that go up, or sideways without a reason."""
    faults = []
    for target in imports(source, module, package):
        top = target.split(".")[0]
        if top == "tasks" and not module.startswith("tasks"):
            faults.append(f"{module} -> {target}: cl_moe never imports tasks")
        elif top == "conf":
            faults.append(f"{module} -> {target}: conf is read by Hydra, not imported")
        elif top == "cl_moe" and module.startswith("tasks"):
            if room_of(target) not in ASIDE:
                faults.append(f"{module} -> {target}: tasks knows streams, errors and seeds only")
        elif top == "cl_moe" and (fault := between(room_of(module), room_of(target))):
            faults.append(f"{module} -> {target}: {fault}")
    return faults


def between(here: str, there: str) -> str:
    """What is wrong with a room that imports another; empty if nothing is."""
    if here not in FLOORS or there not in FLOORS:
        return "a room without a floor: give it one in FLOORS"
    if here == there:
        return ""
    if here == "":
        return "" if there == "loading" else "the package itself imports nothing else"
    if FLOORS[here] == FLOORS[there]:
        known = there in EVERYBODY or (here, there) in SIBLINGS
        return "" if known else f"siblings on floor {FLOORS[here]}"
    return "" if FLOORS[here] > FLOORS[there] else f"floor {FLOORS[here]} imports floor {FLOORS[there]}"


def fence_faults(source: str, module: str, package: bool = False) -> list[str]:
    """Third parties outside their rooms."""
    room = "tasks" if module.startswith("tasks") else room_of(module)
    floor = FLOORS.get(room, -1)
    allowed = {
        "hydra": floor == 5,
        "omegaconf": floor == 5,
        "mlflow": room == "tracking",
        "datasets": room == "tasks",
        "transformers": module == "cl_moe.models.hugging_face",
        "lightning": floor >= 3,
        "pytorch_lightning": False,  # the same classes under a second name: isinstance fails between the two
    }
    faults = []
    for target in imports(source, module, package):
        top = target.split(".")[0]
        ours = top in {"cl_moe", "tasks", "conf", "torch"} or top in sys.stdlib_module_names
        if not allowed.get(top, True):
            faults.append(f"{module} -> {target}: {top} is fenced in elsewhere")
        elif floor == 0 and not ours:
            faults.append(f"{module} -> {target}: floor 0 needs torch alone")
    return faults


def function_lengths(source: str) -> list[tuple[int, str]]:
    functions = (n for n in ast.walk(parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [((f.end_lineno or f.lineno) - f.lineno + 1, f.name) for f in functions]


def percentile(values: list[int], share: float) -> int:
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@pytest.mark.parametrize("path", sources("cl_moe", "tasks"), ids=name_of)
def test_an_import_only_ever_goes_down(path: Path) -> None:
    assert not floor_faults(path.read_text("utf-8"), name_of(path), path.name == "__init__.py")


@pytest.mark.parametrize("path", sources("cl_moe", "tasks"), ids=name_of)
def test_third_parties_stay_inside_their_fences(path: Path) -> None:
    assert not fence_faults(path.read_text("utf-8"), name_of(path), path.name == "__init__.py")


def test_every_room_has_a_floor() -> None:
    assert {room_of(name_of(path)) for path in sources("cl_moe")} <= FLOORS.keys()


def test_siblings_never_import_each_other_both_ways() -> None:
    assert not [pair for pair in SIBLINGS if pair[::-1] in SIBLINGS]
    assert all(FLOORS[here] == FLOORS[there] for here, there in SIBLINGS)


def test_conf_holds_no_code() -> None:
    assert [path.name for path in sources("conf") if path.name != "__init__.py"] == []


def test_no_file_is_longer_than_300_lines() -> None:
    paths = sources("cl_moe", "tasks", "conf", "tests", "benchmarks")
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in paths}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_the_page_to_read_first_is_one_page() -> None:
    path = ROOT / "cl_moe" / "experiment.py"
    assert not path.exists() or len(path.read_text("utf-8").splitlines()) < 60


@pytest.mark.parametrize("folders", [("cl_moe", "tasks"), ("tests",)], ids="+".join)
def test_functions_are_short(folders: tuple[str, ...]) -> None:
    lengths = [item for path in sources(*folders) for item in function_lengths(path.read_text("utf-8"))]
    assert percentile([length for length, _ in lengths], 0.95) <= 35, sorted(lengths)[-20:]


PLATFORM = {*("lightning", "pytorch_lightning", "hydra", "omegaconf", "mlflow", "datasets")}
PLATFORM |= {"torchmetrics", "pandas"}


def test_a_stranger_can_import_floor_0_without_the_platform() -> None:
    ground = [name_of(path) for path in sources("cl_moe") if FLOORS.get(room_of(name_of(path))) == 0]
    code = f"import sys, {', '.join(ground)}; print(*({PLATFORM!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from cl_moe.layers import MoE\nfrom cl_moe.strategies.base import Strategy", "cl_moe.models.mlp"),
        ("def f():\n    from cl_moe.learner import Learner", "cl_moe.stream"),
        ("if TYPE_CHECKING:\n    from cl_moe import experiment", "cl_moe.learner"),
        ("from ..growth import adapt", "cl_moe.strategies.replay"),
        ("import_module('cl_moe.layers.moe')", "cl_moe.losses"),
        ("import tasks.split_digits", "cl_moe.experiment"),
        ("from cl_moe.layers.routing import Routing", "tasks.split_digits"),
        ("import cl_moe.stream", "cl_moe"),
        ("import conf", "cl_moe.cli"),
        ("from cl_moe import attic", "cl_moe.cli"),
        ("from cl_moe.attic import junk", "cl_moe.cli"),
    ],
)
def test_a_forbidden_import_is_seen(source: str, module: str) -> None:
    assert len(floor_faults(source, module)) == 1


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import mlflow", "cl_moe.learner"),
        ("from mlflow import MlflowClient", "cl_moe.tracking.record"),
        ("def f():\n    from omegaconf import DictConfig", "cl_moe.experiment"),
        ("import lightning as L", "cl_moe.strategies.base"),
        ("import pytorch_lightning", "cl_moe.learner"),
        ("from datasets import load_dataset", "cl_moe.stream"),
        ("import numpy as np", "cl_moe.layers.moe"),
        ("import torchmetrics", "cl_moe.metrics.functional.load"),
        ("import transformers", "cl_moe.models.foreign"),
    ],
)
def test_a_third_party_outside_its_fence_is_seen(source: str, module: str) -> None:
    assert len(fence_faults(source, module)) == 1


def test_what_is_allowed_passes() -> None:
    source = "from cl_moe import __version__\nfrom cl_moe.errors import InputError\nimport torch, math\n"
    assert not floor_faults(source, "cl_moe.layers.moe") + fence_faults(source, "cl_moe.layers.moe")
    assert not floor_faults("from . import store\nfrom .record import Record", "cl_moe.tracking.names")
    assert not floor_faults("from .moe import MoE", "cl_moe.layers", True)
    assert not floor_faults("from cl_moe import seeds\nfrom cl_moe.stream import Stream", "tasks.sources")


def test_a_long_function_is_seen() -> None:
    assert function_lengths("def f():\n" + "    pass\n" * 40) == [(41, "f")]
    assert percentile([*range(1, 101)], 0.95) == 95
