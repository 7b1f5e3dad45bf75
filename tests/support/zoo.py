"""Small networks of the common architectures, on which the removal of channels is tested."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from zoo_cnn import CNN
from zoo_sequence import SEQUENCE


@dataclass(frozen=True)
class Entry:
    """How to make a network and what to call it with."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    convolutional: bool


ZOO: dict[str, Entry] = {
    **{name: Entry(make, inputs, convolutional=True) for name, (make, inputs) in CNN.items()},
    **{name: Entry(make, inputs, convolutional=False) for name, (make, inputs) in SEQUENCE.items()},
}
