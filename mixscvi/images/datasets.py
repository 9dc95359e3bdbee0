"""Binary images: MNIST, FashionMNIST from idx files, or the user's own arrays."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = ["DATASETS", "ImageBatches", "ImageData", "binarize", "load", "read_idx"]

_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
# Where the published .gz files are, and their MD5 in the order of _FILES.
DATASETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion-mnist": (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
}
# What is in them, by a hash of the bytes behind the header: the files' names are the same.
_CONTENTS = {
    "000b548c0dd88b2b": ("mnist", "train_images"),
    "f52eea2c5f99c70c": ("mnist", "train_labels"),
    "a66f37370f3f012b": ("mnist", "test_images"),
    "9b61c31a41795831": ("mnist", "test_labels"),
    "2f2c7539a12d77a4": ("fashion-mnist", "train_images"),
    "5a94272eea281cb1": ("fashion-mnist", "train_labels"),
    "991baa1070496e0a": ("fashion-mnist", "test_images"),
    "91602d8c52e4381e": ("fashion-mnist", "test_labels"),
}
_N_VALIDATION = 10_000
# Fixed once for everybody: validation and test images do not depend on a run's seed.
_BINARIZATION_SEED = 20220930


def read_idx(path: str | Path) -> np.ndarray:
    """Read one idx file of unsigned bytes, plain or gzipped.

    Parameters
    ----------
    path
        The file; gzip is told from its name's ending ``.gz``.

    Returns
    -------
    Unsigned bytes in the shape that the file's header gives, `(n, height, width)` for images and
    `(n,)` for labels.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no idx file of bytes, or is truncated or too long.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> header = bytes([0, 0, 8, 1]) + (3).to_bytes(4, "big")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "labels")
    ...     _ = path.write_bytes(header + bytes([7, 2, 1]))
    ...     read_idx(path)
    array([7, 2, 1], dtype=uint8)
    """
    path = Path(path)
    again = "fetch it again, or delete it to have it fetched"
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path} is a truncated or damaged gzip file ({error}): {again}"
        ) from error
    start = 4 + 4 * raw[3] if len(raw) > 4 else 5
    if raw[:3] != b"\0\0\x08" or len(raw) < start:
        raise ValueError(f"{path} is not an idx file of unsigned bytes: {again}")
    shape = tuple(int(n) for n in np.frombuffer(raw[4:start], ">u4"))
    if len(raw) - start != math.prod(shape):
        raise ValueError(
            f"{path} is truncated or damaged: its header promises {math.prod(shape)} bytes, "
            f"it has {len(raw) - start}: {again}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def content_hash(*arrays: np.ndarray) -> str:
    """Hash of the numbers in arrays."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(array)
    return digest.hexdigest()


def _check_contents(path: Path, array: np.ndarray, name: str, part: str) -> None:
    """Refuse a file that is known to hold something else than its name says."""
    other, holds = _CONTENTS.get(content_hash(array), (name, part))
    if (other, holds) != (name, part):
        mend = (
            "give the files their names back"
            if other == name
            else f"put the files of each into a folder of its own, {name} and {other}"
        )
        raise ValueError(
            f"{path} holds the {holds.replace('_', ' ')} of {other!r}, not the "
            f"{part.replace('_', ' ')} of {name!r}: {mend}"
        )


def _find(name: str, file: str, folder: Path) -> Path:
    for parent in (folder / name, folder):
        for candidate in (parent / file, parent / f"{file}.gz"):
            if candidate.is_file():
                return candidate
    raise FileNotFoundError(
        f"{file}[.gz] of {name!r} is neither in {folder / name} nor in {folder}. Fetch "
        f"{DATASETS[name][0]}{file}.gz into one of them, or give no folder: then it is fetched."
    )


def _fetch(file: str, url: str, md5: str) -> Path:
    import pooch

    try:
        return Path(pooch.retrieve(f"{url}{file}.gz", f"md5:{md5}", progressbar=True))
    except OSError as error:  # what requests raises without a network is one
        raise OSError(
            f"could not fetch {url}{file}.gz ({type(error).__name__}). Fetch it where there is a "
            "network, and name its folder: data_folder=... or --data-folder"
        ) from error


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
    levels = torch.from_numpy(array.astype(np.float32))
    if array.dtype == np.uint8:
        if array.max() == 1:
            raise ValueError(
                f"{name} are unsigned bytes of 0 and 1, which would be all but black: give 0 to "
                "255, or zeros and ones as booleans"
            )
        levels /= 255
    if not _within_unit_interval(levels):
        raise ValueError(
            f"{name} must be unsigned bytes or lie in [0, 1], got {array.dtype} in "
            f"[{array.min()}, {array.max()}]"
        )
    return levels[:, None]


