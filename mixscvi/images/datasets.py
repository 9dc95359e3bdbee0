"""Binary images: MNIST, FashionMNIST from idx files, or the user's own arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mixscvi.images.files import content_hash, read_files, read_npy

__all__ = ["ImageBatches", "ImageData", "binarize", "epoch_seed", "load"]

_N_VALIDATION = 10_000
# Of a user's own: fewer validate and test on less than ten, which chooses and measures nothing.
_LEAST_OWN = 60
# Fixed: validation and test images do not depend on the seed of a run.
_BINARIZATION_SEED = 20220930


def binarize(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw each pixel as a Bernoulli variable with the gray level as its probability.

    Parameters
    ----------
    images
        Gray levels in [0, 1], any shape.
    generator
        Source of randomness; the default generator of torch when ``None``.

    Returns
    -------
    Zeros and ones, of the same shape and type.

    Examples
    --------
    >>> import torch
    >>> binarize(torch.tensor([0.0, 1.0]))
    tensor([0., 1.])
    """
    return torch.bernoulli(images, generator=generator)


def _within_unit_interval(images: Tensor) -> bool:
    if not images.numel():
        return True
    low, high = images.aminmax()  # NaN, if there is any
    return bool(low >= 0) and bool(high <= 1)


def _gray_levels(images: ArrayLike, name: str) -> Tensor:
    """`(n, 1, height, width)` gray levels in [0, 1]."""
    array = np.asarray(images)
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"{name} must have shape (n, height, width), got {array.shape}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be numbers, got an array of {array.dtype}")
    levels = torch.from_numpy(array.astype(np.float32))
    if array.dtype == np.uint8:
        if array.max() == 1:
            raise ValueError(
                f"{name} are unsigned bytes of 0 and 1, which would be almost black: pass values "
                "from 0 to 255, or zeros and ones as booleans"
            )
        levels /= 255
    if not _within_unit_interval(levels):
        outside = ~((levels >= 0) & (levels <= 1)).flatten(1).all(1)
        raise ValueError(
            f"{name} must be unsigned bytes or lie in [0, 1], got {array.dtype} in "
            f"[{array.min()}, {array.max()}]; image {int(outside.nonzero()[0])} is the first that "
            "does not"
        )
    return levels[:, None]


Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class ImageData:
    """Images in three parts: gray levels for training, binary images for validation and test.

    Created by :func:`load` or, from arrays, by :meth:`from_arrays`.

    Raises
    ------
    ValueError
        If gray levels are outside [0, 1], or validation or test images are not binary.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.random.default_rng(0).random((60, 5, 7))
    >>> data = ImageData.from_arrays(images, n_validation=10, n_test=10)
    >>> data.train.shape, data.test.shape, data.image_shape
    (torch.Size([40, 1, 5, 7]), torch.Size([10, 1, 5, 7]), (5, 7))
    """

    name: str
    train: Tensor
    """Gray levels in [0, 1], `(n, 1, height, width)`: binarized again in each epoch."""
    validation: Tensor
    """Zeros and ones, `(n, 1, height, width)`: binarized once."""
    test: Tensor
    """Zeros and ones, `(n, 1, height, width)`: binarized once."""
    labels: dict[Part, np.ndarray] | None = None
    """Class of every image, `(n,)` for each part."""

    def __post_init__(self) -> None:
        if not _within_unit_interval(self.train):
            self._raise("train", "gray levels in [0, 1]", (self.train >= 0) & (self.train <= 1))
        for part in ("validation", "test"):
            images = getattr(self, part)
            binary = images == images.bool()
            if not bool(binary.all()):
                self._raise(part, "zeros and ones (binarize them)", binary)

    def _raise(self, part: str, expected: str, valid: Tensor) -> NoReturn:
        first = int((~valid).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{part} must be {expected}; image {first} is the first that is not")

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.shape[-2], self.train.shape[-1]

    def fingerprint(self, *parts: Part) -> str:
        """Hash of the images of some parts: distinguishes data of the same name and shape.

        Parameters
        ----------
        *parts
            Parts of the data: ``"train"``, ``"validation"``, ``"test"``.

        Returns
        -------
        The hash of what the parts hold, in hexadecimal digits.
        """
        return content_hash(*(getattr(self, part).contiguous().numpy() for part in parts))

    @classmethod
    def from_arrays(
        cls,
        images: ArrayLike,
        labels: ArrayLike | None = None,
        *,
        n_validation: int,
        n_test: int,
        name: str = "arrays",
    ) -> ImageData:
        """Split one array of images, in its order: train, validation, test.

        Parameters
        ----------
        images
            Gray levels, `(n, height, width)`: unsigned bytes from 0 to 255, booleans, or numbers
            in [0, 1].
        labels
            Class of every image, `(n,)`; used by the probe.
        n_validation, n_test
            Sizes of these parts, which are taken from the end.
        name
            Name of the data in tables.

        Returns
        -------
        The data: gray levels to train on, fixed binary images to validate and test on.

        Raises
        ------
        ValueError
            If the images are not gray levels of that shape, the labels are not as many, or there
            are too few images for the three parts.
        """
        levels = _gray_levels(images, "images")
        n_train = len(levels) - n_validation - n_test
        if min(n_train, n_validation, n_test) < 1:
            raise ValueError(
                f"{len(levels)} images cannot be split into train, validation and test with "
                f"n_validation={n_validation} and n_test={n_test}"
            )
        if labels is not None:
            labels = np.asarray(labels)
            if labels.shape != (len(levels),):
                raise ValueError(f"labels must have shape ({len(levels)},), got {labels.shape}")
            labels = np.split(labels, np.cumsum([n_train, n_validation]))
        return cls._binarized(name, levels.split([n_train, n_validation, n_test]), labels)

    @classmethod
    def _binarized(
        cls, name: str, levels: Sequence[Tensor], labels: Sequence[np.ndarray] | None
    ) -> ImageData:
        """From the gray levels and labels of train, validation and test."""
        train, validation, test = levels
        by_part = labels if labels is None else dict(zip(PARTS, labels, strict=True))
        generator = torch.Generator().manual_seed(_BINARIZATION_SEED)
        return cls(name, train, binarize(validation, generator), binarize(test, generator), by_part)

    def subset(
        self, n_train: int | None, n_validation: int | None, n_test: int | None
    ) -> ImageData:
        """The first images of each part.

        Parameters
        ----------
        n_train, n_validation, n_test
            Images to keep of each part; all of them where ``None``.

        Returns
        -------
        The smaller data, with their labels; parts are views of these ones'.
        """
        sizes: dict[Part, int | None] = {
            "train": n_train,
            "validation": n_validation,
            "test": n_test,
        }
        labels = self.labels and {part: self.labels[part][:n] for part, n in sizes.items()}
        return replace(
            self,
            train=self.train[:n_train],
            validation=self.validation[:n_validation],
            test=self.test[:n_test],
            labels=labels,
        )


def load(name: str, folder: str | Path | None = None) -> ImageData:
    """Load MNIST or FashionMNIST: 50,000 images for training, 10,000 each for validation and test.

    Parameters
    ----------
    name
        ``"mnist"`` or ``"fashion-mnist"``; or a ``.npy`` file of `(n, height, width)` images, of
        which the last two sixths are for validation and test.
    folder
        Folder of the four idx files, plain or gzipped, or its parent. When ``None``, they are
        downloaded once into pooch's cache and their MD5 is checked. Of a ``.npy`` file, the folder
        that its name is relative to, or that it was moved to; the current one when ``None``.

    Returns
    -------
    The images, with labels unless they are from a ``.npy`` file.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        If a file is missing, truncated, of the other data set or cannot be downloaded; the message
        names it and says how to get it.

    Examples
    --------
    >>> import numpy as np, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "mine.npy")
    ...     np.save(path, np.random.default_rng(0).random((60, 5, 7)))
    ...     data = load(str(path))
    >>> data.name, len(data.train), len(data.validation), len(data.test)
    ('mine', 40, 10, 10)
    """
    if name.endswith(".npy"):
        path = _find_own(name, folder)
        try:
            images = read_npy(path)
            if images.ndim == 3 and len(images) < _LEAST_OWN:
                raise ValueError(
                    f"there are {len(images)}, and it takes at least {_LEAST_OWN}: a sixth is for "
                    "validation, another for the test"
                )
            sixth = len(images) // 6
            return ImageData.from_arrays(images, n_validation=sixth, n_test=sixth, name=path.stem)
        except (EOFError, MemoryError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no (n, height, width) images: {error}") from error
    arrays = read_files(name, folder)
    n_train = len(arrays["train_images"]) - _N_VALIDATION
    if n_train < 1:
        raise ValueError(
            f"{name!r} must have more than {_N_VALIDATION} training images, because as many are "
            f"for validation, got {len(arrays['train_images'])}: fetch them again"
        )
    train, validation = _gray_levels(arrays["train_images"], "train images").tensor_split([n_train])
    return ImageData._binarized(
        name,
        (train, validation, _gray_levels(arrays["test_images"], "test images")),
        (*np.split(arrays["train_labels"], [n_train]), arrays["test_labels"]),
    )


def _find_own(name: str, folder: str | Path | None) -> Path:
    """The ``.npy`` file of a name, which may be relative to another folder than the current."""
    if folder is None:
        candidates = [Path(name)]
    else:
        candidates = [Path(folder, name), Path(folder, Path(name).name)]
    for path in candidates:
        if path.is_file():
            return path
    where = f"in {folder}" if folder is not None else f"({Path(name).absolute()} is missing)"
    raise FileNotFoundError(
        f"there is no file {name} {where}: name the folder that it is in, data_folder=... or "
        "--data-folder"
    )


class ImageBatches:
    """Minibatches of an epoch: a pure function of the seed and the epoch's number.

    A run that is resumed at an epoch therefore sees the same batches as an uninterrupted one.

    Parameters
    ----------
    images
        `(n, 1, height, width)`.
    batch_size
        Images in a batch, `B`.
    seed
        Seed of the order and the binarization; ``None`` leaves the images as they are.

    Examples
    --------
    >>> import torch
    >>> batches = ImageBatches(torch.rand(25, 1, 4, 4), batch_size=10, seed=0)
    >>> [len(batch) for batch in batches]
    [10, 10, 5]
    """

    def __init__(self, images: Tensor, batch_size: int, seed: int | None = None) -> None:
        self.images, self.batch_size, self.seed, self.epoch = images, batch_size, seed, 0

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        if self.seed is None:
            yield from self.images.split(self.batch_size)
            return
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch, "batches"))
        for rows in torch.randperm(len(self.images), generator=generator).split(self.batch_size):
            yield binarize(self.images[rows], generator)


def epoch_seed(seed: int, epoch: int, purpose: str) -> int:
    """Seed of one stream of random numbers in one epoch of a run."""
    return int(np.random.SeedSequence([seed, epoch, *purpose.encode()]).generate_state(1)[0])
