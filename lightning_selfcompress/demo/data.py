"""Real images for the demo: scikit-learn's digits, and MNIST from a folder or its mirrors, without torchvision."""

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


# Name of a file -> (md5 of the gzipped file on the mirrors, md5 of the uncompressed content).
MNIST_FILES = {
    "train-images-idx3-ubyte": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
}


def read_idx(path: Path, md5: str) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, gzipped or not, and checks its md5 sum.

    Args:
        path: The file, which is gzipped if its name ends in ``.gz``.
        md5: The expected md5 sum of the uncompressed content.

    Returns:
        A uint8 array with the shape that the file states.

    Raises:
        DataError: If the file is missing, cannot be unpacked or has another md5 sum.
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
    """Finds the four files of MNIST in a folder or its subfolder ``mnist``, gzipped or not.

    Args:
        folder: The folder.

    Returns:
        Name of each file without ``.gz`` -> its path.

    Raises:
        DataError: If the folder or a file is missing; the message names all missing files.
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
    """Downloads the missing files of MNIST and checks their md5 sums; a broken download leaves no file behind.

    Args:
        folder: The folder for the files.

    Returns:
        Name of each file without ``.gz`` -> its path.

    Raises:
        DataError: If no mirror delivers a file with the right md5 sum.
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
    """A data module that holds images in memory, splits them into three sets and shifts training images at random.

    Args:
        batch_size: Images per training batch.
        shift: Largest random shift of a training image, in pixels.
    """

    def __init__(self, batch_size: int, shift: int) -> None:
        super().__init__()
        self.batch_size, self.shift = batch_size, shift
        self.splits: Mapping[str, TensorDataset] = {}

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns float32 images ``(n, 1, height, width)`` and int64 labels ``(n,)``, for training and for the test."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Loads the images once; the same tenth of the training images always becomes the validation split."""
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
        """Shifts each training image by a random number of pixels."""
        images, labels = batch
        training = self.trainer is not None and self.trainer.training
        return (random_shift(images, self.shift), labels) if training and self.shift else (images, labels)

    def train_dataloader(self) -> "DataLoader[tuple[Tensor, ...]]":
        """Returns the shuffled training images, without the last incomplete batch."""
        sampler = RandomSampler(self.splits["train"])
        return self._loader("train", BatchSampler(sampler, self.batch_size, drop_last=True))

    def val_dataloader(self) -> "DataLoader[tuple[Tensor, ...]]":
        """Returns the images of the validation split."""
        return self._loader("val", BatchSampler(SequentialSampler(self.splits["val"]), 1000, drop_last=False))

    def test_dataloader(self) -> "DataLoader[tuple[Tensor, ...]]":
        """Returns the images of the test set."""
        return self._loader("test", BatchSampler(SequentialSampler(self.splits["test"]), 1000, drop_last=False))

    def _loader(self, split: str, batches: BatchSampler) -> "DataLoader[tuple[Tensor, ...]]":
        return DataLoader(self.splits[split], sampler=batches, batch_size=None)


class DigitsData(ImageData):
    """The digits of scikit-learn: 1,797 images of 8x8 pixels, of which 30% are the test set.

    Args:
        batch_size: Images per training batch.
        shift: Largest random shift of a training image, in pixels.
    """

    def __init__(self, batch_size: int = 32, shift: int = 1) -> None:
        super().__init__(batch_size, shift)

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loads images with pixels from 0 to 1, and their labels."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        train, test = train_test_split(np.arange(len(labels)), test_size=0.3, random_state=0, stratify=labels)
        return images[train], labels[train], images[test], labels[test]


class MnistData(ImageData):
    """MNIST: 60,000 training images and 10,000 test images of 28x28 pixels.

    Args:
        data_dir: Folder with the four files of MNIST. None takes the folder in the environment variable
            ``SELFCOMPRESS_DATA``; if the variable is not set, the files are downloaded into the user's cache.
        batch_size: Images per training batch.
        shift: Largest random shift of a training image, in pixels.
    """

    def __init__(self, data_dir: Path | None = None, batch_size: int = 64, shift: int = 2) -> None:
        super().__init__(batch_size, shift)
        folder = data_dir or os.environ.get(DATA_VARIABLE)
        self.data_dir = Path(folder) if folder else None

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loads images, standardized with the training set's mean and standard deviation, and their labels."""
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
    """Shifts each image by up to ``pixels`` along both axes; new pixels repeat the border.

    Args:
        images: The images.
        pixels: The largest shift, in pixels.

    Returns:
        The shifted images, of the same shape.
    """
    n, _, height, width = images.shape
    padded = nn.functional.pad(images, [pixels] * 4, mode="replicate")
    offsets = torch.randint(2 * pixels + 1, (2, n, 1), device=images.device)
    rows = torch.arange(height, device=images.device) + offsets[0]
    columns = torch.arange(width, device=images.device) + offsets[1]
    index = torch.arange(n, device=images.device)[:, None, None]
    return padded.movedim(1, -1)[index, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
