"""Strategies of a Trainer: which of them training works with, and what depths need under each.

Strategies are known by the names of their classes, so that those of the packages ``lightning`` and
``pytorch_lightning`` are the same.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_selfcompress.activations.layers import activated_modules, exponents_of
from lightning_selfcompress.quantize.parameters import learned_tensors
from lightning_selfcompress.tensors import is_a, name_of
from lightning_selfcompress.training.lightning_private import MULTIPROCESSING_LAUNCHER

_PARALLEL = "ModelParallelStrategy"
_REFUSED = {
    "FSDPStrategy": "it moves the weights of layers into flat parameters of its own, past the quantizer",
    "DeepSpeedStrategy": "it steps optimizers of its own, along which bit depths cannot be trained",
}
_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"  # the attribute of a module that DDP reads


def check_strategy(strategy: Any) -> None:
    """Refuses a strategy that would train another network than the compressed one.

    Args:
        strategy: The strategy of the Trainer.

    Raises:
        RuntimeError: If training does not work with it; the message says what to use instead.
    """
    for name, reason in _REFUSED.items():
        if is_a(strategy, name):
            raise RuntimeError(
                f"SelfCompression cannot train with {name}: {reason}. Expected a single device, DDP, or, where "
                f"parameters have to be sharded, {_PARALLEL} with fully_shard in configure_model."
            )
    if is_a(getattr(strategy, "launcher", None), MULTIPROCESSING_LAUNCHER):
        raise RuntimeError(
            "SelfCompression cannot train with ddp_spawn, ddp_fork or ddp_notebook: their processes train copies of "
            "the module, and the one at hand would stay as it is. Expected strategy='ddp' in a script, or a single "
            "device (devices=1) in a notebook."
        )
    if is_a(strategy, _PARALLEL) and strategy.device_mesh["tensor_parallel"].size() > 1:
        raise RuntimeError(
            f"SelfCompression cannot train with tensor parallelism: no process ever holds a whole weight. Expected "
            f"{_PARALLEL}(data_parallel_size={strategy.world_size}, tensor_parallel_size=1), with fully_shard in "
            f"configure_model."
        )


def shards_parameters(strategy: Any) -> bool:
    """Whether each process keeps a part of the parameters."""
    return is_a(strategy, _PARALLEL)


def replicates(strategy: Any) -> bool:
    """Whether each of several processes keeps all parameters, in a wrapper that averages their gradients (DDP)."""
    return callable(getattr(strategy, "configure_ddp", None))


def gradient_average(strategy: Any) -> Callable[[Tensor], Tensor] | None:
    """The mean over processes, for gradients of depths: no strategy averages gradients of buffers.

    Args:
        strategy: The strategy of the Trainer.

    Returns:
        A function of a tensor of the same shape in every process; None where there is one process.
    """
    if shards_parameters(strategy) or replicates(strategy):
        return lambda gradient: strategy.reduce(gradient, reduce_op="mean")
    return None


def keep_depths_from_ddp(strategy: Any, module: nn.Module) -> None:
    """Has DDP leave depths and exponents alone: it would write them anew at every forward, as it does with buffers.

    Args:
        strategy: The strategy of the Trainer; nothing is done for one that does not replicate.
        module: The converted module. A wrapper around it reads only once what to leave alone, so it is told as well.
    """
    if replicates(strategy):
        ignored = list(dict.fromkeys([*getattr(module, _IGNORED_BY_DDP, ()), *_learned_paths(module)]))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
        if isinstance(strategy.model, DistributedDataParallel):
            strategy.model.parameters_to_ignore.update(ignored)


def give_depths_back(module: nn.Module) -> None:
    """Undoes :func:`keep_depths_from_ddp`."""
    ours, earlier = set(_learned_paths(module)), module.__dict__.pop(_IGNORED_BY_DDP, None)
    others = [name for name in earlier or () if name not in ours]
    if others:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, others)


@torch.no_grad()
def agree_on_depths(strategy: Any, module: nn.Module) -> None:
    """Has all processes start with the depths and exponents of the first one, as DDP has it with weights."""
    if replicates(strategy):
        tensors = list(_learned(module).values())
        for tensor, values in zip(tensors, strategy.broadcast([t.detach().cpu() for t in tensors]), strict=True):
            tensor.copy_(values)


@contextmanager
def unwrapped(strategy: Any, module: nn.Module) -> Iterator[None]:
    """Within this context there is no DDP wrapper, which knows shapes; after it there is a new one."""
    if not replicates(strategy):
        yield
        return
    strategy.model = module
    gc.collect()  # the wrapper is part of a cycle; it holds the nodes that accumulate gradients of the old shapes
    yield
    strategy.configure_ddp()


def _learned(module: nn.Module) -> dict[int, Tensor]:
    """Returns all buffers that are learned, by their ids: depths and exponents of weights, exponents of activations."""
    exponents = (exponents_of(part) for _, part in activated_modules(module))
    return learned_tensors(module) | {id(e): e for e in exponents}


def _learned_paths(module: nn.Module) -> Iterable[str]:
    """Names of all depths and exponents; of tied ones every name, since DDP may ask for any."""
    learned = _learned(module)
    named = module.named_modules(remove_duplicate=False)
    return [name_of(path, name) for path, m in named for name, t in m._buffers.items() if id(t) in learned]
