"""Folding of batch normalization into the layers before it."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from lightning_selfcompress.activations.layers import Activated, activations_off, base_class, exponents_of, set_points
from lightning_selfcompress.quantize.layers import Quantized


class FoldReport(int):
    """The number of normalization layers that were folded. ``print`` shows their paths.

    Attributes:
        folded: Paths of the normalization layers that were folded.
        left: Paths of the normalization layers that stay, because the output of the layer before has other uses.
    """

    folded: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        text = f"Folded {len(self.folded)} normalization layers"
        text += f" ({', '.join(self.folded)})" if self.folded else ""
        return f"{text}; {', '.join(self.left)} stay: {NOT_FOLDED}" if self.left else text


def fold_batchnorm(model: nn.Module, *inputs: Any) -> FoldReport:
    """Folds batch normalization into the convolutions and linear layers right before it, in place, for evaluation.

    A normalization layer is folded if its input is the output of such a layer. If the model's outputs change by more
    than rounding, the output of the layer before has other uses: the normalization layer stays, with a warning.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_selfcompress import fold_batchnorm
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> print(fold_batchnorm(net, torch.randn(2, 1, 8, 8)))
    Folded 1 normalization layers (1)
    >>> net[1]
    Identity()

    Args:
        model: A plain module, as :func:`finalize` returns. Each folded normalization layer becomes ``nn.Identity``.
        inputs: Example arguments of the model's ``forward``. They show which layer follows which, and whether the
            outputs change.

    Returns:
        The number of normalization layers that were folded; ``print`` shows their paths.

    Raises:
        ValueError: If the model has quantized layers, or its output holds no tensors.
    """
    if any(isinstance(module, Quantized) for module in model.modules()):
        raise ValueError("Expected a plain model to fold, got one with quantized layers. Take finalize(model).")
    folded, left = fold_norms(model, *inputs)
    if left:
        warnings.warn(f"{', '.join(left)} stay: {NOT_FOLDED}.", stacklevel=2)
    report = FoldReport(len(folded))
    report.folded, report.left = tuple(folded), tuple(left)
    return report


NOT_FOLDED = "the output of the layer before is used elsewhere as well"


def fold_norms(model: nn.Module, *inputs: Any) -> tuple[list[str], list[str]]:
    """Folds as :func:`fold_batchnorm` does; returns the paths of the folded layers and of the layers that stay."""
    modes = [(module, module.training) for module in model.modules()]
    paths = {id(module): path for path, module in model.named_modules()}
    model.eval()
    try:
        with (
            activations_off(),
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # tensors of inference mode have no version counters
            pairs, expected = _neighbours(model, inputs)
            left = _fold_all(pairs, lambda: _still(model, inputs, expected))
    finally:
        for module, mode in modes:
            module.training = mode
    folded = [pair for pair in pairs if all(pair is not other for other in left)]
    return [paths[id(pair.norm)] for pair in folded], [paths[id(pair.norm)] for pair in left]


@dataclass(frozen=True, eq=False)
class _Pair:
    """A layer and the normalization layer after it.

    Args:
        layer: The layer.
        norm: The normalization layer.
        places: Each parent module of the normalization layer, with the layer's name in this parent.
    """

    layer: nn.Module
    norm: nn.Module
    places: tuple[tuple[nn.Module, str], ...]

    def fold(self) -> Callable[[], None]:
        """Folds the normalization layer; returns a function that undoes the folding."""
        layer, parameters = self.layer, dict(self.layer._parameters)
        n = cast(nn.BatchNorm2d, self.norm)
        mean = cast(Tensor, n.running_mean)
        scale, shift = (torch.full_like(mean, i) if t is None else t for t, i in ((n.weight, 1), (n.bias, 0)))
        known = (layer.weight, layer.bias, mean, n.running_var, n.eps, scale, shift)
        if isinstance(layer, nn.Linear):
            layer.weight, layer.bias = fuse_linear_bn_weights(*known)  # type: ignore[arg-type]
        else:
            transposed = isinstance(layer, _TRANSPOSED)
            layer.weight, layer.bias = fuse_conv_bn_weights(*known, transpose=transposed)  # type: ignore[arg-type]
        identity = nn.Identity()
        if isinstance(n, Activated):  # which is quantized after it is now what the layer before returns
            set_points(identity, n._points, exponents_of(n).tolist())
        for parent, name in self.places:
            setattr(parent, name, identity)

        def unfold() -> None:
            layer._parameters.update(parameters)
            for parent, name in self.places:
                setattr(parent, name, n)

        return unfold


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *_TRANSPOSED)


def _fold_all(pairs: Sequence[_Pair], unchanged: Callable[[], bool]) -> list[_Pair]:
    """Folds the pairs that leave the outputs unchanged; returns the others. If all together fail, it tries halves."""
    undo = [pair.fold() for pair in pairs]
    if not pairs or unchanged():
        return []
    for back in undo:
        back()
    if len(pairs) == 1:
        return list(pairs)
    middle = len(pairs) // 2
    return _fold_all(pairs[:middle], unchanged) + _fold_all(pairs[middle:], unchanged)


def _neighbours(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[_Pair], list[Tensor]]:
    """Returns each layer whose output goes to a normalization layer that is called once, and the network's outputs."""
    # Id of an output -> its layer and its version counter, which shows whether the output was changed in place since.
    made_by: dict[int, tuple[nn.Module, int]] = {}
    kept: list[Any] = []  # keeps the tensors alive, so that no id is used again
    found: list[tuple[nn.Module | None, nn.Module]] = []

    def made(module: nn.Module, args: Any, out: Any) -> None:
        kept.append(out)
        made_by[id(out)] = module, out._version

    def got(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = (*args, *kwargs.values())[0]
        kept.append(given)
        layer, version = made_by.get(id(given), (None, 0))
        layer = layer if version == given._version else None
        # a linear layer has its features in the last dimension, and batch normalization normalizes dimension 1
        features_last = isinstance(layer, nn.Linear) and given.dim() > 2
        found.append((layer if not features_last else None, module))

    handles = []
    for module in model.modules():
        if base_class(module) in _FOLDABLE and (not isinstance(module, _TRANSPOSED) or module.groups == 1):
            handles.append(module.register_forward_hook(made))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(got, with_kwargs=True))
    try:
        outputs = _tensors(model(*inputs))
    finally:
        for handle in handles:
            handle.remove()
    if not outputs:
        raise ValueError(f"Expected outputs with tensors of {type(model).__name__}, to see that nothing has changed.")
    once = [(a, b) for a, b in found if a is not None and sum(a is c or b is d for c, d in found) == 1]
    children = [(m, name, child) for m in model.modules() for name, child in m.named_children()]
    return [_Pair(a, b, tuple((m, n) for m, n, child in children if child is b)) for a, b in once], outputs


def _still(model: nn.Module, inputs: tuple[Any, ...], expected: list[Tensor]) -> bool:
    """Returns whether the model's outputs differ from the expected outputs by rounding only."""
    try:
        outputs = _tensors(model(*inputs))
    except Exception:  # the network's code reads an attribute of a folded layer
        return False
    for a, b in zip(outputs, expected, strict=True):
        rounding = max(1e-3, 4 * torch.finfo(b.dtype).eps) if b.is_floating_point() else 0.0
        size = float(b.abs().max()) if b.is_floating_point() and b.numel() else 0.0
        if not torch.allclose(a, b, rtol=rounding, atol=rounding / 10 * max(size, 1.0)):
            return False
    return True


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, Mapping):
        values: Iterable[Any] = out.values()
    elif is_dataclass(out) and not isinstance(out, type):
        values = (getattr(out, field.name) for field in fields(out))
    else:
        values = out if isinstance(out, list | tuple) else ()
    return [t for value in values for t in _tensors(value)]
