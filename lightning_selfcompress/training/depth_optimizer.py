"""The optimizer of depths and exponents, which steps along with an optimizer of the user's."""

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_selfcompress.removal.optimizer_state import shrink_optimizer
from lightning_selfcompress.removal.surgery import Shrunk
from lightning_selfcompress.size.price import ModelSize, Pull
from lightning_selfcompress.tensors import put_on

EMPTY_STEPS = 50  # after which a channel without codes is dead


_EMPTY = "empty_steps"  # in Adam's state of bit depths: steps for which all codes of each channel have been zero


def cooldown_factor(progress: float, share: float) -> float:
    """Factor of a learning rate that is held, then falls to zero in a straight line.

    Args:
        progress: Share of the training that is done, from 0 to 1.
        share: Share of the training, at its end, over which the rate falls; 0 for none.

    Returns:
        ``min(1, (1 - progress) / share)``, never below 0.
    """
    return 1.0 if share == 0 else max(0.0, min(1.0, (1.0 - progress) / share))


def inner_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """Returns the optimizers that an optimizer keeps in its attributes and may step itself, as SAM and Lookahead do."""
    found: list[Optimizer] = []
    for value in vars(optimizer).values():
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, Optimizer) and one is not optimizer and all(one is not other for other in found):
                found += [one, *inner_optimizers(one)]
    return found


def stepping_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """Returns the optimizers that move weights themselves: those inside an optimizer if there are any, else itself."""
    return [o for o in (optimizer, *inner_optimizers(optimizer)) if not inner_optimizers(o)]