@dataclass(frozen=True)
class ImageData:
    """Images in three parts: gray levels to train on, binary images to validate and test on.

    Make it with :func:`load` or, from arrays, with :meth:`from_arrays`.

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
    """Gray levels in [0, 1], `(n, 1, height, width)`: binarized anew in each epoch."""
    validation: Tensor
    """Zeros and ones, `(n, 1, height, width)`: binarized once."""
    test: Tensor
    """Zeros and ones, `(n, 1, height, width)`: binarized once."""
    labels: dict[Literal["train", "validation", "test"], np.ndarray] | None = None
    """Class of every image, `(n,)` for each part."""

    def __post_init__(self) -> None:
        if not _within_unit_interval(self.train):
            self._refuse("train", "gray levels in [0, 1]", (self.train >= 0) & (self.train <= 1))
        for part in ("validation", "test"):
            images = getattr(self, part)
            binary = images == images.bool()
            if not bool(binary.all()):
                self._refuse(part, "zeros and ones (binarize them)", binary)

    def _refuse(self, part: str, expected: str, valid: Tensor) -> NoReturn:
        first = int((~valid).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{part} must be {expected}; image {first} is the first not to be")

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.shape[-2], self.train.shape[-1]

    def fingerprint(self, *parts: Literal["train", "validation", "test"]) -> str:
        """Hash of the images of some parts, to tell data of one name and shape apart."""
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
            Class of every image, `(n,)`, for the probe.
        n_validation, n_test
            Images in these parts, taken from the end.
        name
            What the data are called in tables.
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
        if labels is not None:
            labels = dict(zip(("train", "validation", "test"), labels, strict=True))
        generator = torch.Generator().manual_seed(_BINARIZATION_SEED)
        return cls(name, train, binarize(validation, generator), binarize(test, generator), labels)

    def subset(
        self, n_train: int | None, n_validation: int | None, n_test: int | None
    ) -> ImageData:
        """The first images of each part; all of them where ``None``."""
        sizes = {"train": n_train, "validation": n_validation, "test": n_test}
        parts = {part: getattr(self, part)[:n] for part, n in sizes.items()}
        labels = self.labels and {part: self.labels[part][:n] for part, n in sizes.items()}
        return replace(self, **parts, labels=labels)


def load(name: str, folder: str | Path | None = None) -> ImageData:
    """Load MNIST or FashionMNIST: 50 000 images to train, 10 000 to validate, 10 000 to test.

    Parameters
    ----------
    name
        ``"mnist"`` or ``"fashion-mnist"``; or a ``.npy`` file of `(n, height, width)` images, of
        which the last sixths validate and test.
    folder
        Where the four idx files are, plain or gzipped, or the folder above. Without it they are
        fetched once into pooch's cache and checked by their MD5.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        Naming the file that is missing, truncated, of the other data set or could not be fetched,
        and how to get it.
    """
    if name.endswith(".npy"):
        try:
            images = np.load(name)
            sixth = max(1, len(images) // 6)
            return ImageData.from_arrays(
                images, n_validation=sixth, n_test=sixth, name=Path(name).stem
            )
        except (EOFError, TypeError, ValueError) as error:
            raise ValueError(f"{name} holds no (n, height, width) images: {error}") from error
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {[*DATASETS]} or a .npy file, got {name!r}")
    url, checksums = DATASETS[name]
    arrays = {}
    for (part, file), md5 in zip(_FILES.items(), checksums, strict=True):
        path = _fetch(file, url, md5) if folder is None else _find(name, file, Path(folder))
        arrays[part] = read_idx(path)
        kind = part.split("_")[1]
        if arrays[part].ndim != {"images": 3, "labels": 1}[kind]:
            raise ValueError(f"{path} must hold {kind}, got an array of shape {arrays[part].shape}")
        _check_contents(path, arrays[part], name, part)
        images = arrays[part.replace("labels", "images")]
        if len(arrays[part]) != len(images) or images.shape[1:] != arrays["train_images"].shape[1:]:
            raise ValueError(
                f"{path} of shape {arrays[part].shape} does not go with the other files of "
                f"{name!r}: fetch them again"
            )
    n_train = len(arrays["train_images"]) - _N_VALIDATION
    if n_train < 1:
        raise ValueError(
            f"the train images of {name!r} must be more than the {_N_VALIDATION} that validate, "
            f"got {len(arrays['train_images'])}: fetch them again"
        )
    train, validation = _gray_levels(arrays["train_images"], "train images").tensor_split([n_train])
    return ImageData._binarized(
        name,
        (train, validation, _gray_levels(arrays["test_images"], "test images")),
        (*np.split(arrays["train_labels"], [n_train]), arrays["test_labels"]),
    )


class ImageBatches:
    """Minibatches of an epoch: a pure function of the seed and the epoch's number.

    So a run that is resumed at an epoch sees the batches that it would have seen.

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
