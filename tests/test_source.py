"""The habits of the source: nothing loaded can run code, an import does nothing, no file names a machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BANNED = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}
PICKLES = re.compile(r"(c?pickle|dill|joblib|cloudpickle)\.loads?")
KEYWORDS = {("weights_only", False), ("trust_remote_code", True), ("allow_pickle", True)}
YAML_UNSAFE = re.compile(r"(?:trust_remote_code|allow_pickle):\s*true|weights_only:\s*false", re.IGNORECASE)
MACHINE_PATH = re.compile(r"(?<![\w.:/~*}-])/(?:work|root|home|Users|tmp|opt|mnt|private)/\w")
HEAVY = {
    "torch",
    "lightning",
    "mlflow",
    "datasets",
    "matplotlib",
    "pandas",
    "sklearn",
    "scipy",
    "torchmetrics",
}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def unsafe_loads(source: str, pickles: bool = True) -> list[str]:
    """Calls that would run code hidden in data."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in BANNED or (pickles and PICKLES.fullmatch(called)):
                faults.append(f"line {node.lineno}: {called}")
            words = [(word.arg, getattr(word.value, "value", None)) for word in node.keywords]
            faults += [
                f"line {node.lineno}: {arg}={value}" for arg, value in words if (arg, value) in KEYWORDS
            ]
    return faults


def work_at_import(source: str) -> list[str]:
    """Top-level statements that do something: calls, loops, and writes into other people's objects."""
    faults = []
    pending: list[ast.AST] = list(ast.parse(source).body)
    for node in pending:
        if isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
            if "__main__" not in ast.unparse(node).splitlines()[0]:
                pending += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
            continue
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        foreign = any(isinstance(target, ast.Attribute | ast.Subscript) for target in targets)
        called = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        if called and ".register_autograd(" in ast.unparse(node):
            continue  # part of the definition of an operator
        if called or foreign or isinstance(node, ast.For | ast.While | ast.With | ast.Delete):
            faults.append(ast.unparse(node).splitlines()[0])
    return faults


def texts() -> dict[str, str]:
    """Files that git tracks or would track; the bundled data speak for their authors, not for us."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name and not name.startswith("tasks/data/")]
    contents = {label(path): path.read_bytes() for path in paths if path.is_file()}
    return {name: text.decode("utf-8", "replace") for name, text in contents.items() if b"\0" not in text}


def loaded_by(module: str, suspects: set[str]) -> set[str]:
    code = f"import sys, {module}; print(*({suspects!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("path", sources("cl_moe", "tasks", "tests", "benchmarks"), ids=label)
def test_nothing_loaded_can_run_code(path: Path) -> None:
    assert not unsafe_loads(path.read_text("utf-8"), pickles=not path.is_relative_to(ROOT / "tests"))


@pytest.mark.parametrize("path", sources("cl_moe", "tasks"), ids=label)
def test_importing_a_module_does_nothing(path: Path) -> None:
    assert not work_at_import(path.read_text("utf-8"))


def test_no_text_names_a_machine_or_trusts_data() -> None:
    rules = [MACHINE_PATH, YAML_UNSAFE]
    found = {name: [hit for rule in rules for hit in rule.findall(text)] for name, text in texts().items()}
    assert {name: hits for name, hits in found.items() if hits} == {}


@pytest.mark.parametrize("module", ["cl_moe", "cl_moe.errors", "cl_moe.cli"])
def test_the_command_line_is_quick_to_import(module: str) -> None:
    if (ROOT / module.replace(".", "/")).is_dir() or (ROOT / f"{module.replace('.', '/')}.py").exists():
        assert loaded_by(module, HEAVY) == set()


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "pickle.load(file)",
        "def f():\n    return eval(text)",
        "np.load(path, allow_pickle=True)",
        "load_dataset(name, trust_remote_code=True)",
    ],
)
def test_an_unsafe_load_is_seen(source: str) -> None:
    assert len(unsafe_loads(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.set_num_threads(1)",
        "os.environ['A'] = '1'",
        "torch.backends.x = True",
        "try:\n    warm_up()\nfinally:\n    pass",
        "for name in NAMES:\n    register(name)",
    ],
)
def test_work_at_import_is_seen(source: str) -> None:
    assert len(work_at_import(source)) == 1


def test_what_is_allowed_passes() -> None:
    assert not unsafe_loads("torch.load(path, weights_only=True)\nyaml.safe_load(text)\nmodel.eval()")
    quiet = '"""Doc."""\nimport os\nX = dict(a=1)\nif X:\n    def f():\n        g()\n'
    assert not work_at_import(quiet + 'if __name__ == "__main__":\n    main()')


@pytest.mark.parametrize("folder", ["work", "home", "Users", "tmp"])
def test_a_machine_path_is_seen(folder: str) -> None:
    assert MACHINE_PATH.search(f"open('/{folder}/a/b')")
    assert not MACHINE_PATH.search(f"https://example.org/{folder}/a ../{folder}/x #!/usr/bin/env")


def test_a_yaml_that_trusts_data_and_a_heavy_import_are_seen() -> None:
    assert YAML_UNSAFE.search("trust_remote_code" + ": True")
    assert loaded_by("csv", {"csv", "torch"}) == {"csv"}
