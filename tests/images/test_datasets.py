import re
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from idx_files import write_idx_files
from mixscvi.images import files
from mixscvi.images.datasets import ImageBatches, ImageData, binarize, load
from mixscvi.images.files import read_idx


class Payload:
    """Notes that it was unpickled."""

    ran: ClassVar[list] = []

    def __reduce__(self):
        return self.ran.append, (1,)


def test_images_of_each_file_go_where_they_belong(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 4, 3)) for n in (10_030, 7))
    labels, test_labels = np.arange(10_030) % 7, np.arange(7)
    arrays = dict(zip(files._FILES.values(), (train, labels, test, test_labels), strict=True))
    write_idx_files(tmp_path, arrays)
    # Arrays of all images would be held twice.
    monkeypatch.delattr(np, "concatenate")
    data = load("mnist", tmp_path)
    monkeypatch.undo()
    joined = ImageData.from_arrays(
        np.concatenate((train, test)).astype(np.uint8),
        np.concatenate((labels, test_labels)),
        n_validation=10_000,
        n_test=7,
    )
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(data, part), getattr(joined, part))
        np.testing.assert_array_equal(data.labels[part], joined.labels[part])


def test_unknown_dataset():
    with pytest.raises(ValueError, match="'mnits'"):
        load("mnits")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_real_files(data_folder, name):
    data = load(name, data_folder / "images")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [
        50_000,
        10_000,
        10_000,
    ]
    assert data.image_shape == (28, 28)
    assert set(data.test.unique().tolist()) == {0.0, 1.0}
    assert data.train.unique().numel() > 200
    assert [len(labels) for labels in data.labels.values()] == [50_000, 10_000, 10_000]
    again = load(name, data_folder / "images" / name)
    assert torch.equal(data.test, again.test)
    for part, file in files._FILES.items():
        array = read_idx(files._find(name, file, data_folder / "images"))
        assert files._CONTENTS[files.content_hash(array)] == (name, part)
    (other,) = set(files.DATASETS) - {name}
    with pytest.raises(ValueError, match=f"holds the train images of '{name}'"):
        load(other, data_folder / "images" / name)


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("test", 0.5, "test must be zeros and ones.*image 3"),
        ("validation", torch.nan, "validation must be zeros and ones.*image 3"),
        ("train", 255.0, r"train must be gray levels in \[0, 1\]; image 3"),
    ],
)
def test_parts_that_no_likelihood_is_for(part, value, match):
    data = ImageData.from_arrays(np.zeros((60, 5, 7)), n_validation=10, n_test=15)
    images = getattr(data, part).clone()
    images[3:5, 0, 2, 2] = value
    with pytest.raises(ValueError, match=match):
        replace(data, **{part: images})


def test_arrays_of_the_users_own(tmp_path):
    images = np.random.default_rng(0).random((60, 5, 7))
    labels = np.arange(60)
    data = ImageData.from_arrays(images, labels, n_validation=10, n_test=15)
    assert data.image_shape == (5, 7)
    np.testing.assert_allclose(data.train[:, 0], images[:35], rtol=1e-6)
    assert data.labels["test"].tolist() == list(range(45, 60))
    small = data.subset(3, None, 2)
    assert len(small.train) == 3 and len(small.validation) == 10
    assert small.labels["test"].tolist() == [45, 46]

    np.save(tmp_path / "mine.npy", images)
    loaded = load(str(tmp_path / "mine.npy"))
    assert (len(loaded.train), len(loaded.test), loaded.name) == (40, 10, "mine")


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (np.zeros((5, 3)), "shape"),
        (np.zeros((5, 3, 3, 3)), "shape"),
        (np.full((30, 3, 3), 2.0), r"\[0, 1\]"),
        (np.full((30, 3, 3), np.nan), r"\[0, 1\].*image 0 is the first"),
        (np.zeros((30, 3, 3), complex), "must be numbers, got an array of complex128"),
        (np.zeros((30, 3, 3), "M8[s]"), "must be numbers, got an array of datetime64"),
        (np.zeros((30, 3, 3), [("level", "f4")]), "must be numbers, got an array of"),
        (np.zeros((5, 3, 3)), "5 images"),
    ],
)
def test_arrays_that_are_no_images(images, match):
    with pytest.raises(ValueError, match=match):
        ImageData.from_arrays(images, n_validation=3, n_test=3)


def test_bytes_of_zero_and_one_are_not_taken_for_gray_levels():
    binary = np.eye(4, dtype=np.uint8)[None].repeat(9, 0)
    with pytest.raises(ValueError, match="unsigned bytes of 0 and 1"):
        ImageData.from_arrays(binary, n_validation=2, n_test=2)
    data = ImageData.from_arrays(binary.astype(bool), n_validation=2, n_test=2)
    assert torch.equal(data.test[0, 0], torch.eye(4))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"<html>"),
        lambda path: np.save(path, np.zeros((5, 4, 4))) or path.write_bytes(path.read_bytes()[:-9]),
        lambda path: (
            np.save(path, np.zeros((70, 4, 4)))
            or path.write_bytes(path.read_bytes().replace(b"(70, 4, 4)", b"(70, 4, 4 "))
        ),
        lambda path: np.save(path, np.float32(1)),
        lambda path: np.save(path, np.zeros((5, 4))),
        lambda path: np.save(path, np.full((70, 4, 4), Payload(), dtype=object)),
    ],
    ids=["empty", "no array", "truncated", "a bracket less", "a number", "two axes", "objects"],
)
def test_array_files_that_hold_no_images_are_named(tmp_path, write):
    write(tmp_path / "mine.npy")
    with pytest.raises(ValueError, match=r"mine\.npy holds no \(n, height, width\) images"):
        load(str(tmp_path / "mine.npy"))
    assert not Payload.ran


def test_binarization_has_the_gray_level_as_its_mean():
    gray = torch.linspace(0, 1, 11, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    mean = binarize(gray.expand(20_000, 11), generator).mean(0)
    torch.testing.assert_close(mean, gray, atol=0.015, rtol=0)


def test_batches_are_a_function_of_seed_and_epoch():
    images = torch.rand(25, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def epoch(seed: int, number: int) -> torch.Tensor:
        batches = ImageBatches(images, 10, seed)
        batches.epoch = number
        assert len(batches) == 3
        return torch.cat(list(batches))

    assert torch.equal(epoch(0, 1), epoch(0, 1))
    assert not torch.equal(epoch(0, 1), epoch(0, 2))
    assert not torch.equal(epoch(0, 1), epoch(1, 1))
    assert torch.equal(torch.cat(list(ImageBatches(images, 10))), images)


@pytest.mark.parametrize(
    "shape", [(10**5, 10**4, 10**3), (2**32, 2**32, 1), (60, 5, 8), (-60, 5, 7)]
)
def test_a_header_of_another_shape_is_refused_before_anything_is_made(shape, tmp_path, monkeypatch):
    path = tmp_path / "mine.npy"
    with path.open("wb") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(60 * 5 * 7 * 8))
    monkeypatch.setattr(np, "load", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=rf"mine\.npy holds no .* shape {re.escape(str(shape))}"):
        load(str(path))
