"""What the tests of commands share besides fixtures."""

import json

MODEL = ["--model", "networks:Lit"]
GROUPED = """
import lightning.pytorch as pl
from torch import nn


class Grouped(pl.LightningModule):
    def __init__(self):
        super().__init__()
        print("words of the module itself")
        self.net = nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 8, 2, groups=2), nn.Conv2d(8, 8, 2, bias=False),
            nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Conv2d(6, 6, 1), nn.Flatten(), nn.Linear(294, 4),
        )
        self.table = nn.Embedding(4, 4)


class Wanting(Grouped):
    def __init__(self, width):
        super().__init__()


class Broken:
    pass
"""


def values(said, *arguments):
    status, lines, err = said(*arguments, "--json")
    assert err == ""
    return status, json.loads("\n".join(lines))
