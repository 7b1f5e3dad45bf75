"""The conversion of a module that a Trainer is about to train, whose own hooks may still build layers."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_selfcompress.activations.layers import activated_modules
from lightning_selfcompress.files.checkpoint import follow_shapes
from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.conversion_plan import ConversionPlan, unmatched
from lightning_selfcompress.quantize.convert import as_float, convert, revert
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import QuantizedParameter, quantized_parameters
from lightning_selfcompress.quantize.registry import supported_types
from lightning_selfcompress.tensors import put_on
from lightning_selfcompress.training.depth_training import let_train
from lightning_selfcompress.training.found_activations import quantize_activations
from lightning_selfcompress.training.found_layers import axes_of_step, convert_when_loaded, tell_found
from lightning_selfcompress.training.intercept import overrides
from lightning_selfcompress.training.lightning_private import averaged_models
from lightning_selfcompress.training.messages import tell, warn
from lightning_selfcompress.training.sandbox import proves_nothing
from lightning_selfcompress.training.strategies import (
    agree_on_depths,
    give_depths_back,
    keep_depths_from_ddp,
    shards_parameters,
)
from lightning_selfcompress.training.strategy_guard import guard_strategy

_BUILDERS = ("setup", "configure_model")


class ModuleSetup:
    """Converts the layers there are, then the layers that ``setup`` and ``configure_model`` of the module build.

    These two methods and ``configure_optimizers`` see the float network: ``layer.weight`` is the parameter there. The
    methods are wrapped on the instance until :meth:`unwrap` is called.

    Args:
        trainer: The Trainer. The copies of the module that its callbacks average are converted along.
        initial_bits: Bit depth all channels start with.
        skip: What to leave in float, as in :func:`convert`.
        activations: Bit depth of activations; None to leave them as they are.
    """

    def __init__(
        self, trainer: Any, *, initial_bits: float, skip: Sequence[type[nn.Module] | str], activations: int | None
    ) -> None:
        self._trainer, self._initial_bits, self._skip, self._activations = trainer, initial_bits, skip, activations
        self._wrapped: dict[str, Callable[[], None]] = {}  # name of a method -> what gives it back
        self._uncalibrated: dict[int, QuantizedParameter] = {}
        self._was_float = True
        self._hooks: list[RemovableHandle] = []
        self._quantizes_activations = False  # whether the next training step shows which
        self._looks = False  # whether the next training step may show layers of unknown types

    def begin(self, module: nn.Module, *, training: bool) -> None:
        """Converts what is there now, and has the Trainer's strategy read and write checkpoints of it.

        Args:
            module: A LightningModule.
            training: Whether the module is to be trained; there has to be something to convert then.

        Raises:
            ValueError: If there is nothing to convert, and the module builds nothing itself.
        """
        self._was_float = not any(isinstance(layer, Quantized) for layer in module.modules())
        builders = [name for name in _BUILDERS if overrides(module, name)]
        self.convert(module, complete=training and not builders)
        for name in builders:
            self._wrap(module, name, self._then_convert)
        self._wrap(module, "configure_optimizers", _in_float)
        self._unhook()
        networks = (module, *averaged_models(self._trainer.callbacks))
        self._hooks = [convert_when_loaded(n, self._initial_bits, self._skip) for n in networks]
        for network in networks:
            follow_shapes(network)
        if not shards_parameters(self._trainer.strategy):
            guard_strategy(self._trainer.strategy)

    def finish(self, module: nn.Module, told: str, *, resumed: bool = False) -> None:
        """Converts what is left of the module, which is complete now, gives its own methods back, and tells the plan.

        Args:
            module: The LightningModule.
            told: What is told before the plan.
            resumed: Whether an earlier training has looked for layers of unknown types already.

        Raises:
            ValueError: If there is nothing to compress, or ``skip`` names what is not there.
        """
        self.unwrap(module)
        plan = self.convert(module, complete=True)
        follow_shapes(module)
        agree_on_depths(self._trainer.strategy, module)
        self._looks = not resumed and bool(plan.undecided) and not shards_parameters(self._trainer.strategy)
        later = "\nThe first training step shows which of the layers without a quantized class are some." * self._looks
        tell(f"{told}\n{plan}{later}")
        _tell_frozen(module)
        self._quantizes_activations = self._activations is not None and not any(activated_modules(module))
        _tell_activated(module, self._activations)
        let_train(module)

    def find(self, module: nn.Module, batch: Any, batch_idx: int) -> bool:
        """Takes up what the first training step shows before it runs; returns whether there is anything new to train.

        It shows which layers of unknown types are some, and which activations are to be quantized.

        Args:
            module: The LightningModule, whose optimizers may exist: its parameters stay the same objects.
            batch: The batch of the step.
            batch_idx: Its number.

        Raises:
            ValueError: If there is nothing to compress.
        """
        if proves_nothing(batch) or not (self._looks or self._quantizes_activations):
            return False
        found = self._find_layers(module, batch, batch_idx) if self._looks else False
        if self._quantizes_activations and self._activations is not None:
            self._quantizes_activations = False
            found |= quantize_activations(self._trainer, module, batch, batch_idx, bits=self._activations)
        return found

    def _find_layers(self, module: nn.Module, batch: Any, batch_idx: int) -> bool:
        self._looks = False
        found = axes_of_step(self._trainer, module, batch, batch_idx) if self._trainer.is_global_zero else {}
        found = self._trainer.strategy.broadcast(found)
        before = sum(1 for _ in quantized_parameters(module))
        plan = self.convert(module, complete=True, axes=found)
        if sum(1 for _ in quantized_parameters(module)) == before:
            return False
        self.recalibrate()
        follow_shapes(module)
        let_train(module)
        torch.compiler.reset()  # graphs of the float layers
        tell_found(plan, found)
        return True

    def convert(
        self, module: nn.Module, *, complete: bool = False, axes: Mapping[str, ChannelAxis | str] | None = None
    ) -> ConversionPlan:
        """Converts the layers that are there now, and the same layers of averaged copies.

        Args:
            module: A LightningModule.
            complete: Whether nothing will be added to the module any more.
            axes: What is known of layers of unknown types, as in :func:`convert`; None if the first step may show it.

        Returns:
            The plan for the whole module.

        Raises:
            ValueError: If a complete module has nothing to convert, or lacks something that ``skip`` names. The module
                is then as it was before :meth:`begin`.
        """
        absent = () if complete else unmatched(module, self._skip)
        skip = [entry for entry in self._skip if entry not in absent]
        before = {id(p.latent) for p in quantized_parameters(module)}
        try:
            plan = convert(module, initial_bits=self._initial_bits, skip=skip, axes=axes)
            if complete and not plan.compressed and not (axes is None and plan.undecided):
                raise ValueError(
                    f"Expected something to compress in {type(module).__name__}, found nothing. SelfCompression "
                    f"takes {supported_types()}, their subclasses, layers that do the same, and those of "
                    f"register_layer.\n{plan}"
                )
        except ValueError:
            if self._was_float:
                revert(module)
            raise
        for copied in averaged_models(self._trainer.callbacks):
            own = [e for e in skip if not unmatched(copied, [e])]
            convert(copied, initial_bits=self._initial_bits, skip=own, axes=axes)
        keep_depths_from_ddp(self._trainer.strategy, module)
        self._uncalibrated |= {id(p.latent): p for p in quantized_parameters(module) if id(p.latent) not in before}
        return plan

    def recalibrate(self) -> None:
        """Lets depths and exponents start at the float function of the present weights, unless they were loaded."""
        for p in self._uncalibrated.values():
            p.layer.forget_quantized()  # takes over what was written into the weight since the conversion
            if not p.layer.depths_loaded:
                p.layer.calibrate(p.weight_name)
        self._uncalibrated.clear()

    def close(self, module: nn.Module) -> None:
        """Leaves nothing of this class on the module; its layers stay converted."""
        self.unwrap(module)
        self._unhook()
        give_depths_back(module)

    def unwrap(self, module: nn.Module) -> None:
        """Gives the module its own methods back."""
        for give_back in self._wrapped.values():
            give_back()
        self._wrapped.clear()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _wrap(self, module: nn.Module, name: str, wrapper: Callable[..., Any]) -> None:
        if name not in self._wrapped:
            self._wrapped[name] = put_on(module, name, wrapper(module, getattr(module, name)))

    def _then_convert(self, module: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._was_float:  # layers are built, initialized and tied as floats
                revert(module)
                self._uncalibrated.clear()
            result = method(*args, **kwargs)
            self.convert(module)
            return result

        return wrapped


def _in_float(module: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    """Has ``configure_optimizers`` see the float network: layers of their own types, whose weights are parameters."""

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with as_float(module):
            return method(*args, **kwargs)

    return wrapped


def _tell_activated(pl_module: nn.Module, asked: int | None) -> None:
    """Says that activations are quantized already, where that is not as it was asked for."""
    bits = sorted({point.bits for _, part in activated_modules(pl_module) for point in part._points})
    if bits and bits != [asked]:
        warn(
            f"SelfCompression(activations={asked}): this module quantizes activations in "
            f"{', '.join(map(str, bits))} bits already, and goes on so. calibrate_activations(module, batches, "
            f"bits=...) chooses other bits before the training."
        )


def _tell_frozen(pl_module: nn.Module) -> None:
    """Says which weights keep their depths since they are frozen."""
    frozen = [p.name for p in quantized_parameters(pl_module) if not p.latent.requires_grad]
    if frozen:
        tell(
            f"Frozen, so kept at their bit depths: {', '.join(frozen[:3])}{', ...' if len(frozen) > 3 else ''} "
            f"({len(frozen)} weights). To leave them in float and out of the size, name them in skip=."
        )
