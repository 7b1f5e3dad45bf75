"""A removal is proved with a few examples of each batch, where the network runs with so few."""

import pytest
import torch
from fits import Widths, fit
from networks import Lit, batches

from lightning_selfcompress.training.sandbox import Sandbox

SIZE = 40


class Validated(Lit):
    """Has batches of validation that are larger than those of training."""

    def val_dataloader(self):
        return batches(2, 3 * SIZE, dtype=torch.float64)


class NamesItsBatch(Validated):
    """The size of the training batches is written into the code."""

    def training_step(self, batch, batch_idx):
        return super().training_step([batch[0].view(SIZE, 1, 8, 8), batch[1]], batch_idx)


class Penalized(Validated):
    """The loss of validation has a penalty on all weights, which is less without those that were removed."""

    def validation_step(self, batch, batch_idx):
        return self.loss(batch) + 1e-3 * sum((p**2).sum() for p in self.parameters())


@pytest.fixture
def seen(monkeypatch):
    """The dry runs: the step, its examples, and whether gradients were recorded."""
    found, run = [], Sandbox.run

    def noting(self, copied, step, dtype, watcher=None):
        if watcher is None and dtype is not None:
            found.append((step.name, len(step.args[0][0]), torch.is_grad_enabled()))
        return run(self, copied, step, dtype, watcher)

    monkeypatch.setattr(Sandbox, "run", noting)
    return found


@pytest.mark.parametrize(("make", "training"), [(Validated, {16}), (NamesItsBatch, {16, SIZE}), (Penalized, {16})])
def test_removals_are_proved_with_few(seen, make, training):
    """Sixteen examples are enough; a batch whose size is in the code is taken whole; validation records no graph."""
    widths = Widths()
    fit(1, widths, make=make, loader=batches(60, SIZE, dtype=torch.float64))
    assert widths.seen[-1] != widths.seen[0], "nothing was removed"
    assert {n for step, n, _ in seen if step == "training_step"} == training
    assert {n for step, n, _ in seen if step == "validation_step"} == {16}
    assert any(graph for step, _, graph in seen if step == "validation_step") == (make is Penalized)
