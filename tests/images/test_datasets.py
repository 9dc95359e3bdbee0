import gzip
from dataclasses import replace

import numpy as np
import pytest
import torch

from idx_files import idx, write_idx_files
from mixscvi.images import datasets
from mixscvi.images.datasets import ImageBatches, ImageData, binarize, load, read_idx


@pytest.fixture
def array() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 4, 3)).astype(np.uint8)


def test_reads_plain_and_gzipped(tmp_path, array):
    (tmp_path / "a").write_bytes(idx(array))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array)))
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), array)
    np.testing.assert_array_equal(read_idx(tmp_path / "a.gz"), array)


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_truncated_file_is_named_and_how_to_get_it(tmp_path, array, name):
    raw = idx(array) if name == "images" else gzip.compress(idx(array))
    (tmp_path / name).write_bytes(raw[:-20])
    with pytest.raises(ValueError, match=rf"{name} is a? ?truncated or damaged.*fetch it again"):
        read_idx(tmp_path / name)


@pytest.mark.parametrize("raw", [b"", b"<html>", b"\0\0\x08\x03\0\0"])
def test_no_idx_file(tmp_path, raw):
    (tmp_path / "page").write_bytes(raw)
    with pytest.raises(ValueError, match="page is"):
        read_idx(tmp_path / "page")


def test_missing_file_is_named_and_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte.*Fetch https://"):
        load("fashion-mnist", tmp_path)


def test_failed_fetch_names_the_file_and_the_way_around(monkeypatch):
    import pooch

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(pooch, "retrieve", fail)
    with pytest.raises(OSError, match="train-images.*--data-folder"):
        load("mnist")


def test_fetched_files_are_checked_by_hash(monkeypatch, tmp_path, array):
    import pooch

    asked = []

    def retrieve(url, known_hash, **kwargs):
        asked.append((url, known_hash))
        path = tmp_path / "file.gz"
        path.write_bytes(gzip.compress(idx(array if "images" in url else array[:, 0, 0])))
        return str(path)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(
        ValueError, match="train images of 'mnist' must be more than the 10000.*got 6"
    ):
        load("mnist")
    assert len(asked) == 4
    assert all(
        url.endswith(".gz") and known.startswith("md5:") and len(known) == 36
        for url, known in asked
    )


def test_files_of_the_other_data_set_are_refused(monkeypatch, tmp_path):
    """Both data sets have files of the same names."""
    array = np.arange(20_000 * 2).reshape(20_000, 2, 1).astype(np.uint8)
    labels = array[:, 0, 0].copy()
    kinds = {"images": array, "labels": labels}
    write_idx_files(
        tmp_path, {file: kinds[part.split("_")[1]] for part, file in datasets._FILES.items()}
    )
    assert load("mnist", tmp_path).name == "mnist"
    digest = datasets.content_hash(labels)
    monkeypatch.setattr(datasets, "_CONTENTS", {digest: ("mnist", "test_labels")})
    with pytest.raises(ValueError, match="train-labels.*holds the test labels.*names back"):
        load("mnist", tmp_path)
    known = {digest: ("fashion-mnist", "test_labels")}
    monkeypatch.setattr(datasets, "_CONTENTS", known)
    match = (
        "train-labels.*holds the test labels of 'fashion-mnist', not the train labels of 'mnist'"
    )
    with pytest.raises(ValueError, match=match):
        load("mnist", tmp_path)


def test_images_of_each_file_go_where_they_belong(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 4, 3)) for n in (10_030, 7))
    labels, test_labels = np.arange(10_030) % 7, np.arange(7)
    arrays = dict(zip(datasets._FILES.values(), (train, labels, test, test_labels), strict=True))
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
    for part, file in datasets._FILES.items():
        array = read_idx(datasets._find(name, file, data_folder / "images"))
        assert datasets._CONTENTS[datasets.content_hash(array)] == (name, part)
    (other,) = set(datasets.DATASETS) - {name}
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
        (np.full((30, 3, 3), np.nan), r"\[0, 1\]"),
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
        lambda path: np.save(path, np.float32(1)),
        lambda path: np.save(path, np.zeros((5, 4))),
    ],
    ids=["empty", "no array", "truncated", "a number", "two axes"],
)
def test_array_files_that_hold_no_images_are_named(tmp_path, write):
    write(tmp_path / "mine.npy")
    with pytest.raises(ValueError, match=r"mine\.npy holds no \(n, height, width\) images"):
        load(str(tmp_path / "mine.npy"))


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("train-labels-idx1-ubyte", np.zeros(29), r"shape \(29,\) does not go with the other"),
        ("t10k-images-idx3-ubyte", np.zeros((9, 4, 5)), r"\(9, 4, 5\) does not go with the other"),
        ("t10k-images-idx3-ubyte", np.zeros(9), "must hold images, got"),
    ],
)
def test_files_that_do_not_go_together_are_named(tmp_path, file, content, match):
    files = {
        "train-images-idx3-ubyte": np.zeros((30, 4, 4)),
        "train-labels-idx1-ubyte": np.zeros(30),
        "t10k-images-idx3-ubyte": np.zeros((9, 4, 4)),
        "t10k-labels-idx1-ubyte": np.zeros(9),
    }
    write_idx_files(tmp_path, files | {file: content})
    with pytest.raises(ValueError, match=f"{file} .*{match}"):
        load("mnist", tmp_path)


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
