"""Depths and exponents and their optimizers: out of the user's groups, into one of our own that steps along."""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_selfcompress.removal.optimizer_state import shrink_optimizer
from lightning_selfcompress.removal.surgery import Shrunk
from lightning_selfcompress.size.price import ModelSize


def take_out(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> int:
    """Takes parameters out of an optimizer's groups, in place, so that schedulers and wrappers see the same lists.

    Args:
        optimizer: Any torch optimizer.
        parameters: What to take out, found by identity.

    Returns:
        Number of entries taken out.
    """
    unwanted = {id(p) for p in parameters}
    taken = 0
    for group in optimizer.param_groups:
        kept = [i for i, p in enumerate(group["params"]) if id(p) not in unwanted]
        if len(kept) == len(group["params"]):
            continue
        taken += len(group["params"]) - len(kept)
        for key in ("params", "param_names"):
            if key in group:
                group[key][:] = [group[key][i] for i in kept]
    for p in [p for p in optimizer.state if id(p) in unwanted]:
        del optimizer.state[p]
    if taken and hasattr(optimizer, "_numel_cache"):
        optimizer._numel_cache = None  # LBFGS: number of its parameters' elements
    return taken


def cooldown_factor(progress: float, share: float) -> float:
    """Factor of a learning rate that is held, then falls to zero in a straight line.

    Args:
        progress: Share of the training that is done, from 0 to 1.
        share: Share of the training, at its end, over which the rate falls; 0 for none.

    Returns:
        ``min(1, (1 - progress) / share)``, never below 0.
    """
    return 1.0 if share == 0 else max(0.0, min(1.0, (1.0 - progress) / share))


class DepthOptimizer:
    """Adam on the depths and exponents whose weights one user optimizer trains, a step after each of its steps.

    The size's gradient, which does not depend on the batch, is added right before the step: so it is what gamma says,
    whatever the loss was scaled with and over however many batches it was accumulated. ``zero_grad`` of the user's
    optimizer clears the gradients here as well.

    Args:
        owner: The user's optimizer.
        size: The share in Q of the weights whose depths and exponents are trained.
        lr: Learning rate; Adam moves every depth by about this many bits a step. 0 holds them where they are.
        gamma: Returns the weight of Q in the loss.
        gradient_scale: Returns what the loss was multiplied with before backward, 1 without a GradScaler.
        wrappers: Objects that stand for the user's optimizer and have a ``zero_grad`` of their own.
        average: Returns the mean over processes of a tensor, where nothing else averages these gradients.
    """

    def __init__(
        self,
        owner: Optimizer,
        size: ModelSize,
        *,
        lr: float,
        gamma: Callable[[], float],
        gradient_scale: Callable[[], float] = lambda: 1.0,
        wrappers: Sequence[Any] = (),
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.owner = owner
        self.size = size
        self.skipped_steps = 0
        self._gamma = gamma
        self._gradient_scale = gradient_scale
        self._average = average
        self._faces = (owner, *wrappers)
        self._trained = [p for q in size.parameters for p in (q.raw_depth, q.exponent)]
        fused = all(p.device.type in ("cpu", "cuda") for p in self._trained)
        # eps below any gradient of a size: a channel of a large network owns a tiny share of Q
        settings: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-16, "fused": fused}
        self.adam = torch.optim.Adam(self._trained, **settings) if lr and self._trained else None
        self._handle: RemovableHandle | None = None
        self._replaced: list[Any] = []

    def attach(self) -> None:
        """Steps and clears along with the user's optimizer from now on."""
        self._handle = self.owner.register_step_post_hook(self._after_step)
        self._replaced = [face.__dict__.get("zero_grad") for face in self._faces]
        for face in self._faces:
            face.zero_grad = self._and_depths(face.zero_grad)

    def detach(self) -> None:
        """Undoes :meth:`attach`."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            for face, replaced in zip(self._faces, self._replaced, strict=True):
                del face.zero_grad  # the attribute of the instance; the method of its class shows again
                if replaced is not None:
                    face.zero_grad = replaced

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of the steps to come; no effect where it was 0 from the start."""
        for group in self.adam.param_groups if self.adam is not None else ():
            group["lr"] = lr

    def resize(self, size: ModelSize, shrunk: Sequence[Shrunk] = ()) -> None:
        """Goes on after channels were removed, or with another account of the size.

        Args:
            size: The share in Q of the same weights, as it is now.
            shrunk: The parameters that were replaced.
        """
        self.size = size
        self._trained = [p for q in size.parameters for p in (q.raw_depth, q.exponent)]
        if self.adam is not None:
            shrink_optimizer(self.adam, shrunk)

    def zero_grad(self) -> None:
        """Forgets the gradients of depths and exponents."""
        for p in self._trained:
            p.grad = None

    def step(self) -> bool:
        """One step of depths and exponents on the gradients at hand and the size's.

        Returns:
            Whether it was done: not without any gradient from a loss, at learning rate 0, or where a gradient is not
            finite, which is counted in ``skipped_steps``. A weight without gradient (frozen, a target network, an
            expert not chosen) keeps its depths and exponents.
        """
        if self.adam is not None and self._average is not None:
            self._average_gradients(self._average)
        if self.adam is None or all(p.grad is None for p in self._trained):
            self.zero_grad()
            return False
        finite = self._complete_gradients()
        if finite:
            self.adam.step()
        else:
            self.skipped_steps += 1
        self.zero_grad()
        return finite

    @torch.no_grad()
    def _average_gradients(self, average: Callable[[Tensor], Tensor]) -> None:
        """The same gradients in every process; none where no process has one."""
        reached = self._trained[0].new_tensor([p.grad is not None for p in self._trained])
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trained]
        *means, anywhere = average(torch.cat([*parts, reached])).split([p.numel() for p in (*parts, reached)])
        for p, mean, share in zip(self._trained, means, anywhere.tolist(), strict=True):
            p.grad = mean.to(p) if share else None

    @torch.no_grad()
    def _complete_gradients(self) -> bool:
        """Unscales the loss's gradients and adds the size's; returns whether all are finite."""
        scale = self._gradient_scale()
        gradients = [p.grad for p in self._trained if p.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        learning = [  # a weight that the loss does not reach keeps its depths
            (quantized.raw_depth.grad, gradient)
            for quantized, gradient in zip(self.size.parameters, self.size.gradients(self._gamma()), strict=True)
            if quantized.raw_depth.grad is not None
        ]
        if learning:
            torch._foreach_add_(*map(list, zip(*learning, strict=True)))
        # 0 times what is not finite is NaN; one sum takes fewer operations than a test of every element
        return float(torch.cat(gradients).mul_(0).sum()) == 0

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # set by GradScaler where the optimizer itself skips the step
        if found_inf is not None and bool(found_inf):
            self.zero_grad()
        else:
            self.step()

    def _and_depths(self, zero_grad: Callable[..., None]) -> Callable[..., None]:
        @wraps(zero_grad)
        def zero_grad_with_depths(*args: Any, **kwargs: Any) -> None:
            self.zero_grad()
            zero_grad(*args, **kwargs)

        return zero_grad_with_depths
