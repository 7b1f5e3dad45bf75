"""What a module meets in a dry run instead of its Trainer: numbers to read, and nothing that acts."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.device, torch.dtype)


class Nothing:
    """Stands for loggers and schedulers in a dry run: takes every call, does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Does nothing."""
        return self

    def __iter__(self) -> Any:
        return iter(())

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        """Nothing to leave."""


class StandInOptimizer(Nothing):
    """Stands for an optimizer: its groups can be read and written, its steps are none.

    Args:
        optimizer: The optimizer.
        copies: Id of each parameter of the module in training -> the parameter of the copy.
    """

    def __init__(self, optimizer: Optimizer, copies: Mapping[int, Tensor]) -> None:
        self.param_groups = [
            {**{k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}}
            | {"params": [copies.get(id(p), p) for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        self.state: dict[Any, Any] = {}
        self.defaults = dict(optimizer.defaults)

    @property
    def optimizer(self) -> "StandInOptimizer":
        """The optimizer that Lightning's wrapper has."""
        return self

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        """Calls the closure, for its forward pass."""
        return closure() if closure is not None else self


class StandIn:
    """Stands for a Trainer, or for a part of one: what it says can be read, what it does is nothing.

    Plain values and tensors are copies. Optimizers are :class:`StandInOptimizer`, loggers are :class:`Nothing`, and
    every method does nothing. Objects of the user's own classes, such as a datamodule, are handed out as they are.

    Args:
        real: The Trainer, or the part.
        module: The copy of the module that is run.
        copies: As for :class:`StandInOptimizer`.
        values: Attributes that have other values than the real ones, ``global_step`` for example.
    """

    def __init__(self, real: Any, module: nn.Module, copies: Mapping[int, Tensor], values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)
        self.__dict__["_stands_for"] = (real, module, copies)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        real = self.__dict__["_stands_for"][0]
        value = Nothing() if name in ("logger", "loggers") else self._instead(getattr(real, name))
        self.__dict__[name] = value
        return value

    def _instead(self, value: Any) -> Any:
        real, module, copies = self.__dict__["_stands_for"]
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, Tensor):
            return copies.get(id(value), value.detach().clone())
        if isinstance(value, Optimizer) or isinstance(getattr(value, "_optimizer", None), Optimizer):
            return StandInOptimizer(value, copies)
        if isinstance(value, list | tuple | set):
            return type(value)(self._instead(item) for item in value) if type(value) in (list, tuple, set) else value
        if isinstance(value, Mapping):
            return {key: self._instead(item) for key, item in value.items()}
        if value is getattr(real, "lightning_module", None) or isinstance(value, nn.Module):
            return module
        if _is_of_a_library(value):
            return Nothing() if callable(value) else StandIn(value, module, copies, {})
        return value


def stand_in_for(
    trainer: Any, original: nn.Module, copied: nn.Module, values: Mapping[str, Any] | None = None
) -> StandIn:
    """Returns what stands for a Trainer in a copy of its module.

    Args:
        trainer: The Trainer.
        original: Its module.
        copied: The copy.
        values: Attributes with other values than those of the Trainer.
    """
    pairs = zip(original.parameters(), copied.parameters(), strict=True)
    strategy = {"reduce": lambda tensor, *_, **__: tensor, "broadcast": lambda value, *_, **__: value}
    copies: dict[int, Tensor] = {id(a): b for a, b in pairs}
    own = {"strategy": StandIn(trainer.strategy, copied, copies, strategy), **(values or {})}
    return StandIn(trainer, copied, copies, own)


def _is_of_a_library(value: Any) -> bool:
    module = getattr(value, "__module__", None) or type(value).__module__
    return str(module).partition(".")[0] in {"lightning", "pytorch_lightning", "lightning_fabric", "torch", "builtins"}
