"""What resume, branch and auto_resume stand for, before Hydra reads it; no run is needed to tell."""

from __future__ import annotations

import contextlib
import shlex
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cl_moe.arguments import branch_point, rewritten
from cl_moe.errors import InputError

PARENT = (
    *("layer=moe", "growth=at", "growth.events={1:4}", "strategy=[replay,lwf]", "strategy.lwf.alpha=2"),
    *("arm=mine", "output_dir=somewhere", "auto_resume=true", "+model.extra=1", "checkpoint.keep=3"),
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def a_run(folder: Path, *overrides: str, config_dir: str | None = None) -> Path:
    folder.mkdir(parents=True)
    OmegaConf.save({"overrides": list(overrides), "config_dir": config_dir}, folder / "command.yaml")
    return folder


def a_sweep(folder: Path, task: list[str], hydra: list[str], cwd: Path) -> Path:
    folder.mkdir(parents=True)
    sources = [{"path": "hydra.conf", "schema": "pkg", "provider": "hydra"}]
    own = {
        "overrides": {"task": task, "hydra": hydra},
        "runtime": {"cwd": str(cwd), "config_sources": sources},
    }
    OmegaConf.save({"hydra": own}, folder / "multirun.yaml")
    return folder


def refusal(*arguments: str) -> InputError:
    with pytest.raises(InputError) as caught:
        rewritten([*arguments])
    return caught.value


def test_other_arguments_pass_untouched(here: Path):
    for words in (
        [],
        ["layer=moe", "-m"],
        ["resume=null"],
        ["branch=null"],
        ["auto_resume=false", "seed.init=1,2"],
    ):
        assert rewritten(words) == words


def test_the_same_command_finds_the_same_folder(here: Path):
    words = ["auto_resume=true", "layer=moe"]
    once, again, other = rewritten(words), rewritten(words), rewritten([*words, "seed.init=1"])
    assert once == again
    assert once[:-1] == words
    assert rewritten([*words, "-m"])[:3] == ["-m", *words]
    assert once[-1].startswith("hydra.run.dir=outputs/auto-")
    assert other[-1] != once[-1]
    sweep = rewritten(["-m", *words])
    assert sweep[-1].startswith("hydra.sweep.dir=multirun/auto-")
    assert rewritten(["hydra.mode=MULTIRUN", *words])[-1].startswith("hydra.sweep.dir=multirun/auto-")


@pytest.mark.parametrize("fixed", ["output_dir=out", "hydra.run.dir=out", "hydra.sweep.dir=out"])
def test_a_folder_that_was_given_stays(fixed: str, here: Path):
    words = ["auto_resume=True", fixed, *(["-m"] if "sweep" in fixed else [])]
    assert rewritten(words) == words


def test_a_folder_that_no_second_start_finds_is_refused(here: Path):
    assert refusal("auto_resume=true", "hydra.run.dir=runs/${now:%H}").key == "hydra.run.dir"
    assert refusal("auto_resume=true,false").key == "auto_resume"


def test_a_run_is_resumed_with_its_own_arguments(here: Path):
    folder = a_run(here / "it's", *PARENT, config_dir=f"file://{here}")
    got = rewritten([f'resume="{folder}"', "layer=moe"])
    assert got[0] == f"--config-dir={here}"
    assert [w for w in got if w in PARENT] == [w for w in PARENT if w != "output_dir=somewhere"]
    quoted = "'" + str(folder).replace("'", "\\'") + "'"
    assert {f"resume={quoted}", f"hydra.run.dir={quoted}", f"output_dir={quoted}"} <= {*got}


def test_how_it_survives_may_change_when_a_run_goes_on(here: Path):
    a_run(here / "out", *PARENT)
    got = rewritten(["resume=out", "checkpoint.keep=9", "checkpoint.every_steps=5", "auto_resume=false"])
    assert {"checkpoint.keep=9", "checkpoint.every_steps=5", "auto_resume=false"} <= {*got}
    assert not {"checkpoint.keep=3", "auto_resume=true"} & {*got}
    assert refusal("resume=out", "optimizer.lr=1").key == "optimizer.lr"
    assert "one run at a time" in refusal("resume=out", "-m").allowed


def test_a_sweep_is_resumed_with_its_own_arguments(here: Path):
    own = ["hydra.sweep.dir=sweep", "hydra/launcher=basic", "hydra.mode=MULTIRUN"]
    a_sweep(here / "sweep", ["layer=dense,moe", "trainer.epochs=1"], own, here)
    wanted = ["layer=dense,moe", "trainer.epochs=1", "hydra/launcher=basic"]
    assert rewritten(["resume=sweep"]) == ["--multirun", *wanted, "hydra.sweep.dir='sweep'"]
    again = rewritten(["-m", "resume=sweep", "layer=dense,moe", "hydra.sweep.dir=sweep"])
    assert again == ["-m", *wanted, "hydra.sweep.dir='sweep'"]
    with contextlib.chdir("/"):  # where the same text is another folder
        assert rewritten([f"resume={here / 'sweep'}"])[-1] == f"hydra.sweep.dir='{here / 'sweep'}'"
    assert refusal("resume=sweep", "layer=dense").got == "layer=dense beside resume"
    assert refusal("branch=sweep@1").key == "branch"


def test_a_sweep_that_cannot_be_rebuilt_is_refused(here: Path):
    folder = a_sweep(here / "sweep", ["output_dir=runs/${seed.init}"], [], here)
    with contextlib.chdir(folder):
        assert refusal(f"resume={folder}").key == "the working folder"
    for half in (
        "",
        "hydra:\n  overrides:\n    task:\n    - seed.init=0",
        "hydra: [",
        "hydra:\n  runtime: 3\n",
    ):
        (folder / "multirun.yaml").write_text(half)
        assert "does not hold the whole command" in refusal("resume=sweep").got


def test_a_branch_has_its_parents_arguments_with_the_given_ones_on_top(here: Path):
    folder = a_run(here / "out", *PARENT)
    got = rewritten(["branch=out@2"])
    kept = [*PARENT[:6], *PARENT[8:]]
    assert got == [*kept, f"branch='{folder}@2'"]
    got = rewritten(["-m", "branch=out@2", "growth=every_experience", "growth.num_experts=4,8"])
    kept = ["layer=moe", "strategy=[replay,lwf]", "strategy.lwf.alpha=2", *PARENT[8:]]
    assert got == ["-m", *kept, "growth=every_experience", "growth.num_experts=4,8", f"branch='{folder}@2'"]
    got = rewritten(["branch=out@2", "strategy=replay", "model.extra=2"])
    assert got[:3] == ["layer=moe", "growth=at", "growth.events={1:4}"]
    assert got[3:] == ["checkpoint.keep=3", "strategy=replay", "model.extra=2", f"branch='{folder}@2'"]


def test_another_value_of_one_key_replaces_only_that_one(here: Path):
    a_run(here / "out", "growth=at", "growth.events={1:4}", "growth.eventsize=1")
    got = rewritten(["branch=out@2", "++growth.events={3:8}"])
    assert got[:3] == ["growth=at", "growth.eventsize=1", "++growth.events={3:8}"]


@pytest.mark.parametrize("same", ["output_dir=other", "hydra.run.dir=x", "auto_resume=true", "seed.init=3"])
def test_the_arm_of_the_parent_stays_where_nothing_of_it_changes(same: str, here: Path):
    a_run(here / "out", *PARENT)
    assert "arm=mine" in rewritten(["branch=out@2", same])
    assert "arm=mine" not in rewritten(["branch=out@2", "optimizer.lr=1"])


def test_a_branch_that_resumes_by_itself_has_a_folder_of_its_own(here: Path):
    a_run(here / "out", *PARENT)
    words = ["branch=out@2", "auto_resume=true"]
    (folder,) = (word for word in rewritten(words) if word.startswith("hydra.run.dir"))
    assert folder in rewritten(words)
    assert folder not in rewritten(["branch=out@1", "auto_resume=true"])


def test_where_a_branch_starts(here: Path):
    assert branch_point(f"{a_run(here / 'a@b')}@12") == (here / "a@b", 12)


@pytest.mark.parametrize("value", ["out", "out@", "@2", "out@two", "out@-1", "out@1.5", "nowhere@1", "out@²"])
def test_a_branch_that_names_no_boundary_is_refused(value: str, here: Path):
    a_run(here / "out", *PARENT)
    error = refusal(f"branch={value}")
    assert (error.got, error.key) == (f"branch={value}", "branch")


def test_one_branch_at_a_time(here: Path):
    a_run(here / "out", *PARENT)
    assert "one value" in refusal("-m", "branch=out@1,out@2").allowed
    assert "one value" in refusal("branch=choice(out@1,out@2)").allowed
    assert refusal("branch=out@1", "resume=out").key == "branch (or resume)"


@pytest.mark.parametrize("word", ["resume=", "branch=''", "auto_resume="])
def test_an_empty_value_is_no_null(word: str, here: Path):
    error = refusal(word, "layer=moe")
    assert (error.got, error.key) == (word, word.partition("=")[0])


def test_a_name_that_means_something_to_hydra(here: Path):
    folder, at = a_run(here / "a,b", "layer=moe"), a_run(here / "choice(a)@b", "layer=moe")
    assert f"resume='{folder}'" in rewritten(["resume=a,b"])
    assert rewritten(["branch=a,b@1"])[-1] == f"branch='{folder}@1'"
    assert rewritten(["branch=choice(a)@b@1"])[-1] == f"branch='{at}@1'"
    (here / "null").mkdir()
    assert rewritten(["resume=null"]) == ["resume=null"]
    a_sweep(here / "x y", [], [], here)
    (here / "x y/multirun.yaml").write_text("")
    assert shlex.quote(f"hydra.sweep.dir={here / 'x y'}") in refusal("resume=x y").allowed


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--cfg", "job", "resume=out"], ["--cfg", "job"]),
        (["resume=out", "-c", "job"], ["-c", "job"]),
        (["--info", "resume=out"], ["--info=all"]),
        (["resume=out", "-i", "--resolve"], ["--info=all", "--resolve"]),
        (["-i", "config", "resume=out"], ["-i", "config"]),
    ],
)
def test_flags_stand_first_with_their_values(given: list[str], wanted: list[str], here: Path):
    a_run(here / "out", "layer=moe")
    got = rewritten(given)
    assert got[: len(wanted) + 1] == [*wanted, "layer=moe"]
    branched = rewritten([word.replace("resume=out", "branch=out@1") for word in given])
    assert branched[: len(wanted) + 1] == [*wanted, "layer=moe"]


