"""Widths that the modules around a layer keep in attributes, such as the size of a state that a step starts from.

``torch.zeros(layers, batch, self.hidden_size)`` reads its width from an attribute of a module that holds the recurrent
layer. Which attributes go with a removal is not known, so several choices are tried, each by a dry run.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from lightning_selfcompress.quantize.parameters import attributes_of
from lightning_selfcompress.removal.own_widths import is_width
from lightning_selfcompress.removal.surgery import Edit, size_names
from lightning_selfcompress.tensors import name_of

_MOST = 8  # attributes, above which none is tried alone


def choices(model: nn.Module, edits: Sequence[Edit]) -> Iterator[tuple[Edit, ...]]:
    """Yields the changes of attributes that may belong to a removal: all that fit, and each alone.

    An attribute fits if it has the name of a width, belongs to a module that holds an edited layer, and has the size
    that a dimension had before.

    Args:
        model: The module.
        edits: The edits of the removal.
    """
    found = list(_widths(model, edits))
    alone = found if 1 < len(found) <= _MOST else ()
    yield from [tuple(found)] if found else ()
    yield from ((edit,) for edit in alone)


def _widths(model: nn.Module, edits: Sequence[Edit]) -> Iterator[Edit]:
    changes: dict[int, set[int]] = {}
    owners: dict[str, None] = {}
    for edit in edits:
        changes.setdefault(edit.size, set()).add(edit.size - len(edit.removed))
        path = edit.name.rpartition(".")[0]
        while path:
            path = path.rpartition(".")[0]
            owners[path] = None
    for owner in owners:
        module = model.get_submodule(owner)
        for name, value in attributes_of(module):
            after = changes.get(value, set()) if is_width(name, value) and name not in size_names(module) else set()
            if len(after) == 1:
                removed = tuple(range(min(after), value))
                yield Edit(name_of(owner, name), 0, value, removed, attribute=True)
