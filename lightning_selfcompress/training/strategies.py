"""Strategies of a Trainer: which of them training works with, known by the names of their classes.

So that the strategies of the packages lightning and pytorch_lightning are the same.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

_PARALLEL = "ModelParallelStrategy"


_REFUSED = {
    "FSDPStrategy": "it moves the weights of layers into flat parameters of its own, past the quantizer",
    "DeepSpeedStrategy": "it steps optimizers of its own, along which bit depths cannot be trained",
}


def check_strategy(strategy: Any) -> None:
    """Refuses a strategy that would train another network than the compressed one.

    Args:
        strategy: That of the Trainer.

    Raises:
        RuntimeError: If it is one of those; with what to use instead.
    """
    for name, reason in _REFUSED.items():
        if _is_a(strategy, name):
            raise RuntimeError(
                f"SelfCompression cannot train with {name}: {reason}. Expected a single device, DDP, or, where "
                f"parameters have to be sharded, {_PARALLEL} with fully_shard in configure_model."
            )
    if _is_a(getattr(strategy, "launcher", None), "_MultiProcessingLauncher"):
        raise RuntimeError(
            "SelfCompression cannot train with ddp_spawn, ddp_fork or ddp_notebook: their processes train copies of "
            "the module, and the one at hand would stay as it is. Expected strategy='ddp' in a script, or a single "
            "device (devices=1) in a notebook."
        )
    if _is_a(strategy, _PARALLEL) and strategy.device_mesh["tensor_parallel"].size() > 1:
        raise RuntimeError(
            f"SelfCompression cannot train with tensor parallelism: no process ever holds a whole weight. Expected "
            f"{_PARALLEL}(data_parallel_size={strategy.world_size}, tensor_parallel_size=1), with fully_shard in "
            f"configure_model."
        )


def shards_parameters(strategy: Any) -> bool:
    """Whether each process keeps a part of the parameters."""
    return _is_a(strategy, _PARALLEL)


def gradient_average(strategy: Any) -> Callable[[Tensor], Tensor] | None:
    """The mean over processes, for gradients that a strategy does not average itself; None where it does.

    Args:
        strategy: That of the Trainer.

    Returns:
        A function of a tensor of the same shape in every process. FSDP2 knows nothing of parameters that are added
        after it has sharded a layer.
    """
    return (lambda gradient: strategy.reduce(gradient, reduce_op="mean")) if shards_parameters(strategy) else None


def _is_a(thing: Any, name: str) -> bool:
    return any(c.__name__ == name for c in type(thing).__mro__)
