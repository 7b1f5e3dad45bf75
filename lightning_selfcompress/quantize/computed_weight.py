"""The tensor that ``layer.weight`` returns: computed, yet asked for what belongs to the parameter behind it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class ComputedWeight(Tensor):
    """A quantized weight, whose gradient, hooks and ``requires_grad`` are those of its latent weight.

    Code that reads ``layer.weight.grad``, registers a hook on ``layer.weight`` or freezes it therefore does to a
    quantized layer what it does to the float layer. Operations on the tensor return plain tensors.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _latent: Tensor

    @classmethod
    def of(cls, value: Tensor, latent: Tensor) -> Tensor:
        """Makes a computed weight of its value, the same object, and of the latent weight."""
        value.__class__ = cls
        value._latent = latent  # type: ignore[attr-defined]
        return value

    @property
    def grad(self) -> Tensor | None:
        """The gradient of the latent weight."""
        return self._latent.grad

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        self._latent.grad = gradient

    @property
    def requires_grad(self) -> bool:
        """Whether the latent weight is trained."""
        return self._latent.requires_grad

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        self._latent.requires_grad = wanted

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Trains the latent weight from now on, or not."""
        self._latent.requires_grad_(requires_grad)
        return self

    def register_hook(self, hook: Callable[[Tensor], Any]) -> RemovableHandle:
        """Registers a hook on the gradient of the latent weight."""
        return self._latent.register_hook(hook)  # type: ignore[no-any-return]

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]) -> RemovableHandle:
        """Registers a hook that is called after the gradient of the latent weight was accumulated."""
        return self._latent.register_post_accumulate_grad_hook(hook)  # type: ignore[no-any-return]
