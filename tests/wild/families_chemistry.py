"""chemprop: message passing over molecules."""

from typing import Any

import torch
from chemprop.data import BatchMolGraph, MoleculeDatapoint
from chemprop.featurizers import SimpleMoleculeMolGraphFeaturizer
from chemprop.models import MPNN
from chemprop.nn import AtomMessagePassing, BondMessagePassing, MeanAggregation, RegressionFFN
from entry import Entry
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

MOLECULES = ("CCO", "c1ccccc1O", "CC(=O)N", "CCN(CC)C=O")


def molecules() -> tuple[BatchMolGraph, Tensor]:
    """Some molecules with a random property."""
    featurize = SimpleMoleculeMolGraphFeaturizer()
    graphs = [featurize(MoleculeDatapoint.from_smi(text).mol) for text in MOLECULES]
    return BatchMolGraph(graphs), torch.randn(len(MOLECULES), 1)


def regress(net: nn.Module, batch: tuple[BatchMolGraph, Tensor]) -> tuple[Tensor, Any]:
    """The loss of the property."""
    prediction = net(batch[0])
    return F.mse_loss(prediction, batch[1]), prediction


def _entry(name: str, passing: Any) -> Entry:
    def make() -> nn.Module:
        return MPNN(passing(d_h=32, depth=3), MeanAggregation(), RegressionFFN(input_dim=32, hidden_dim=16))

    return Entry("chemprop", name, make, molecules, regress)


ENTRIES = (_entry("D-MPNN", BondMessagePassing), _entry("MPNN over atoms", AtomMessagePassing))
