"""The state of torch's recurrent layers, whose entries live and die together in all gates, layers and directions."""

from collections.abc import Mapping

from torch import nn

from lightning_selfcompress.channels.atoms import Atoms, AtomStore, Axis, Dims


def tie_states(store: AtomStore, layer: nn.RNNBase | nn.RNNCellBase, dims: Mapping[str, Dims]) -> None:
    """Ties what a recurrent layer keeps one size for: the hidden state in all gates, layers and directions.

    The entries of a projected state (``proj_size``) are tied apart from those of the state that is projected.

    Args:
        store: The store that receives the ties.
        layer: The layer.
        dims: The dimensions of each of its own parameters and buffers, by name.
    """
    hidden: list[Atoms] = []
    projected: list[Atoms] = []
    returned = projected if getattr(layer, "proj_size", 0) else hidden
    for name, own in dims.items():
        rows, columns = ([*(d.atoms if isinstance(d, Axis) else None for d in own), None, None])[:2]
        if name.startswith("weight_hr"):
            rows_of, columns_of = projected, hidden
        elif name.startswith(("weight_ih", "weight_hh", "bias_ih", "bias_hh")):
            rows_of, columns_of = hidden, returned
        else:
            continue  # a tensor that a subclass added
        if rows is not None:
            rows_of.extend(rows.reshape(-1, layer.hidden_size) if rows_of is hidden else [rows])
        if columns is not None and not name.startswith("weight_ih"):
            columns_of.append(columns)
    for tied in (hidden, projected):
        for other in tied[1:]:
            store.tie(tied[0], other, "")
