"""Other callbacks of the same Trainer: the copies they keep of the network, and those that cannot be beside ours."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel


def averages(callbacks: Iterable[Any]) -> Iterator[nn.Module]:
    """The copies that weight averaging keeps of a module: they are converted, and shrink, along.

    Args:
        callbacks: Those of a Trainer.

    Yields:
        The copy itself, without torch's wrapper.
    """
    for callback in callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            yield average.module if isinstance(average, AveragedModel) else average


def refuse(own: Any, callbacks: Iterable[Any]) -> None:
    """Names a callback that cannot train the same network, before it does.

    Classes are known by their names: there are two packages to take them from.

    Args:
        own: The SelfCompression callback that asks.
        callbacks: Those of its Trainer.

    Raises:
        ValueError: If there is one.
    """
    for callback in callbacks:
        names = {c.__name__ for c in type(callback).__mro__}
        if "SelfCompression" in names and callback is not own:
            raise ValueError(
                f"Expected one SelfCompression callback in the Trainer, got {type(own).__name__} and "
                f"{type(callback).__name__}: Q is the size of the whole network and has one price. Keep one of them, "
                f"and name in its skip= what is to stay in float."
            )
        if "ModelPruning" in names:
            raise ValueError(
                f"Expected no {type(callback).__name__} beside SelfCompression: it masks `weight`, which is computed "
                f"in a compressed layer. Take it off the Trainer's callbacks, as SelfCompression removes channels "
                f"itself; or train with it first and make_pruning_permanent=True, then fit again with SelfCompression."
            )
