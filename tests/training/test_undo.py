"""What a dry run has changed is put back, in the objects that it was in."""

from collections import OrderedDict, defaultdict

import pytest
from torch import nn

from lightning_selfcompress.training.undo import undo


class Making(OrderedDict):
    """A dictionary that makes something else of its values, as registries of classes do."""

    def __getitem__(self, key):
        return super().__getitem__(key)()


@pytest.mark.parametrize("kind", [dict, OrderedDict, defaultdict, Making])
def test_dictionaries(kind):
    """The same pairs come back in the same order, whatever the dictionary makes of them."""
    value = kind()
    value.update({"b": list, "a": tuple})
    put_back = undo(value)
    value.pop("b")
    value["c"] = set
    put_back()
    assert list(value) == ["b", "a"]
    assert dict.__getitem__(value, "b") is list


def test_hooks_can_be_removed_afterwards():
    """A hook of a module goes as it would have gone without a dry run."""
    module = nn.Linear(2, 2)
    first, second = (module.register_forward_hook(lambda *_: None) for _ in range(2))
    undo(module._forward_hooks)()
    first.remove()
    assert list(module._forward_hooks.values()) == [module._forward_hooks[second.id]]
