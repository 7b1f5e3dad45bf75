"""Real images for the demo: scikit-learn's digits, and MNIST from a folder or its mirrors. No torchvision."""

import gzip
import hashlib
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from lightning_selfcompress.errors import DataError

DATA_VARIABLE = "SELFCOMPRESS_DATA"


MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


# name -> (md5 of the file as the mirrors have it, gzipped; md5 of its content)
MNIST_FILES = {
    "train-images-idx3-ubyte": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
}


def read_idx(path: Path, md5: str) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, gzipped or not, after checking its content.

    Args:
        path: The file; gzipped if its name ends in ``.gz``.
        md5: Expected md5 sum of the content, uncompressed.

    Returns:
        uint8 array with the shape the file says.

    Raises:
        DataError: If the file is missing, cannot be unpacked or has another sum.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"Expected a file {path}, found none. Put it there, or name another folder.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked ({error}). Delete it and get it anew.") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataError(f"{path} is damaged: expected content with md5 {md5}, got {found}. Delete it and get it anew.")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4).astype(int)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def find_mnist(folder: Path) -> dict[str, Path]:
    """The four files of MNIST in a folder or its subfolder ``mnist``, gzipped or not.

    Args:
        folder: Where to look.

    Returns:
        Path of each file, by its name without ``.gz``.

    Raises:
        DataError: If the folder or a file is missing; names all that are.
    """
    if not folder.is_dir():
        raise DataError(f"Expected a data folder at {folder}, found none. Check --data-dir or {DATA_VARIABLE}.")
    places = [folder, folder / "mnist"]
    found = {
        name: path
        for name in MNIST_FILES
        for place in reversed(places)
        for path in (place / name, place / f"{name}.gz")
        if path.is_file()
    }
    missing = [f"{name}.gz" for name in MNIST_FILES if name not in found]
    if missing:
        raise DataError(
            f"Expected MNIST in {folder} or {folder / 'mnist'}, missing: {', '.join(missing)}. Put the files there, or "
            f"leave out the folder to have them downloaded."
        )
    return found


def download_mnist(folder: Path) -> dict[str, Path]:
    """Downloads what is missing of MNIST, with checksums; a broken download leaves no file behind.

    Args:
        folder: Where the files go.

    Returns:
        Path of each file, by its name without ``.gz``.

    Raises:
        DataError: If no mirror can be reached.
    """
    import pooch

    found = {}
    for name, (md5, _) in MNIST_FILES.items():
        failures = []
        for mirror in MNIST_MIRRORS:
            try:
                url = f"{mirror}{name}.gz"
                found[name] = Path(pooch.retrieve(url, f"md5:{md5}", fname=f"{name}.gz", path=folder))
                break
            except (OSError, ValueError) as error:
                failures.append(f"{url}: {error}")
        else:
            raise DataError(
                f"{name}.gz could not be downloaded ({'; '.join(failures)}). Get MNIST's four files by other means and "
                f"name their folder with --data-dir or {DATA_VARIABLE}."
            )
    return found


class ImageData(pl.LightningDataModule):
    """Images in memory, split into training, validation and test; random shifts while training.

    Args:
        batch_size: Images a batch.
        shift: Largest random shift of a training image, in pixels.
    """

    def __init__(self, batch_size: int, shift: int) -> None:
        super().__init__()
        self.batch_size, self.shift = batch_size, shift
        self.splits: Mapping[str, TensorDataset] = {}

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images ``(n, 1, height, width)`` float32 and labels ``(n,)`` int64, for training and for the test."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Loads once; a tenth of the training images, always the same, becomes the validation split."""
        if self.splits:
            return
        images, labels, test_images, test_labels = self.load()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        held_out, rest = order[: len(images) // 10], order[len(images) // 10 :]
        self.splits = {
            "train": TensorDataset(images[rest], labels[rest]),
            "val": TensorDataset(images[held_out], labels[held_out]),
            "test": TensorDataset(test_images, test_labels),
        }

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Shifts training images, each by a random number of pixels."""
        images, labels = batch
        training = self.trainer is not None and self.trainer.training
        return (random_shift(images, self.shift), labels) if training and self.shift else (images, labels)

    def train_dataloader(self) -> "DataLoader[tuple[Tensor, ...]]":
        """Shuffled, without the last incomplete batch."""
        sampler = RandomSampler(self.splits["train"])
        return self._loader("train", BatchSampler(sampler, self.batch_size, drop_last=True))

    def val_dataloader(self) -> "DataLoader[tuple[Tensor, ...]]":
        """The images held out of training."""
        return self._loader("val", BatchSampler(SequentialSampler(self.splits["val"]), 1000, drop_last=False))

    def test_dataloader(self) -> "DataLoader[tuple[Tensor, ...]]":
        """The test set."""
        return self._loader("test", BatchSampler(SequentialSampler(self.splits["test"]), 1000, drop_last=False))

    def _loader(self, split: str, batches: BatchSampler) -> "DataLoader[tuple[Tensor, ...]]":
        return DataLoader(self.splits[split], sampler=batches, batch_size=None)


class DigitsData(ImageData):
    """scikit-learn's digits: 1,797 images of 8x8, 30% of them the test set.

    Args:
        batch_size: Images a batch.
        shift: Largest random shift of a training image, in pixels.
    """

    def __init__(self, batch_size: int = 32, shift: int = 1) -> None:
        super().__init__(batch_size, shift)

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images with pixels from 0 to 1."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        train, test = train_test_split(np.arange(len(labels)), test_size=0.3, random_state=0, stratify=labels)
        return images[train], labels[train], images[test], labels[test]


class MnistData(ImageData):
    """MNIST: 60,000 + 10,000 images of 28x28.

    Args:
        data_dir: Folder with its four files; without it the environment variable ``SELFCOMPRESS_DATA``, and without
            that a download into the user's cache.
        batch_size: Images a batch.
        shift: Largest random shift of a training image, in pixels.
    """

    def __init__(self, data_dir: Path | None = None, batch_size: int = 64, shift: int = 2) -> None:
        super().__init__(batch_size, shift)
        folder = data_dir or os.environ.get(DATA_VARIABLE)
        self.data_dir = Path(folder) if folder else None

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images standardized with the training set's mean and deviation."""
        if self.data_dir is not None:
            paths = find_mnist(self.data_dir)
        else:
            import pooch

            paths = download_mnist(Path(pooch.os_cache("lightning_selfcompress")) / "mnist")
        arrays = {name: read_idx(paths[name], md5) for name, (_, md5) in MNIST_FILES.items()}
        images, test_images = (
            torch.tensor(arrays[name]).float().div(255).sub(0.1307).div(0.3081).unsqueeze(1)
            for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
        )
        labels, test_labels = (
            torch.tensor(arrays[name]).long() for name in ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")
        )
        return images, labels, test_images, test_labels


def random_shift(
    images: Tensor,  # (n, channels, height, width)
    pixels: int,
) -> Tensor:
    """Shifts each image by up to ``pixels`` in both directions; what comes in repeats the border.

    Args:
        images: Images.
        pixels: Largest shift.

    Returns:
        Shifted images, the same shape.
    """
    n, _, height, width = images.shape
    padded = nn.functional.pad(images, [pixels] * 4, mode="replicate")
    offsets = torch.randint(2 * pixels + 1, (2, n, 1), device=images.device)
    rows = torch.arange(height, device=images.device) + offsets[0]
    columns = torch.arange(width, device=images.device) + offsets[1]
    index = torch.arange(n, device=images.device)[:, None, None]
    return padded.movedim(1, -1)[index, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
