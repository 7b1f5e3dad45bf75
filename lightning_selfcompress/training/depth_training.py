"""The training of depths and exponents in a Trainer: one optimizer of them beside each of the user's."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_selfcompress.activations.layers import activated_modules, exponents_of
from lightning_selfcompress.channels.dispatch import unwatched
from lightning_selfcompress.quantize.parameters import learned_tensors
from lightning_selfcompress.removal.surgery import Shrunk
from lightning_selfcompress.size.price import ModelSize
from lightning_selfcompress.size.report import SizeReport
from lightning_selfcompress.training.depth_optimizer import DepthOptimizer, cooldown_factor
from lightning_selfcompress.training.found_activations import let_activations_train
from lightning_selfcompress.training.messages import tell, warn
from lightning_selfcompress.training.strategies import gradient_average


class DepthTraining:
    """Trains the depths and exponents of a module along with its weights, while a Trainer fits it.

    Args:
        trainer: The Trainer, whose optimizers exist.
        module: The converted module.
        gamma: The weight of the price in the loss, by the global step.
        price: Makes the price of the module.
        lr: Learning rate of depths and exponents.
        cooldown: Share of the training, at its end, over which the learning rate falls to zero.
        skipped_steps: Where to go on counting the steps left out.
        state: What :meth:`state_dict` of an earlier training said, to go on from there.

    Raises:
        ValueError: If the state is of another number of optimizers, or the optimizers train another module.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        *,
        gamma: Callable[[int], float],
        price: Callable[[nn.Module], Any] = ModelSize.of,
        lr: float,
        cooldown: float,
        skipped_steps: int = 0,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._gamma, self._lr, self._cooldown = gamma, lr, cooldown
        self._asked: tuple[int, float] | None = None  # the step that gamma was asked for last, and the answer
        self._optimizers: list[DepthOptimizer] = []
        self._skipped_before = skipped_steps
        self._told: set[int] = set()
        self._price = price
        self._module = module
        self._attach(trainer, state)

    @property
    def skipped_steps(self) -> int:
        """Steps of depths and exponents left out because a gradient was not finite."""
        return self._skipped_before + sum(d.skipped_steps for d in self._optimizers)

    def gamma(self, trainer: Any) -> float:
        """The weight of Q in the loss at the step that was staged last; before the first one, at the step to come."""
        return self._gamma_at(trainer.global_step) if self._asked is None else self._asked[1]

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizers of depths and exponents, in the order of the user's optimizers."""
        states = [None if d.adam is None else d.adam.state_dict() for d in self._optimizers]
        return {"depth_optimizers": states, "skipped_steps": self.skipped_steps}

    def before_batch(self, trainer: Any, batch_idx: int) -> None:
        """Follows optimizers that were made anew, and sets the learning rate of the batch's steps."""
        owners = [d.owner for d in self._optimizers]
        if owners and any(a is not b for a, b in zip_longest(owners, trainer.optimizers)):
            state = self.state_dict()
            self.close()
            self._attach(trainer, state)
        lr = self._lr * cooldown_factor(progress(trainer, batch_idx), self._cooldown)
        for depth_optimizer in self._optimizers:
            depth_optimizer.set_lr(lr)

    def renew(self, trainer: Any) -> None:
        """Begins with the weights that there are now, before the first step of the training."""
        self.close()
        self._attach(trainer, None)

    def stage(self) -> None:
        """Evaluates the size's gradient for the steps to come, once for each step of an optimizer."""
        with unwatched():
            for depth_optimizer in self._optimizers:
                depth_optimizer.stage()

    def resize(self, shrunk: Sequence[Shrunk] = ()) -> None:
        """Goes on after channels were removed, or with another account of the size.

        Args:
            shrunk: What has become smaller.
        """
        size = self._price(self._module)
        for depth_optimizer in self._optimizers:
            depth_optimizer.resize(size.part(depth_optimizer.size.parameters), shrunk)

    def problems(self, gamma: float, report: SizeReport) -> list[str]:
        """Returns why depths cannot be trained as they are, and what to do; each problem once.

        Args:
            gamma: The weight of Q in the loss.
            report: The sizes of the module.
        """
        waiting = [d for d in self._optimizers if not d.stepped and (d.reached or d.has_gradients())]
        names = ", ".join(type(d.owner).__name__ for d in waiting)
        found = {
            f"gamma={gamma:g} makes the size's gradient infinite, so steps of bit depths are left out "
            f"({self.skipped_steps} so far). Take a gamma of the order of the loss over the bits, such as 0.1.": any(
                d.overflows for d in self._optimizers
            ),
            f"all channels are dead, so the network computes a constant. gamma={gamma:g} is too large, or "
            f"bits_lr={self._lr:g}: train anew with less.": report.channels == 0 and bool(report.layers),
            f"{names} has given bit depths gradients, but no step of it was seen, so they stay where they are. Step it "
            f"through its own step(), or keep the optimizer that it steps in one of its attributes.": bool(waiting),
        }
        kinds = [kind for kind, happens in enumerate(found.values()) if happens and kind not in self._told]
        self._told.update(kinds)
        return [list(found)[kind] for kind in kinds]

    def close(self) -> None:
        """Lets go of the user's optimizers."""
        for depth_optimizer in self._optimizers:
            depth_optimizer.detach()

    def _attach(self, trainer: Any, state: dict[str, Any] | None) -> None:
        self._optimizers = []
        size = self._price(self._module)
        owners = {id(p): o for o in reversed(trainer.optimizers) for group in o.param_groups for p in group["params"]}
        if owners.keys().isdisjoint(id(p) for p in self._module.parameters()):
            _check_foreign(trainer.optimizers, self._module)
            warn("SelfCompression: no optimizer trains this module, so bit depths are not trained either.")
            return
        exponents = self._activations(owners, trainer.optimizers[0])
        wrappers = self._module.optimizers(use_pl_optimizer=True)
        wrappers = wrappers if isinstance(wrappers, list) else [wrappers]
        for optimizer, wrapper in zip(trainer.optimizers, wrappers, strict=True):
            own = [p for p in size.parameters if owners.get(id(p.latent), trainer.optimizers[0]) is optimizer]
            self._optimizers.append(
                DepthOptimizer(
                    optimizer,
                    size.part(own),
                    lr=self._lr,
                    gamma=lambda: self._gamma_at(trainer.global_step),
                    gradient_scale=lambda: loss_scale(trainer),
                    average=gradient_average(trainer.strategy),
                    wrappers=(wrapper,),
                    stepped=self._unstage,
                    others=[e for e, owner in exponents if owner is optimizer],
                )
            )
        _tell_unheld([name for d in self._optimizers for name in d.unheld()], self._module)
        if state is not None:
            self._restore(state)
        for depth_optimizer in self._optimizers:
            depth_optimizer.attach()

    def _activations(self, owners: Mapping[int, Optimizer], first: Optimizer) -> list[tuple[Tensor, Optimizer]]:
        """Returns the exponents of activations, each with the optimizer of its module, or of the module around it."""
        found = []
        for path, part in activated_modules(self._module):
            parts = path.split(".")
            around = (self._module.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1))
            own = (owners[id(p)] for module in around for p in module.parameters() if id(p) in owners)
            found.append((exponents_of(part), next(own, first)))
        return found

    def _gamma_at(self, step: int) -> float:
        """Asks for gamma once a step: a function of the user's may count its calls."""
        if self._asked is None or self._asked[0] != step:
            self._asked = step, self._gamma(step)
        return self._asked[1]

    def _restore(self, state: dict[str, Any]) -> None:
        self._skipped_before = state["skipped_steps"]
        saved = state["depth_optimizers"]
        if saved and len(saved) != len(self._optimizers):
            raise ValueError(
                f"Expected the {len(saved)} optimizer(s) of the checkpoint, got {len(self._optimizers)}. Resume "
                f"with the configure_optimizers that the checkpoint was made with."
            )
        for depth_optimizer, one in zip(self._optimizers, saved, strict=False):
            if depth_optimizer.adam is not None and one is not None:
                depth_optimizer.adam.load_state_dict(one)

    def _unstage(self) -> None:
        """A step of one optimizer moves depths and the global step, on which the gradients of all depend."""
        for depth_optimizer in self._optimizers:
            depth_optimizer.unstage()


