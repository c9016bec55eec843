"""Where data is found, how it is read, and what a bad file says."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pandas as pd
import pytest

from cl_moe.errors import InputError
from tasks import sources


def write(path: Path, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_parquet(path)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(sources.DATA_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("part", ["", "may_bundle", "tests_only"])
def test_the_named_folder_comes_first(folder: Path, part: str) -> None:
    own = sources.find("bible_en.parquet")
    named = write(folder / part / "novels_en.parquet", text=["a"])
    assert sources.find("novels_en.parquet") == named
    assert sources.find("bible_en.parquet") == own


def test_the_package_brings_what_it_promises() -> None:
    promised = {"novels_en", "bible_en", "bible_es", "python_code"}
    promised |= {f"brown_{genre}" for genre in ("press", "fiction", "learned", "general")}
    assert promised <= set(sources.available())


def test_an_empty_variable_is_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sources.DATA_VARIABLE, "")
    assert len(sources.folders()) == 1


def test_a_variable_that_names_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(sources.DATA_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(InputError, match="absent") as caught:
        sources.find("novels_en.parquet")
    assert sources.DATA_VARIABLE in caught.value.key


@pytest.mark.parametrize("name", ["absent.parquet", "../novels_en.parquet", "/novels_en.parquet", ".", ".."])
def test_a_missing_file_names_itself_and_the_variable(name: str) -> None:
    with pytest.raises(InputError) as caught:
        sources.find(name, "stream.domains")
    assert repr(name) in caught.value.got
    assert "stream.domains" in caught.value.key
    assert sources.DATA_VARIABLE in caught.value.key


def test_the_message_lists_what_there_is() -> None:
    with pytest.raises(InputError, match="bible_en, bible_es, brown_fiction"):
        sources.find("bible_fr.parquet")


def test_columns_come_in_order_and_nothing_stays_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from datasets import config

    texts = ["é", "", "a\n", "\x00", "日本"] * 300
    path = write(tmp_path / "data" / "some.parquet", text=texts, more=range(len(texts)))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    caches = [Path(config.HF_DATASETS_CACHE), Path(config.HF_MODULES_CACHE)]
    before = [sorted(cache.rglob("*")) for cache in caches]
    quiet = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    assert sources.read_parquet(path, [("text", "stream.column")]) == {"text": texts}
    assert os.listdir(tmp_path) == ["data"]
    assert [sorted(cache.rglob("*")) for cache in caches] == before
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == quiet


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    for text in ("one", "two"):
        path = write(tmp_path / "some.parquet", text=[text])
        assert sources.read_parquet(path, [("text", "stream.column")])["text"] == [text]


def test_reading_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "some.parquet", text=["a"])
    sources.read_parquet(path, [("text", "stream.column")])
    path.write_bytes(b"PAR1 broken")
    with pytest.raises(InputError):
        sources.read_parquet(path, [("text", "stream.column")])
    assert capfd.readouterr() == ("", "")


def test_a_missing_column(tmp_path: Path) -> None:
    path = write(tmp_path / "some.parquet", body=["a"], split=["train"])
    with pytest.raises(InputError) as caught:
        sources.read_parquet(path, [("split", "stream.domains"), ("text", "stream.column")])
    assert "body, split" in caught.value.got
    assert "'text'" in caught.value.allowed
    assert caught.value.key == "stream.column"


@pytest.mark.parametrize("values", [[1, 2], [b"\xff", b"a"], [["a"], ["b"]]])
def test_a_column_that_is_no_text(tmp_path: Path, values: list) -> None:
    path = write(tmp_path / "some.parquet", text=values)
    with pytest.raises(InputError, match="column of UTF-8 text") as caught:
        sources.read_parquet(path, [("text", "stream.column")])
    assert caught.value.key == "stream.column"


def test_a_row_without_text(tmp_path: Path) -> None:
    path = write(tmp_path / "some.parquet", text=["a", None])
    with pytest.raises(InputError, match="in row 1"):
        sources.read_parquet(path, [("text", "stream.column")])


def test_a_column_that_is_not_utf8(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "latin.parquet"
    latin = pa.array(["é".encode("latin-1")], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": latin}), path)
    with pytest.raises(InputError, match=r"latin\.parquet"):
        sources.read_parquet(path, [("text", "stream.column")])


@pytest.mark.parametrize("content", [b"", b"not a parquet file", b"PAR1" + b"\x00" * 50 + b"PAR1"])
def test_a_file_that_is_no_parquet(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.parquet"):
        sources.read_parquet(path, [("text", "stream.column")])


def test_a_cut_off_file(tmp_path: Path) -> None:
    path = tmp_path / "cut.parquet"
    path.write_bytes(sources.find("novels_en.parquet").read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"cut\.parquet"):
        sources.read_parquet(path, [("text", "stream.column")])


def test_a_damaged_file(tmp_path: Path) -> None:
    whole = bytearray(sources.find("novels_en.parquet").read_bytes())
    whole[100_000:100_400] = b"\xff" * 400
    path = tmp_path / "damaged.parquet"
    path.write_bytes(whole)
    with pytest.raises(InputError, match=r"damaged\.parquet"):
        sources.read_parquet(path, [("text", "stream.column")])


def test_a_full_disk_is_not_blamed_on_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(datasets.Dataset, "from_parquet", full)
    with pytest.raises(OSError, match="No space"):
        sources.read_parquet(tmp_path / "some.parquet", [("text", "stream.column")])


def test_every_bundled_file_has_its_licence_line() -> None:
    folder = Path(sources.__file__).parent / "data"
    lines = [line for line in (folder / "LICENSES.md").read_text().splitlines() if line.startswith("|")]
    for path in folder.iterdir():
        if path.suffix in (".parquet", ".npz"):
            line = [line for line in lines if f"`{path.name}`" in line]
            assert len(line) == 1, path.name
            assert all(cell.strip() for cell in line[0].strip("|").split("|"))


def test_the_bundle_stays_small() -> None:
    folder = Path(sources.__file__).parent / "data"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6.5e6
