"""Files of images, checked and read: idx files of MNIST and FashionMNIST, and .npy files."""

from __future__ import annotations

import gzip
import hashlib
import math
import tokenize
import zlib
from pathlib import Path

import numpy as np

__all__ = ["DATASETS", "content_hash", "read_files", "read_idx", "read_npy"]

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
# Contents of the files, by a hash of the bytes after the header: both data sets use the same names.
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
_MOST_AXES = 3  # of images, their height and their width


def read_idx(path: str | Path) -> np.ndarray:
    """Read one idx file of unsigned bytes, plain or gzipped.

    Parameters
    ----------
    path
        The file; decompressed if its name ends in ``.gz``.

    Returns
    -------
    Unsigned bytes in the shape that the file's header gives, `(n, height, width)` for images and
    `(n,)` for labels.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not an idx file of bytes, is truncated or is too long.

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
    if raw[:3] != b"\0\0\x08" or raw[3] > _MOST_AXES or len(raw) < start:
        raise ValueError(f"{path} is not an idx file of images or labels in bytes: {again}")
    shape = tuple(int(n) for n in np.frombuffer(raw[4:start], ">u4"))
    if len(raw) - start != math.prod(shape):
        raise ValueError(
            f"{path} is truncated or damaged: its header promises {math.prod(shape)} bytes, "
            f"it has {len(raw) - start}: {again}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def read_npy(path: str | Path) -> np.ndarray:
    """Read the array of a ``.npy`` file, of which nothing is made before its header is checked.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    The array.

    Raises
    ------
    ValueError
        If it is no such file, holds Python objects, or has fewer bytes than its header promises.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "mine.npy")
    ...     np.save(path, np.arange(3))
    ...     read_npy(path)
    array([0, 1, 2])
    """
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with Path(path).open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in headers:  # later ones are for names of fields, which images have none of
            raise ValueError(f"it is of version {version} of the format")
        try:
            shape, _, dtype = headers[version](file)
        except (SyntaxError, tokenize.TokenError) as error:  # before Python 3.12 no syntax error
            raise ValueError(f"its header cannot be read: {error}") from error
        if min(shape, default=0) < 0:
            raise ValueError(f"its header gives the shape {shape}")
        if dtype.hasobject:
            raise ValueError("it holds Python objects, which are not read: save numbers")
        promised = math.prod(shape) * dtype.itemsize
        held = Path(path).stat().st_size - file.tell()
        if promised > held:
            raise ValueError(
                f"its header promises {promised} bytes of an array of shape {shape}, it has {held}"
            )
    return np.load(path)  # which refuses objects


def content_hash(*arrays: np.ndarray) -> str:
    """Hash of the numbers in arrays."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(array.data)
    return digest.hexdigest()


def _check_contents(path: Path, array: np.ndarray, name: str, part: str) -> None:
    """Raise if a file is known to hold something other than its name says."""
    other, holds = _CONTENTS.get(content_hash(array), (name, part))
    if (other, holds) != (name, part):
        remedy = (
            "restore the names of the files"
            if other == name
            else f"put the files of each data set into its own folder, {name} and {other}"
        )
        raise ValueError(
            f"{path} holds the {holds.replace('_', ' ')} of {other!r}, not the "
            f"{part.replace('_', ' ')} of {name!r}: {remedy}"
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


def read_files(name: str, folder: str | Path | None = None) -> dict[str, np.ndarray]:
    """Read the four files of a data set.

    Parameters
    ----------
    name
        ``"mnist"`` or ``"fashion-mnist"``.
    folder
        As in :func:`~mixscvi.images.datasets.load`.

    Returns
    -------
    Unsigned bytes: ``train_images`` and ``test_images``, `(n, height, width)`, and their labels
    ``train_labels`` and ``test_labels``, `(n,)`.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        As :func:`~mixscvi.images.datasets.load`.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {[*DATASETS]} or a .npy file, got {name!r}")
    url, checksums = DATASETS[name]
    arrays: dict[str, np.ndarray] = {}
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
                f"{path} of shape {arrays[part].shape} does not match the other files of "
                f"{name!r}: fetch them again"
            )
    return arrays
