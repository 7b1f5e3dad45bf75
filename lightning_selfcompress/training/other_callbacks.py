"""Other callbacks of the same Trainer that cannot train the same network."""

from collections.abc import Iterable
from typing import Any

from lightning_selfcompress.tensors import is_a


def refuse(own: Any, callbacks: Iterable[Any]) -> None:
    """Names a callback that cannot train the same network, before it does.

    Args:
        own: The SelfCompression callback that asks.
        callbacks: The callbacks of its Trainer.

    Raises:
        ValueError: If one of them cannot be beside it.
    """
    for callback in callbacks:
        if is_a(callback, "SelfCompression") and callback is not own:
            raise ValueError(
                f"Expected one SelfCompression callback in the Trainer, got {type(own).__name__} and "
                f"{type(callback).__name__}: Q is the size of the whole network and has one price. Keep one of them, "
                f"and name in its skip= what is to stay in float."
            )
        if is_a(callback, "ModelPruning"):
            raise ValueError(
                f"Expected no {type(callback).__name__} beside SelfCompression: it masks `weight`, which is computed "
                f"in a compressed layer. Take it off the Trainer's callbacks, as SelfCompression removes channels "
                f"itself; or train with it first and make_pruning_permanent=True, then fit again with SelfCompression."
            )
