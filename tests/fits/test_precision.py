"""Every precision of the Trainer: the same channels leave, and losses are those of the network that kept them."""

import math

import pytest
import torch
from fits import NEVER, Widths, assert_learning, assert_only_living, fit, largest_difference
from lightning.pytorch.plugins import MixedPrecision
from networks import Lit

from lightning_selfcompress.quantize.parameters import quantized_parameters

EPOCH = 60
SMALLER = [4, 3, 3, 3]


class Descent(Lit):
    """In float16 the eps of Adam is zero: it ends in NaN without any callback."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


# Tolerance of the first losses after a removal: one code rounded the other way, at the resolution of the numbers.
CASES = {
    "64-true": (Lit, 1e-10),
    "32-true": (Lit, 1e-5),
    "bf16-mixed": (Lit, 2e-2),
    "bf16-true": (Lit, 2e-2),
    "16-mixed, with a GradScaler": (Lit, 5e-3),
    "16-true": (Descent, 5e-3),
}


def settings(precision):
    if precision.startswith("16-mixed"):  # Lightning asks for a GPU before it makes a scaler
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return {"precision": None, "plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    return {"precision": precision}


@pytest.mark.case("Precision", "{precision}")
@pytest.mark.parametrize("precision", CASES)
def test_removal_in_every_precision(precision):
    """The dead channels go, no loss jumps at their removal, losses stay finite, depths are learned in float32."""
    make, tolerance = CASES[precision]
    widths = Widths()
    model, trainer = fit(1, widths, make=make, **settings(precision))
    kept, _ = fit(NEVER, make=make, **settings(precision))
    assert [w[0] for w in widths.seen] == SMALLER
    assert model.net[4].out_features == 10
    assert kept.net[0].out_channels == 6
    assert_only_living(trainer, model)
    difference = largest_difference(model.losses[: EPOCH + 5], kept.losses[: EPOCH + 5])
    print(f"{precision}: {difference:.2e}, all: {largest_difference(model.losses, kept.losses):.2e}")
    assert difference < tolerance
    assert all(map(math.isfinite, model.losses))
    assert_learning(trainer)
    for p in quantized_parameters(model):
        assert torch.finfo(p.raw_depth.dtype).bits >= 32
