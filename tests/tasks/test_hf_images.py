"""Images of a data set: from folders, grey and in colour, changed, and what is wrong with bad ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cl_moe.errors import InputError
from tasks.colours import coloured
from tasks.hf import hf


def pictures(folder: Path, mode: str, side: int = 6) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(0)
    made = {}
    for label in ("cat", "owl"):
        (folder / label).mkdir(parents=True)
        for number in range(4):
            shape = (side, side, 3) if mode == "RGB" else (side, side)
            pixels = drawn.integers(0, 256, shape, dtype=np.uint8)
            deep = pixels.astype(np.uint16) * 257  # 16 bits a pixel
            Image.fromarray(deep if mode == "I;16" else pixels).save(folder / label / f"{number}.png")
            made[f"{label}/{number}"] = pixels
    return made


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB"])
def test_a_folder_of_images(tmp_path: Path, mode: str) -> None:
    made = pictures(tmp_path / "pictures", mode)
    source = {"path": str(tmp_path / "pictures"), "test_share": 0.25}
    stream = hf(source, {"input": "image", "label": "label"}, "class", 1)
    assert stream.input_shape == ((3, 6, 6) if mode == "RGB" else (6, 6))
    seen = torch.cat([side.tensors[0] for e in stream for side in (e.train, e.test)])
    expected = [
        torch.from_numpy(p).permute(2, 0, 1) if mode == "RGB" else torch.from_numpy(p) for p in made.values()
    ]
    assert Counter(x.numpy().tobytes() for x in (seen * 255).round().byte()) == Counter(
        x.contiguous().numpy().tobytes() for x in expected
    )


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images_may_be_changed_by_group_or_as_a_whole(tmp_path: Path, mode: str) -> None:
    pictures(tmp_path / "pictures", mode)
    source = {"path": str(tmp_path / "pictures"), "test_share": 0.25}
    columns, change = {"input": "image", "label": "label"}, {"kind": "coloured", "hues": [0, 120, 240]}
    plain = hf(source, columns, "class", 1)
    (cat, owl), shape = hf(source, columns, "class", 1, change), (3, 6, 6)
    assert (cat.name, owl.name) == ("cat, hue 0 degrees", "owl, hue 120 degrees")
    for experience, before, hue in ((cat, plain[0], 0.0), (owl, plain[1], 120.0)):
        for side in ("train", "test"):
            (seen, labels), (inputs, targets) = (
                getattr(experience, side).tensors,
                getattr(before, side).tensors,
            )
            assert seen.shape[1:] == shape
            assert torch.equal(labels, targets)
            assert torch.equal(seen, coloured(inputs, torch.full((len(inputs),), hue)))
    ways = hf(source, columns, "domain", transform=change, order=[2, 0, 1])
    assert [e.name for e in ways] == ["hue 240 degrees", "hue 0 degrees", "hue 120 degrees"]
    assert (ways.input_shape, ways.num_classes, ways[0].classes) == (shape, 2, (0, 1))
    assert {len(e.train) for e in ways} == {6}
    many = hf(source, columns, "domain", transform={"kind": "permuted"}, num_experiences=4)
    assert (len(many), many.input_shape) == (4, plain.input_shape)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", "L")
    (tmp_path / "pictures" / "cat" / "2.png").write_bytes(b"not an image")
    source = {"path": str(tmp_path / "pictures"), "test_share": 0.25}
    with pytest.raises(InputError, match=r"row 2 .*2\.png"):
        hf(source, {"input": "image", "label": "label"}, "class", 1)


def test_images_of_two_sizes_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", "L")
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(tmp_path / "pictures" / "owl" / "1.png")
    with pytest.raises(InputError, match="of one size"):
        hf(
            {"path": str(tmp_path / "pictures"), "test_share": 0.25},
            {"input": "image", "label": "label"},
            "class",
            1,
        )
