"""torch-geometric: networks of graphs, trained to classify nodes."""

from typing import Any

import torch
from entry import Entry
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch_geometric.nn import GAT, GCN, GIN, PNA, EdgeCNN, GraphSAGE

NODES = 24


def graph() -> dict[str, Tensor]:
    """A graph of random edges with a class at each node."""
    edges = torch.randint(NODES, (2, 80))
    return {"x": torch.randn(NODES, 8), "edge_index": edges, "y": torch.randint(4, (NODES,))}


def classify(net: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """The loss of the classes of all nodes."""
    logits = net(batch["x"], batch["edge_index"])
    return F.cross_entropy(logits, batch["y"]), logits


SIZES = {"in_channels": 8, "hidden_channels": 32, "num_layers": 3, "out_channels": 4}
DEGREES = {"aggregators": ["mean", "max"], "scalers": ["identity", "amplification"], "deg": torch.ones(8).long()}


def _entry(name: str, kind: Any, **arguments: Any) -> Entry:
    return Entry("torch-geometric", name, lambda: kind(**SIZES, **arguments), graph, classify)


ENTRIES = (
    _entry("GCN", GCN, norm="batch_norm"),
    _entry("GAT", GAT, heads=4),
    _entry("GATv2", GAT, heads=4, v2=True),
    _entry("GraphSAGE", GraphSAGE, dropout=0.2),
    _entry("GIN", GIN, norm="batch_norm"),
    _entry("EdgeCNN", EdgeCNN),
    _entry("PNA", PNA, **DEGREES),
)