DAMAGED = ["", "- 1", "overrides: 3", "overrides: [{a: 1}]", "overrides: []\nconfig_dir: [1]", "a: [", "\0"]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_command_is_named(content: str, here: Path):
    file = a_run(here / "out") / "command.yaml"
    file.write_text(content)
    for word, key in (("resume=out", "resume"), ("branch=out@1", "branch")):
        error = refusal(word)
        assert (error.got.split(",")[0], error.key) == (str(file), key)


# ---- where the numbers of a run go that is resumed elsewhere


def store_in(arguments: list[str]) -> list[str]:
    return [word for word in arguments if word.startswith("tracking.uri=")]


def begun(folder: Path, place: Path, *overrides: str) -> Path:
    """A run that began in a place with a store of that place."""
    a_run(folder, *overrides)
    (place / "mlflow.db").touch()
    command = {"overrides": [*overrides], "config_dir": None, "folder": str(folder)}
    OmegaConf.save(command | {"store": f"sqlite:///{place}/mlflow.db"}, folder / "command.yaml")
    return folder


def test_a_run_goes_on_in_the_store_in_which_it_began(here: Path):
    folder = begun(here / "one/out", here / "one", "layer=moe", "tracking.uri=sqlite:///mlflow.db")
    own = f"tracking.uri='sqlite:///{here}/one/mlflow.db'"
    for place in (here, here / "one", folder):
        with contextlib.chdir(place):
            assert store_in(rewritten([f"resume={folder}"])) == [own]
            given = rewritten([f"resume={folder}", "tracking.uri=sqlite:///other.db"])
            assert store_in(given) == ["tracking.uri=sqlite:///other.db"]
    child = rewritten(["branch=one/out@1"])
    assert store_in(child) == ["tracking.uri=sqlite:///mlflow.db"]  # of the child's own working folder


