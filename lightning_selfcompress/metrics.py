"""The size as torchmetrics metrics, for ``self.log``, ModelCheckpoint and EarlyStopping."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_selfcompress.size.price import ModelSize
from lightning_selfcompress.size.report import size_report


class _SizeMetric(Metric):
    """Reads a model whenever it is computed; there is nothing to update, to keep or to synchronize."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected the model to measure, an nn.Module, got {type(model).__name__}.")
        super().__init__(compute_with_cache=False, sync_on_compute=False, **kwargs)
        self._model = (model,)  # in a tuple, so that the model does not become a part of its own metric

    @property
    def update_called(self) -> bool:
        """Always true: the model is read when the metric is computed."""
        return True

    def update(self) -> None:
        """Nothing to do."""

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draws the size now, or sizes of several times, as torchmetrics draws every metric; needs matplotlib.

        Args:
            val: What :meth:`compute` or the metric itself has returned, once or several times; None computes it.
            ax: Axes to draw on; by default those of a new figure.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: If matplotlib is missing.
        """
        return self._plot(val, ax)


class BitsPerWeight(_SizeMetric):
    """Q of a model: learned bits per original weight, which ``price="bits"`` minimizes.

    >>> from torch import nn
    >>> from lightning_selfcompress import BitsPerWeight, convert
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> plan = convert(net, initial_bits=6)
    >>> float(BitsPerWeight(net).compute())
    6.0
    >>> metric = BitsPerWeight(net)
    >>> figure, ax = metric.plot([metric.compute()])  # of several times

    Args:
        model: The model to measure, for example the LightningModule itself.
        kwargs: As for every torchmetrics metric.

    Raises:
        TypeError: If ``model`` is no module.
    """

    @torch.no_grad()
    def compute(self) -> Tensor:
        """Q now, a float32 scalar in bits per weight; 0 if nothing is quantized."""
        return ModelSize.of(self._model[0]).bits_per_weight().detach().float()


class NBytes(_SizeMetric):
    """Bytes of a model's packed file, the total of :func:`size_report`.

    >>> from torch import nn
    >>> from lightning_selfcompress import NBytes, convert, size_report
    >>> net = nn.Linear(4, 3)
    >>> plan = convert(net)
    >>> int(NBytes(net).compute()) == size_report(net).nbytes
    True
    >>> figure, ax = NBytes(net).plot()  # of now

    Args:
        model: The model to measure, for example the LightningModule itself.
        kwargs: As for every torchmetrics metric.

    Raises:
        TypeError: If ``model`` is no module.
    """

    def compute(self) -> Tensor:
        """Bytes now, a float64 scalar (exact to 2^53)."""
        return torch.tensor(float(size_report(self._model[0]).nbytes), dtype=torch.float64)
