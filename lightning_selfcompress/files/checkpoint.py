"""Checkpoints: a network takes the shapes of the compressed checkpoint that it loads; an error leaves it unchanged."""

import zipfile
from collections.abc import Callable, Mapping, MutableMapping
from os import PathLike
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_selfcompress.activations.layers import take_points
from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.errors import CheckpointError
from lightning_selfcompress.files.modest import check_members, check_regular, check_tensors
from lightning_selfcompress.files.shapes import check_sizes, wrong_shape
from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.conversion_plan import plan_conversion
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.quantize.layers import AXIS_KEY, Quantized, saved_axis
from lightning_selfcompress.quantize.parameters import learned_names, quantized_parameters, weight_name_of
from lightning_selfcompress.removal.surgery import (
    Replacement,
    replace_tensors,
    take_sizes,
    whole_number,
    zeros_in_place_of,
)
from lightning_selfcompress.size.coupling import couple
from lightning_selfcompress.tensors import name_of, own_tensors, stored_tensors

# The key that marks a compressed checkpoint. torch names it in the error of a float network that loads the checkpoint.
MARK = "open_with.lightning_selfcompress.load_from_checkpoint"


FORMAT = 1


VERSION_KEY = "pytorch-lightning_version"  # the key of Lightning's version in its checkpoints


Module = TypeVar("Module", bound=nn.Module)


def load_from_checkpoint(
    module_class: type[Module], path: str | PathLike[str], *, strict: bool | None = None, **kwargs: Any
) -> Module:
    """Opens a checkpoint of a run with SelfCompression as the smaller network with its quantized layers.

    The function replaces ``module_class.load_from_checkpoint``, and opens checkpoints of float networks as well.

    >>> from tempfile import TemporaryDirectory
    >>> from lightning.pytorch import Trainer
    >>> from lightning_selfcompress import SelfCompression, load_from_checkpoint
    >>> from lightning_selfcompress.demo import DigitsData, DigitsNet
    >>> quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    >>> trainer = Trainer(fast_dev_run=True, callbacks=[SelfCompression(gamma=0.1)], **quiet)
    >>> trainer.fit(DigitsNet(), datamodule=DigitsData())
    >>> with TemporaryDirectory() as folder:
    ...     trainer.save_checkpoint(f"{folder}/net.ckpt")
    ...     net = load_from_checkpoint(DigitsNet, f"{folder}/net.ckpt")

    Args:
        module_class: The LightningModule class that was trained.
        path: The checkpoint, either a full one or one saved with ``save_weights_only``.
        strict: Whether the checkpoint must have exactly the module's keys, as in Lightning.
        kwargs: Other arguments of ``module_class.load_from_checkpoint``: ``map_location``, ``hparams_file``,
            ``weights_only``, and arguments of the module that its saved hyperparameters lack.

    Returns:
        The module, in training mode.

    Raises:
        CheckpointError: If the file is damaged, is not a checkpoint, or does not fit the module.
        OSError: If the file does not exist or cannot be opened.
    """
    states: dict[str, Any] = {}  # the states of the callbacks in the checkpoint

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        states.update(checkpoint.get("callbacks") or {})
        super(opening, self).on_load_checkpoint(checkpoint)

    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        self.__class__ = module_class
        convert_as(self, state_dict)
        return self.load_state_dict(state_dict, *args, **options)

    body: dict[str, Any] = {"load_state_dict": load_state_dict, "on_load_checkpoint": on_load_checkpoint}
    body |= {"__module__": module_class.__module__, "__doc__": module_class.__doc__}
    opening: Any = type(module_class.__name__, (module_class,), body)
    try:
        module = cast(Module, opening.load_from_checkpoint(path, strict=strict, **kwargs))
    except Exception as error:
        check_readable(lambda: torch.load(path, map_location="cpu", weights_only=kwargs.get("weights_only")), path)
        if isinstance(error, RuntimeError):
            raise misfit(error, module_class, path) from error
        if isinstance(error, KeyError) and VERSION_KEY in error.args:
            raise CheckpointError(
                f"Expected a checkpoint of a Lightning Trainer in {str(path)!r}, found one that does not tell its "
                f"version. Weights alone go into a module by load_state_dict."
            ) from error
        raise
    _check_intact(path)
    for state in states.values():
        couple_as_saved(module, state)
    return module


def couple_as_saved(module: nn.Module, state: Any) -> None:
    """Notes the channels that a checkpoint holds on the layers of a module, if the channels describe this module.

    Args:
        module: A converted module.
        state: The state of one callback in the checkpoint. States of callbacks other than SelfCompression are ignored.
    """
    removal = state.get("removal") if isinstance(state, Mapping) else None
    saved = removal.get("channels") if isinstance(removal, Mapping) else None
    channels = Channels.from_state_dict(saved) if isinstance(saved, Mapping) else None
    if channels is not None and channels.describes(module):
        couple(module, channels)