class DepthOptimizer:
    """Adam on the depths and exponents whose weights one user optimizer trains, a step after each of its steps.

    A step of an optimizer inside the user's optimizer counts as one of its steps.

    The size's gradient, which does not depend on the batch, is staged when a backward pass begins, and added right
    before the step: so it is what gamma says, whatever the loss was scaled with, over however many batches it was
    accumulated, and however many backward passes there were. ``zero_grad`` of the user's optimizer clears the gradients
    here as well.

    Args:
        owner: The user's optimizer.
        size: The share in Q of the weights whose depths and exponents are trained.
        lr: Learning rate; Adam moves every depth by about this many bits a step. 0 holds them where they are.
        gamma: Returns the weight of Q in the loss.
        gradient_scale: Returns what the loss was multiplied with before backward, 1 without a GradScaler.
        wrappers: Objects that stand for the user's optimizer and have a ``zero_grad`` of their own.
        average: Returns the mean over processes of a tensor, where there are several.
        stepped: Called after each step of the owner, whether or not depths have moved.
        others: Tensors that are trained along without a price: the exponents of activations.
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
        stepped: Callable[[], None] = lambda: None,
        others: Sequence[Tensor] = (),
    ) -> None:
        self.owner = owner
        self.size = size
        self.skipped_steps = 0
        self._gamma = gamma
        self._gradient_scale = gradient_scale
        self._average = average
        self._stepped = stepped
        self._faces = (owner, *wrappers)
        self._staged: tuple[Pull, ...] | None = None
        self._others = others
        self._trained = [*(t for p in size.parameters for t in p.learned), *others]
        fused = all(t.device.type in ("cpu", "cuda") for t in self._trained)
        # eps below any gradient of a size: a channel of a large network owns a tiny share of Q
        settings: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-16, "fused": fused}
        self.adam = torch.optim.Adam(self._trained, **settings) if lr and self._trained else None
        self._handles: list[RemovableHandle] = []
        self._held: dict[int, tuple[tuple[int, ...], set[int]]] = {}
        self._in_a_step: set[int] = set()
        self.stepped = self.reached = self.overflows = False
        self._take_off: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Steps and clears along with the user's optimizer from now on."""
        self._handles = [
            o.register_step_post_hook(self._after_step) for o in (self.owner, *inner_optimizers(self.owner))
        ]
        self._handles += [o.register_step_pre_hook(self._before_step) for o in stepping_optimizers(self.owner)]
        self._take_off = [put_on(face, "zero_grad", self._and_depths(face.zero_grad)) for face in self._faces]

    def detach(self) -> None:
        """Undoes :meth:`attach`."""
        for undo in (*(handle.remove for handle in self._handles), *self._take_off):
            undo()
        self._handles, self._take_off = [], []

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of the steps to come; no effect where it was 0 from the start."""
        for group in self.adam.param_groups if self.adam is not None else ():
            group["lr"] = lr

    def resize(self, size: ModelSize, shrunk: Sequence[Shrunk] = ()) -> None:
        """Goes on after channels were removed, or with another account of the size.

        Args:
            size: The present share in Q of the same weights.
            shrunk: What has become smaller.
        """
        self.size = size
        self._trained = [*(t for p in size.parameters for t in p.learned), *self._others]
        self._held = {}
        self.unstage()
        if self.adam is not None:
            shrink_optimizer(self.adam, shrunk)

    def zero_grad(self) -> None:
        """Forgets the gradients of depths and exponents."""
        self.reached |= self.has_gradients()
        for tensor in self._trained:
            tensor.grad = None

    def has_gradients(self) -> bool:
        """Returns whether a loss has given gradients to depths since the last step."""
        return any(tensor.grad is not None for tensor in self._trained)

    def unheld(self) -> list[str]:
        """Returns the names of the weights that no group of the user's optimizer holds."""
        held = self._held_by(self.owner)
        return [p.name for p in self.size.parameters if id(p.latent) not in held]

    def _held_by(self, optimizer: Optimizer) -> set[int]:
        groups = [group["params"] for group in optimizer.param_groups]
        sizes = tuple(map(len, groups))
        kept = self._held.get(id(optimizer))
        if kept is None or kept[0] != sizes:
            kept = self._held[id(optimizer)] = sizes, {id(p) for group in groups for p in group}
        return kept[1]

    def stage(self) -> None:
        """Evaluates the size's gradient for the step to come, unless it was evaluated since the last step."""
        if self._staged is None and self.adam is not None:
            self._staged = self.size.pulls(self._gamma())

    def unstage(self) -> None:
        """Forgets the staged gradient: depths have moved, or gamma has."""
        self._staged = None

    def step(self) -> bool:
        """One step of depths and exponents on the gradients at hand and the size's.

        Returns:
            Whether it was done: not without any gradient from a loss, at learning rate 0, or where a gradient is not
            finite, which is counted in ``skipped_steps``. A weight without gradient (frozen, a target network, an
            expert not chosen) keeps its depths and exponents, and so does a weight that the owner does not hold.
        """
        held = self._held_by(self.owner)
        for parameter in self.size.parameters:
            if id(parameter.latent) not in held:
                for tensor in parameter.learned:
                    tensor.grad = None
        if self.adam is not None and self._average is not None:
            self._average_gradients(self._average)
        if self.adam is None or all(t.grad is None for t in self._trained):
            self.zero_grad()
            return False
        self._unscale()
        self._add_size_gradient()
        finite = self._is_finite()
        if finite:
            learning = [p.raw_depth.grad is not None for p in self.size.parameters]
            self.adam.step()
            self._end_empty(learning)
        else:
            self.skipped_steps += 1
            self.overflows |= not self._price_is_finite()
        self.zero_grad()
        return finite

    @torch.no_grad()
    def _end_empty(self, learning: Sequence[bool]) -> None:
        """Sets the depths of channels to zero whose codes have all been zero for :data:`EMPTY_STEPS` steps.

        The steps are counted in Adam's state, which is sliced and saved along.
        """
        assert self.adam is not None
        counted = [
            (parameter.raw_depth, pull.magnitude)
            for parameter, pull, trained in zip(self.size.parameters, self._staged or (), learning, strict=True)
            if trained and pull.magnitude is not None
        ]
        if not counted:
            return
        states = [self.adam.state[depth] for depth, _ in counted]
        before = [
            state.get(_EMPTY, depth.new_zeros(depth.shape)) for state, (depth, _) in zip(states, counted, strict=True)
        ]
        empty = torch.cat([m for _, m in counted]) == 0
        steps = torch.cat(before).add_(1).mul_(empty)
        ended = steps >= EMPTY_STEPS
        some = empty.device.type != "cpu" or bool(ended.any())  # on other devices this check would wait for the device
        sizes = [depth.numel() for depth, _ in counted]
        for (depth, _), state, so_far, at_end in zip(
            counted, states, steps.split(sizes), ended.split(sizes), strict=True
        ):
            state[_EMPTY] = so_far
            if some:
                depth.masked_fill_(at_end, 0)

    @torch.no_grad()
    def _average_gradients(self, average: Callable[[Tensor], Tensor]) -> None:
        """The same gradients in every process; none where no process has one."""
        reached = self._trained[0].new_tensor([t.grad is not None for t in self._trained], requires_grad=False)
        parts = [torch.zeros_like(t) if t.grad is None else t.grad for t in self._trained]
        *means, anywhere = average(torch.cat([*parts, reached])).split([t.numel() for t in (*parts, reached)])
        for tensor, mean, share in zip(self._trained, means, anywhere.tolist(), strict=True):
            tensor.grad = mean.to(tensor) if share else None

    @property
    def _gradients(self) -> list[Tensor]:
        return [t.grad for t in self._trained if t.grad is not None]

    @torch.no_grad()
    def _unscale(self) -> None:
        """Divides the loss's gradients by what the loss was multiplied with."""
        scale = self._gradient_scale()
        if scale != 1.0:
            torch._foreach_mul_(self._gradients, 1.0 / scale)

    @torch.no_grad()
    def _add_size_gradient(self) -> None:
        """Adds the price's gradient to those of depths and exponents; without a gradient of the loss they stay."""
        self.stage()
        assert self._staged is not None
        learning = [
            (tensor.grad, gradient)
            for parameter, pull in zip(self.size.parameters, self._staged, strict=True)
            for tensor, gradient in zip(parameter.learned, pull, strict=False)
            if tensor.grad is not None and gradient is not None
        ]
        if learning:
            torch._foreach_add_(*map(list, zip(*learning, strict=True)))

    def _is_finite(self) -> bool:
        """Whether all gradients are finite."""
        return _are_finite(self._gradients)

    def _price_is_finite(self) -> bool:
        """Whether the staged gradient is finite."""
        return _are_finite([t for pull in self._staged or () for t in (pull.depth, pull.exponent) if t is not None])

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Adds the price's gradient to those of weights, after the closure of the step if it has one.

        Torch calls this hook again where the step of a class calls that of its base class.
        """
        if self.adam is None or id(optimizer) in self._in_a_step:
            return None
        self._in_a_step.add(id(optimizer))
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._pull_weights(optimizer)
            return None

        calls = count()

        def closure_with_price() -> Any:
            if next(calls):
                self.unstage()  # weights have moved since, as in LBFGS
            loss = closure()
            self._pull_weights(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], closure_with_price, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_with_price}

    def _pull_weights(self, optimizer: Optimizer) -> None:
        """Adds the price's gradient to those of the weights that an optimizer is about to move."""
        self.stage()
        assert self._staged is not None
        if all(pull.weight is None for pull in self._staged) or not self._price_is_finite():
            return
        held = self._held_by(optimizer)
        scale = float(getattr(optimizer, "grad_scale", None) or 1.0)  # set where a fused step unscales by itself
        for parameter, pull in zip(self.size.parameters, self._staged, strict=True):
            latent = parameter.latent
            # a gradient of zeros may be what zero_grad has left; of several processes one may be reached for all
            reached = self._average is not None or parameter.raw_depth.grad is not None
            if pull.weight is not None and latent.grad is not None and reached and id(latent) in held:
                pull.weight(scale)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._in_a_step.discard(id(optimizer))
        self.stepped = True
        found_inf = getattr(optimizer, "found_inf", None)  # set by GradScaler where the optimizer itself skips the step
        if found_inf is not None and bool(found_inf):
            self.zero_grad()
        else:
            waiting = self._set_aside(optimizer)
            self.step()
            for tensor, gradient in waiting:
                tensor.grad = gradient
        self.unstage()
        self._stepped()

    def _set_aside(self, optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
        """Takes off the gradients of depths that wait for another optimizer inside the user's one; returns them."""
        if optimizer is self.owner:
            return []
        held = self._held_by(optimizer)
        others = [t for p in self.size.parameters if id(p.latent) not in held for t in p.learned]
        waiting = [(t, t.grad) for t in others if t.grad is not None]
        for tensor, _ in waiting:
            tensor.grad = None
        return waiting

    def _and_depths(self, zero_grad: Callable[..., None]) -> Callable[..., None]:
        @wraps(zero_grad)
        def zero_grad_with_depths(*args: Any, **kwargs: Any) -> None:
            self.zero_grad()
            zero_grad(*args, **kwargs)

        return zero_grad_with_depths


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    """Returns whether all elements of vectors are finite; true for no vector."""
    # 0 times what is not finite is NaN; one sum takes fewer operations than a test of every element
    return not tensors or float(torch.cat(list(tensors)).mul_(0).sum()) == 0
