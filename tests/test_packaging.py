"""What a user installs: the wheel's content, the pins, the licences."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import cl_moe

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
DATA = ROOT / "tasks" / "data"
PACKAGES = ("cl_moe", "conf", "tasks")
PINNED_BY_TORCH = re.compile(r"nvidia-|cuda-|(pytorch-)?triton")
"""What a CUDA or ROCm build of torch brings: each build names its own versions."""


OF_ITS_OWN = {"ray": "constraints-ray.txt"}
"""Constraints of extras that cannot stand beside the others."""


def pins(file: str = "constraints.txt") -> dict[str, Version]:
    lines = (ROOT / file).read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def outside_pins(requirements: Iterable[str], pinned: dict[str, Version]) -> list[str]:
    """Requirements that have no pin, or one that they refuse."""
    parsed = [Requirement(text) for text in requirements]
    return [
        str(one)
        for one in parsed
        if (pin := pinned.get(canonicalize_name(one.name))) is None or pin not in one.specifier
    ]


def needed(requirements: Iterable[str], extras: Iterable[str] = ()) -> set[str]:
    """Installed distributions that the requirements ask for, transitively, on this machine."""
    found: set[str] = set()
    pending = [(Requirement(text), tuple(extras)) for text in requirements]
    for one, wanted in pending:
        name = canonicalize_name(one.name)
        if one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
            continue
        key = f"{name}[{','.join(sorted(one.extras))}]"
        if key in found:
            continue
        try:
            children = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(key)
        pending += [(Requirement(text), tuple(one.extras)) for text in children]
    return {key.split("[")[0] for key in found}


def tree(*folders: str) -> set[str]:
    """Files of the working tree that a package is made of."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this tree, built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_the_code_the_configs_and_the_data_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == tree(*PACKAGES)
    assert {name.split("/")[0] for name in names} <= set(PACKAGES)


def test_the_wheel_carries_the_licences(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    for licence in PROJECT["license-files"]:
        assert any(name.endswith(f".dist-info/licenses/{licence}") for name in names), licence


def test_one_version_everywhere(wheel: zipfile.ZipFile) -> None:
    meta = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    built = Parser().parsestr(wheel.read(meta).decode())["Version"]
    assert built == PROJECT["version"] == cl_moe.__version__


def test_the_commands_lead_to_functions() -> None:
    for command, target in PROJECT["scripts"].items():
        module, function = target.split(":")
        stem = ROOT / module.replace(".", "/")
        source = (stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")).read_text("utf-8")
        assert re.search(rf"^(def {function}\(|from .* import .*\b{function}\b)", source, re.MULTILINE), (
            command
        )


def test_malicious_releases_are_refused() -> None:
    (lightning,) = (one for one in map(Requirement, PROJECT["dependencies"]) if one.name == "lightning")
    assert "2.6.2" not in lightning.specifier
    assert "2.6.3" not in lightning.specifier
    assert not {str(pins()[name]) for name in ("lightning", "pytorch-lightning")} & {"2.6.2", "2.6.3"}


@pytest.mark.parametrize("file", ["constraints.txt", *OF_ITS_OWN.values()])
def test_constraints_are_exact_sorted_and_fit_any_build(file: str) -> None:
    lines = [line for line in (ROOT / file).read_text("utf-8").splitlines() if line[:1] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []
    names = [canonicalize_name(line.split("==")[0]) for line in lines]
    assert names == sorted(set(names))
    assert "cl-moe" not in names


@pytest.mark.parametrize("group", ["dependencies", *EXTRAS])
def test_constraints_satisfy_what_the_project_asks_for(group: str) -> None:
    pinned = pins(OF_ITS_OWN.get(group, "constraints.txt"))
    assert outside_pins([*PROJECT["dependencies"], *EXTRAS.get(group, [])], pinned) == []


def test_constraints_pin_whatever_the_installation_brought() -> None:
    beside = [extra for extra in EXTRAS if extra not in OF_ITS_OWN]
    asked = [*PROJECT["dependencies"], *(one for extra in beside for one in EXTRAS[extra])]
    brought = {name for name in needed(asked) if not PINNED_BY_TORCH.match(name)}
    assert len(brought) > len(asked)
    assert brought - pins().keys() == set()


def test_a_missing_or_refused_pin_is_seen() -> None:
    pinned = {"torch": Version("2.9.0"), "numpy": Version("2.4.0")}
    assert outside_pins(["torch>=2.10", "numpy>=2", "scipy"], pinned) == ["torch>=2.10", "scipy"]
    assert {"pluggy", "iniconfig"} <= needed(["pytest"])


def test_every_data_file_is_named_among_the_licences() -> None:
    licences = (DATA / "LICENSES.md").read_text("utf-8")
    unnamed = [
        path.name for path in DATA.iterdir() if path.name != "LICENSES.md" and path.name not in licences
    ]
    assert unnamed == []


def test_the_bundled_data_stay_small() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 6.5e6
