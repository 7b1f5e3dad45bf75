"""Images from scikit-learn and from IDX files; bad files."""

import gzip
import hashlib
import os
import struct
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_selfcompress.demo import data
from lightning_selfcompress.demo.data import DigitsData, MnistData, find_mnist, random_shift, read_idx
from lightning_selfcompress.errors import DataError


def idx(array):
    """The bytes of an IDX file."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """A folder with small files in MNIST's format, and their sums in place of MNIST's."""
    rng = np.random.default_rng(0)
    sums = {}
    for name in data.MNIST_FILES:
        shape = (40,) if "labels" in name else (40, 28, 28)
        content = idx(rng.integers(0, 10, shape))
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        sums[name] = ("", hashlib.md5(content).hexdigest())
    monkeypatch.setattr(data, "MNIST_FILES", sums)
    return tmp_path


def test_digits_are_split_without_overlap():
    """The splits have 1,132, 125 and 540 images and share none."""
    digits = DigitsData()
    digits.setup("fit")
    images = {name: {x.numpy().tobytes() for x in split.tensors[0]} for name, split in digits.splits.items()}
    assert [len(s) for s in digits.splits.values()] == [1132, 125, 540]
    assert images["train"].isdisjoint(images["test"] | images["val"])
    assert images["val"].isdisjoint(images["test"])


def test_splits_do_not_depend_on_the_seed():
    """Whatever was seeded, the same images are held out."""
    held_out = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        digits = DigitsData()
        digits.setup("fit")
        held_out.append(digits.splits["val"].tensors[0])
    assert torch.equal(*held_out)


def test_read_idx_returns_the_array(tmp_path):
    """An IDX file is read back, gzipped or not."""
    array = np.arange(24).reshape(2, 3, 4)
    md5 = hashlib.md5(idx(array)).hexdigest()
    (tmp_path / "a").write_bytes(idx(array))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array)))
    assert np.array_equal(read_idx(tmp_path / "a", md5), array)
    assert np.array_equal(read_idx(tmp_path / "a.gz", md5), array)


@pytest.mark.parametrize("place", [".", "mnist"])
def test_mnist_is_found_in_a_folder_or_below(mnist, place, monkeypatch):
    """The folder may hold the files or a folder ``mnist`` with them; the environment variable names it as well."""
    folder = mnist / place
    folder.mkdir(exist_ok=True)
    for name in data.MNIST_FILES:
        os.rename(mnist / f"{name}.gz", folder / f"{name}.gz")
    monkeypatch.setenv("SELFCOMPRESS_DATA", str(mnist))
    module = MnistData()
    module.setup("fit")
    assert module.splits["test"].tensors[0].shape == (40, 1, 28, 28)
    assert len(module.splits["train"]) == 36


def test_missing_folder_is_named(tmp_path):
    """A folder that is not there is named with the option and the variable that may have named it."""
    with pytest.raises(DataError, match=r"data folder at .*nowhere, found none.*--data-dir or SELFCOMPRESS_DATA"):
        MnistData(tmp_path / "nowhere").setup("fit")


def test_missing_files_are_all_named(mnist):
    """Every missing file is named at once."""
    (mnist / "train-labels-idx1-ubyte.gz").unlink()
    (mnist / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"missing: train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz"):
        find_mnist(mnist)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda b: b[: len(b) // 2], "cannot be unpacked"),
        (lambda b: b"not gzip at all", "cannot be unpacked"),
        (lambda b: b[:40] + bytes([b[40] ^ 255]) + b[41:], "cannot be unpacked|is damaged"),
        (lambda b: gzip.compress(gzip.decompress(b)[:-1] + b"x"), "is damaged: expected content with md5"),
    ],
)
def test_damaged_file_is_named(mnist, damage, said):
    """A file that is cut short, no gzip file or changed is named, with what to do."""
    path = mnist / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte.gz (.|\n)*({said})(.|\n)*Delete it and get it anew"):
        MnistData(mnist).setup("fit")


def test_unreachable_mirrors_are_named(tmp_path, monkeypatch):
    """Without a network the error names every mirror tried and the way to do without, and leaves no file."""
    monkeypatch.setattr(data, "MNIST_MIRRORS", ("file:///nowhere/one/", "http://127.0.0.1:9/two/"))
    with pytest.raises(DataError, match=r"nowhere/one(.|\n)*127.0.0.1:9/two(.|\n)*--data-dir"):
        data.download_mnist(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_random_shift_moves_each_image_as_a_whole():
    """Every shifted image is its original moved by at most the given pixels, borders repeated."""
    images = torch.rand(20, 2, 6, 5)
    shifted = random_shift(images, 1)
    padded = torch.nn.functional.pad(images, [1] * 4, mode="replicate")
    for i in range(20):
        crops = [padded[i, :, r : r + 6, c : c + 5] for r in range(3) for c in range(3)]
        assert any(torch.equal(shifted[i], crop) for crop in crops)
    assert not torch.equal(shifted, images)


def test_only_training_images_are_shifted():
    """Outside of training a batch is passed on as it is."""
    module = DigitsData()
    module.setup("fit")
    module.trainer = pl.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False)
    batch = next(iter(module.val_dataloader()))
    assert torch.equal(module.on_after_batch_transfer(batch, 0)[0], batch[0])
    module.trainer.training = True
    assert not torch.equal(module.on_after_batch_transfer(batch, 0)[0], batch[0])


def test_real_mnist_has_its_sums(mnist_folder):
    """The real files pass the checks and have their sizes."""
    module = MnistData(Path(mnist_folder))
    module.setup("fit")
    assert [len(s) for s in module.splits.values()] == [54000, 6000, 10000]
