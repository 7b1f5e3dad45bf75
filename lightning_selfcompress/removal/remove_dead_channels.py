"""Removal in one call, for training loops without Lightning."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_selfcompress.channels.watch import Watcher
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.removal.dry_run import prove
from lightning_selfcompress.removal.optimizer_state import shrink_optimizer
from lightning_selfcompress.removal.plan import RemovalPlan, plan_removal
from lightning_selfcompress.removal.surgery import remove
from lightning_selfcompress.size.coupling import couple
from lightning_selfcompress.tensors import map_tensors


def remove_dead_channels(
    model: nn.Module,
    step: Callable[..., Any],
    optimizers: Iterable[Optimizer] = (),
    *,
    inputs: Sequence[Any] = (),
    round_to: int = 1,
) -> RemovalPlan:
    """Takes dead channels out of a converted model and of its optimizers; its outputs stay what they are.

    Watches one step to see which channels belong together, plans what goes, tries it on copies of the model, and
    carries out what was proved. A channel goes when its depths have come to zero and nothing of it emits a constant: a
    bias or a shift of a dead channel has to be zero.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_selfcompress import convert, remove_dead_channels
    >>> net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> plan = convert(net)
    >>> net[0].bit_depth.data[2] = 0  # as training does
    >>> print(remove_dead_channels(net, lambda net, x: net(x), inputs=[torch.randn(2, 1, 9, 9)]))
    Removed: 1 channels, 45 weights (0 8 -> 7)

    Args:
        model: A converted module, in the mode it is trained in.
        step: A training step, ``step(model, *inputs)``: it runs the model as training does, and returns outputs or a
            loss. It is called with the model once, and then with copies of the model, so it must neither step an
            optimizer nor hold on to a model of its own.
        optimizers: The optimizers that train the model; what they remember of the kept entries stays.
        inputs: What ``step`` takes besides the model: tensors, or containers of tensors, which are copied. The proof is
            in float64 if everything that ``step`` computes with is the model or among these, otherwise in float32.
        round_to: Widths are kept at multiples of this.

    Returns:
        What was removed, and why dead channels stay; ``print`` shows it.

    Raises:
        ValueError: If the model is not converted, or ``round_to`` is below 1.
    """
    if not any(isinstance(layer, Quantized) for layer in model.modules()):
        raise ValueError(
            f"Expected a converted {type(model).__name__}, found no quantized layer in it. Call convert(model) first, "
            f"and train its bit depths."
        )
    watcher = Watcher(model)
    with watcher:
        watcher.pin_outputs(step(model, *inputs), "the step returns it")
    channels = watcher.channels()

    def replay(net: nn.Module, dtype: torch.dtype) -> Any:
        def copied(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

        return step(net, *map_tensors(copied, list(inputs)))

    plan, channels = prove(model, channels, plan_removal(model, channels, round_to=round_to), replay)
    shrunk = remove(model, plan.edits)
    for optimizer in optimizers:
        shrink_optimizer(optimizer, shrunk)
    couple(model, channels.without_numbers(plan.channels))
    return plan
