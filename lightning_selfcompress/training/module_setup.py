"""The conversion of a module that a Trainer is about to train: around what the module itself still builds."""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

from torch import nn

from lightning_selfcompress.quantize.conversion_plan import ConversionPlan, unmatched
from lightning_selfcompress.quantize.convert import as_float, convert, revert
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import QuantizedParameter, quantized_parameters
from lightning_selfcompress.quantize.registry import supported_types

_BUILDERS = ("setup", "configure_model")


class Conversion:
    """Converts the layers there are, then those that ``setup`` and ``configure_model`` of a LightningModule build.

    These methods, and ``configure_optimizers``, see the float network. They are wrapped on the instance until
    :meth:`unwrap`.

    Args:
        initial_bits: Bit depth all channels start with.
        skip: What to leave in float, as in :func:`convert`.
    """

    def __init__(self, *, initial_bits: float, skip: Sequence[type[nn.Module] | str]) -> None:
        self._initial_bits, self._skip = initial_bits, skip
        self._copies: Callable[[], Iterable[nn.Module]] = tuple
        self._wrapped: dict[str, Any] = {}
        self._uncalibrated: dict[int, QuantizedParameter] = {}
        self._was_float = True

    def begin(self, module: nn.Module, copies: Callable[[], Iterable[nn.Module]], *, training: bool) -> None:
        """Converts what is there now.

        Args:
            module: A LightningModule.
            copies: Returns the copies that others keep of it, which are converted along.
            training: Whether it is to be trained: it has to have something to convert then.

        Raises:
            ValueError: If it has not, and builds nothing itself.
        """
        self._copies = copies
        self._uncalibrated.clear()
        self._was_float = not any(isinstance(layer, Quantized) for layer in module.modules())
        builders = [name for name in _BUILDERS if _overrides(module, name)]
        self.convert(module, complete=training and not builders)
        for name in builders:
            self._wrap(module, name, self._then_convert)
        self._wrap(module, "configure_optimizers", _in_float)

    def convert(self, module: nn.Module, *, complete: bool = False) -> ConversionPlan:
        """Converts what is there; the complete module has to have something to convert and all that ``skip`` names.

        Raises:
            ValueError: If it has not. The module is then as it was before :meth:`begin`.
        """
        absent = () if complete else unmatched(module, self._skip)
        skip = [entry for entry in self._skip if entry not in absent]
        before = {id(p.latent) for p in quantized_parameters(module)}
        try:
            plan = convert(module, initial_bits=self._initial_bits, skip=skip)
            if complete and not plan.compressed:
                raise ValueError(
                    f"Expected something to compress in {type(module).__name__}, found nothing. SelfCompression "
                    f"takes {supported_types()} and their subclasses.\n{plan}"
                )
        except ValueError:
            if self._was_float:
                revert(module)
            raise
        for copied in self._copies():
            convert(copied, initial_bits=self._initial_bits, skip=[e for e in skip if not unmatched(copied, [e])])
        self._uncalibrated |= {id(p.latent): p for p in quantized_parameters(module) if id(p.latent) not in before}
        return plan

    def recalibrate(self) -> None:
        """Starts at the float function of the weights as they are now, unless depths were loaded with them."""
        for p in self._uncalibrated.values():
            if not p.layer.depths_loaded:
                p.layer.calibrate(p.weight_name)
        self._uncalibrated.clear()

    def unwrap(self, module: nn.Module) -> None:
        """Gives the module its own methods back."""
        for name, earlier in self._wrapped.items():
            del module.__dict__[name]
            if earlier is not None:
                module.__dict__[name] = earlier
        self._wrapped.clear()

    def _wrap(self, module: nn.Module, name: str, wrapper: Callable[..., Any]) -> None:
        if name not in self._wrapped:
            self._wrapped[name] = module.__dict__.get(name)
            module.__dict__[name] = wrapper(module, getattr(module, name))

    def _then_convert(self, module: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._was_float:  # layers are built, initialized and tied as floats
                revert(module)
                self._uncalibrated.clear()
            result = method(*args, **kwargs)
            self.convert(module)
            let_train(quantized_parameters(module))
            return result

        return wrapped


def let_train(parameters: Iterable[QuantizedParameter], wanted: bool = True) -> None:
    """Depths and exponents are trained where their weights are, and only while the callback is there.

    DDP waits for the gradient of every parameter that may have one when it is wrapped: those of frozen weights never
    come. A later fit without the callback would train them without any price.

    Args:
        parameters: Quantized weights.
        wanted: Whether the callback is there.
    """
    for p in parameters:
        trained = wanted and p.latent.requires_grad
        if p.raw_depth.requires_grad != trained:
            p.raw_depth.requires_grad_(trained)
            p.exponent.requires_grad_(trained)


def _overrides(module: nn.Module, name: str) -> bool:
    """Whether a module has a hook of its own; of whichever package's LightningModule it is a subclass."""
    base = next(c for c in type(module).__mro__ if c.__name__ == "LightningModule")
    return name in module.__dict__ or getattr(type(module), name) is not getattr(base, name)


def _in_float(module: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    """Optimizers are made from the float network: no depth among its parameters, its layers of their own types."""

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with as_float(module):
            return method(*args, **kwargs)

    return wrapped
