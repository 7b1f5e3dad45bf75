"""What all tests share: fixed seeds, one thread, and the same hypothesis examples at every run."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("same every time", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("same every time")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)
