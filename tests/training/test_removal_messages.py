"""What a training says of dead channels that stay: the reason names what needs them, and is said once."""

import logging

import torch
from torch import nn

from lightning_selfcompress import convert, remove_dead_channels
from lightning_selfcompress.removal.plan import RemovalPlan
from lightning_selfcompress.training.removal_schedule import RemovalSchedule


class Residual(nn.Module):
    """Three layers whose outputs are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Linear(n, 6) for n in (4, 6, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(x)
        return self.head(x + self.second(x))


def plan(dead):
    """Returns the plan of a residual network with a dead channel in some of its layers."""
    torch.manual_seed(0)
    model = convert(Residual()).model
    for name in dead:
        model.get_submodule(name).bit_depth.data[1] = 0
    x = torch.randn(5, 4)
    return remove_dead_channels(model, lambda m, batch: m(batch).sum(), inputs=(x,))


def test_names_the_layer_that_is_alive():
    """A channel of a sum stays as long as one of its layers has it."""
    assert plan(("first", "second")).refused == {
        ("first", "they leave together with channels of 'stem' that are alive"): 1,
        ("second", "they leave together with channels of 'stem' that are alive"): 1,
    }


def test_says_once_what_they_stay_with(caplog, monkeypatch):
    """Which of the layers is alive may change from one removal to the next; that they stay is said once."""
    monkeypatch.setattr(logging.getLogger("lightning_selfcompress"), "propagate", True)
    schedule = RemovalSchedule(convert(Residual()).model)
    for epoch, alive in enumerate(("stem", "second", "stem")):
        refused = {("first", f"they leave together with channels of {alive!r} that are alive"): 1 + epoch}
        schedule._tell(RemovalPlan((), (), 0, {}, refused), epoch)
    schedule._tell(RemovalPlan((), (), 0, {}, {("head", "it is an output of the network"): 1}), 3)
    said = [record.message for record in caplog.records if record.levelno == logging.INFO]
    assert [text.split(": ", 1)[1] for text in said] == [
        "1 dead in first stay: they leave together with channels of 'stem' that are alive",
        "1 dead in head stay: it is an output of the network",
    ]
