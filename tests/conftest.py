"""What all tests share: fixed seeds, one thread, and the same hypothesis examples at every run."""

import os
from pathlib import Path

import pytest
import torch
from compatibility import (  # noqa: F401 - hooks and a fixture
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_call,
    pytest_sessionfinish,
    refusal,
)
from hypothesis import settings

settings.register_profile("same every time", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("same every time")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mnist_folder():
    """The folder with real MNIST: SELFCOMPRESS_DATA. Skips without it; in CI that is a failure."""
    folder = os.environ.get("SELFCOMPRESS_DATA")
    if folder and Path(folder).is_dir():
        return Path(folder)
    reason = "needs MNIST's four files: set SELFCOMPRESS_DATA to their folder"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