def let_train(module: nn.Module, wanted: bool = True) -> None:
    """Has depths and exponents get gradients, or not: a later fit without the callback has no use for them.

    Args:
        module: A converted module.
        wanted: Whether they are trained from now on.
    """
    for tensor in learned_tensors(module).values():
        tensor.requires_grad_(wanted)
    let_activations_train(module, wanted)


def progress(trainer: Any, batch_idx: int) -> float:
    """Share of the training that is done, by whichever of epochs and steps ends it first; 0 if neither does."""
    batches = trainer.num_training_batches
    epochs = trainer.current_epoch + (batch_idx / batches if batches not in (0, math.inf) else 0.0)
    by_epochs = epochs / trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 0.0
    by_steps = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    return float(max(by_epochs, by_steps))


def loss_scale(trainer: Any) -> float:
    """What a GradScaler of the Trainer multiplies losses with; 1 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _tell_unheld(names: list[str], module: nn.Module) -> None:
    """Says which weights could be trained but are not, once a fit."""
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    names = [name for name in names if name in trainable]
    if names:
        tell(
            f"SelfCompression: no optimizer holds {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} "
            f"({len(names)} weights), so their bit depths stay until one does. skip= leaves them in float."
        )


def _check_foreign(optimizers: Sequence[Optimizer], module: nn.Module) -> None:
    foreign = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    if foreign:
        raise ValueError(
            f"Expected an optimizer of this {type(module).__name__}, got one of {len(foreign)} parameters that are "
            f"none of its own (the first has the shape {tuple(foreign[0].shape)}): nothing of it would be trained. "
            f"Make the optimizer in configure_optimizers, from self.parameters()."
        )
