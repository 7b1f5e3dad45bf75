"""The removal of dead channels in one call, for training loops without Lightning."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_selfcompress.channels.watch import Watcher
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.removal.dry_run import prove
from lightning_selfcompress.removal.optimizer_state import shrink_optimizer
from lightning_selfcompress.removal.plan import RemovalPlan, plan_removal
from lightning_selfcompress.removal.surgery import remove
from lightning_selfcompress.removal.trial import Replay
from lightning_selfcompress.size.coupling import couple
from lightning_selfcompress.tensors import copied_in


def remove_dead_channels(
    model: nn.Module,
    step: Callable[..., Any],
    optimizers: Iterable[Optimizer] = (),
    *,
    inputs: Sequence[Any] = (),
    round_to: int = 1,
) -> RemovalPlan:
    """Removes dead channels from a converted model and from its optimizers, without a change of the model's outputs.

    The function watches one step to find the channels, plans the removal, tries it on copies of the model, and carries
    out the proved part. A channel is removed when the bit depths of all its producers are zero and its constants
    (biases, scales and shifts) are zero as well.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_selfcompress import convert, remove_dead_channels
    >>> net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> plan = convert(net)
    >>> net[0].bit_depth.data[2] = 0  # as training does
    >>> print(remove_dead_channels(net, lambda net, x: net(x), inputs=[torch.randn(2, 1, 9, 9)]))
    Removed: 1 channels, 45 weights (0 8 -> 7)

    Args:
        model: A converted module, in the mode in which it is trained.
        step: A training step, ``step(model, *inputs)``, which runs the model as in training and returns outputs or a
            loss. The function calls it once with the model, and then with copies of the model, so the step must neither
            step an optimizer nor use a model other than its argument.
        optimizers: The optimizers that train the model; they keep their state of the kept entries.
        inputs: The arguments of ``step`` after the model: tensors, or containers of tensors, which are copied. The dry
            run is in float64 if ``step`` computes with nothing but the model and these inputs, otherwise in float32.
        round_to: Numbers of output channels are kept at multiples of this number.

    Returns:
        The plan that was carried out; ``print`` shows the removed channels, and why dead channels are kept.

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
        return step(net, *copied_in(dtype, list(inputs)))

    waiting = {n: f"{name!r} may read it, which the step does not run" for n, name in channels.waiting().items()}
    plan = plan_removal(model, channels, round_to=round_to, waiting=waiting)
    plan, channels = prove(model, channels, plan, [Replay(replay)])
    shrunk = remove(model, plan.edits)
    for optimizer in optimizers:
        shrink_optimizer(optimizer, shrunk)
    couple(model, channels.without_numbers(plan.channels))
    return plan