def convert_as(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Converts the layers of a float module that have bit depths in a state dict, and calls :func:`follow_shapes`.

    Layers of types that are not known are among them: the state dict holds their axes.

    Args:
        module: A freshly built module.
        state_dict: The state dict of a compressed network, or of a float network, which changes nothing.
    """
    axes = axes_in(module, state_dict)
    plan = plan_conversion(module, axes=axes)
    compressed = {weight_name_of(key) for key in state_dict}
    float_there = [
        layer.name
        for layer in plan.compressed
        if compressed.isdisjoint(name_of(layer.name, name) for name, _ in layer.weights)
    ]
    if len(float_there) < len(plan.compressed):
        convert(module, skip=float_there, axes=axes)
        follow_shapes(module)
    take_points(module, state_dict)


def axes_in(module: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, ChannelAxis]:
    """Returns the axes in a state dict of parameters of a module that are not quantized yet, by the parameters' names.

    Args:
        module: A module.
        state_dict: A state dict of the module when it was compressed, or of another one.
        prefix: The prefix of the module's keys.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    latent = {id(p.latent) for p in quantized_parameters(module)}
    keys = [key for key, value in state_dict.items() if key.endswith(AXIS_KEY) and isinstance(value, Tensor)]
    found: dict[str, ChannelAxis] = {}
    for key in (key for key in keys if key.startswith(prefix)):
        name = weight_name_of(f"{key.removeprefix(prefix).removesuffix(AXIS_KEY)}bit_depth") or ""
        axis, parameter = saved_axis(state_dict[key]), parameters.get(name)
        if axis is not None and parameter is not None and id(parameter) not in latent and axis.fits(parameter):
            found[name] = axis
    return found


def follow_shapes(module: nn.Module) -> None:
    """Makes a module, and every compressed part of it, take the shapes of each compressed state dict that it loads."""
    _register(module, take_shapes)
    for path, part in module.named_modules():
        if path and any(isinstance(layer, Quantized) for layer in part.modules()):
            _register(part, _take_other_shapes)


def _register(module: nn.Module, hook: Callable[..., None]) -> None:
    if all(getattr(known, "hook", None) is not hook for known in module._load_state_dict_pre_hooks.values()):
        module.register_load_state_dict_pre_hook(hook)


def _take_other_shapes(part: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Does :func:`take_shapes` for a part that is loaded by itself; after the whole module there is nothing left."""
    for name, tensor in own_tensors(part) if isinstance(part, Quantized) else stored_tensors(part).items():
        saved = state_dict.get(prefix + name)
        if isinstance(saved, Tensor) and saved.shape != tensor.shape:
            take_shapes(part, state_dict, prefix)
            return


def take_shapes(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str = "", *_: Any) -> None:
    """Gives the tensors of a converted module the shapes that they have in a state dict, smaller or larger.

    The function is a ``load_state_dict`` pre-hook, so that every way of loading calls it. The state dict of a float
    network, which has no bit depths, changes nothing.

    Args:
        module: A converted module.
        state_dict: The state dict that is about to be loaded. The key ``MARK`` is removed from it.
        prefix: The prefix of the module's keys.

    Raises:
        CheckpointError: If the module cannot have these shapes, or a later version wrote the checkpoint. The module is
            unchanged then.
    """
    marked = prefix + MARK in state_dict
    if int(state_dict.pop(prefix + MARK, FORMAT)) > FORMAT:
        raise CheckpointError(
            "Expected a checkpoint of this version of lightning-selfcompress, got one of a later version."
        )
    take_points(module, state_dict, prefix)
    own = stored_tensors(module)
    sizes = _pop_sizes(module, state_dict, f"{prefix}{MARK}.")
    saved = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }
    _check_converted(module, saved)
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, Quantized)}
    if not any(
        name_of(path, spec.bit_depth) in saved for path, layer in layers.items() for spec in layer._quantized.values()
    ):
        return
    _check_shapes(module, layers, own, saved)
    fresh: dict[int, Replacement] = {}
    for name, tensor in own.items():
        if name in saved and saved[name].dim() > 0 and saved[name].shape != tensor.shape:
            fresh[id(tensor)] = zeros_in_place_of(tensor, saved[name].shape)
    if fresh:
        replace_tensors(module, fresh)
    if marked:
        take_sizes(module, sizes)


def _pop_sizes(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str) -> dict[str, int]:
    """Takes the sizes that no shape tells out of a state dict, and returns them by their paths."""
    sizes = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    for name, value in sizes.items():
        known = whole_number(module, name)
        if known is None or not isinstance(value, Tensor) or value.numel() != 1 or not int(value) >= 1:
            raise CheckpointError(
                f"Expected {name!r} to be a whole number in this {type(module).__name__}, as it was in the run that "
                f"wrote the checkpoint. Build the module with the arguments of that run."
            )
    return {name: int(value) for name, value in sizes.items()}


def read_checkpoint(path: str | PathLike[str], *, weights_only: bool = True) -> dict[str, Any]:
    """Reads a Lightning checkpoint of any network onto the CPU.

    Args:
        path: The file.
        weights_only: Whether only tensors and plain values are read. False runs any code that the file holds, as pickle
            does.

    Returns:
        The content of the checkpoint, which has the key ``"state_dict"``.

    Raises:
        CheckpointError: If the file is damaged, is not a checkpoint, or holds tensors that it cannot hold: compressed,
            expanded, sparse or without values.
        OSError: If the file does not exist, cannot be opened, or is a device or a pipe.
    """
    check_regular(path)
    check_members(path)
    return cast(
        "dict[str, Any]",
        check_readable(lambda: torch.load(path, map_location="cpu", weights_only=weights_only), path),
    )


def check_readable(load: Callable[[], Any], path: Any) -> Any:
    """Returns the result of ``load()``, or raises a CheckpointError if the result is not an intact checkpoint."""
    try:
        checkpoint = load()
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:
        raise _unreadable(path, f"{type(error).__name__}: {str(error).partition('.')[0]}") from error
    state_dict = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not all(isinstance(key, str) for key in state_dict):
        found = "a dictionary without 'state_dict'" if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise CheckpointError(
            f"Expected a Lightning checkpoint in {str(path)!r}, found {found}. Weights alone go into a module by "
            f"load_state_dict."
        )
    _check_intact(path)
    check_tensors(checkpoint, path)
    return checkpoint


def _check_intact(path: Any) -> None:
    """Checks the checksums of a local file, because torch writes checksums but does not check them."""
    writes_checksums = getattr(torch.serialization, "get_crc32_options", lambda: True)()
    if writes_checksums and isinstance(path, str | PathLike) and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged:
            raise _unreadable(path, f"wrong checksum of {damaged}")


def _unreadable(path: Any, reason: str) -> CheckpointError:
    return CheckpointError(
        f"Expected a checkpoint in {str(path)!r}, found a file that cannot be read: it is damaged, or of another kind "
        f"({reason}). Take an earlier one."
    )


def misfit(error: RuntimeError, module_class: type, path: Any = None) -> RuntimeError:
    """Returns an error of loading as a CheckpointError that says what to do."""
    if isinstance(error, CheckpointError):
        return error
    source = f"the checkpoint {str(path)!r}" if path is not None else "what is loaded"
    return CheckpointError(
        f"{error}\nExpected {source} to be of a {module_class.__name__} with the same arguments. Build the module with "
        f"those of the run that wrote it, and SelfCompression with the same skip=."
    )


def _check_converted(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Checks that each layer compressed in ``saved`` is converted: a float layer would compute with latent weights."""
    named = module.named_modules(remove_duplicate=False)  # a shared layer has several names
    own = {name_of(path, name) for path, m in named for name, _ in own_tensors(m)}
    for key in saved:
        weight = weight_name_of(key)
        if weight is not None and key not in own and learned_names(weight)[1] in saved:
            layer = weight.removesuffix("weight").removesuffix(".")
            raise CheckpointError(
                f"Expected {layer!r} to be float in the checkpoint, as in this {type(module).__name__}, found bit "
                f"depths for it. Convert it as in that run, with the same skip=."
            )


def _check_shapes(
    module: nn.Module, layers: Mapping[str, Quantized], own: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> None:
    """Checks that the saved shapes can be the shapes of this module after its removals."""
    shrunk = False
    for path, layer in layers.items():
        for name, spec in layer._quantized.items():
            weight, depth = (saved.get(name_of(path, n)) for n in (name, spec.bit_depth))
            shrunk |= layer.latent(name).numel() < spec.original_numel
            if weight is None or depth is None:
                continue
            if depth.dim() != 1 or weight.dim() != layer.latent(name).dim():
                raise CheckpointError(
                    wrong_shape(name_of(path, name), layer.latent(name), weight.shape, "the dimensions of")
                )
            along = weight.shape[spec.axis.dim]
            if depth.numel() % along if spec.axis.groups > 1 else depth.numel() != along:
                raise CheckpointError(
                    f"Expected {along} bit depths for {name_of(path, name)!r} {tuple(weight.shape)}, got "
                    f"{depth.numel()}. The checkpoint is damaged; take an earlier one."
                )
            if depth.numel() > spec.original_channels or weight.numel() > spec.original_numel:
                raise CheckpointError(wrong_shape(name_of(path, name), layer.latent(name), weight.shape, "at most"))
    check_sizes(module, {name: tuple(t.shape) for name, t in saved.items()}, larger=shrunk)