def test_a_store_moves_with_its_run_or_stays(here: Path):
    begun(here / "one/runs/out", here / "one", "layer=moe")
    shutil.copytree(here / "one", here / "copy")
    assert store_in(rewritten(["resume=copy/runs/out"])) == [
        f"tracking.uri='sqlite:///{here}/copy/mlflow.db'"
    ]
    shutil.move(here / "one/runs/out", here / "alone")
    assert store_in(rewritten(["resume=alone"])) == [f"tracking.uri='sqlite:///{here}/one/mlflow.db'"]
    (here / "one/mlflow.db").unlink()
    assert store_in(rewritten(["resume=alone"])) == []


def test_a_sweep_that_goes_on_elsewhere_keeps_its_store(here: Path):
    (here / "one").mkdir()
    a_sweep(here / "one/sweep", ["layer=dense,moe"], [], here / "one")
    begun(here / "one/sweep/0", here / "one", "layer=dense")
    own = f"tracking.uri='sqlite:///{here}/one/mlflow.db'"
    assert store_in(rewritten(["resume=one/sweep"])) == [own]
    assert store_in(rewritten(["resume=one/sweep", "tracking.uri=http://x"])) == ["tracking.uri=http://x"]
    with contextlib.chdir("one"):
        assert store_in(rewritten(["resume=sweep"])) == []
