"""Nested values: their tensors found, and replaced in containers that stay what they are."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from lightning_selfcompress.tensors import is_a, map_tensors, tensors_in

Pair = namedtuple("Pair", "one two")


@dataclass
class Batch:
    images: Tensor
    extra: dict = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Frozen:
    images: Tensor
    count: int = 3


class Needs(dict):
    """A dictionary whose constructor wants something else."""

    def __init__(self, path, **items):
        super().__init__(**items)
        self.path = path


class Row(tuple):
    """A tuple whose constructor takes its items one by one."""

    __slots__ = ()

    def __new__(cls, *items):
        return super().__new__(cls, items)


class Listed(list):
    def __init__(self, *, name):
        super().__init__()
        self.name = name


def listed(*items):
    made = Listed(name="n")
    made.extend(items)
    return made


T = [torch.full((2,), float(i)) for i in range(4)]
VALUES = {
    "tensor": (T[0], 1),
    "list in a tuple": (([T[0], 5], T[1]), 2),
    "named tuple": (Pair(T[0], {"a": T[1]}), 2),
    "ordered dictionary": (OrderedDict(b=T[0], a=T[1]), 2),
    "defaultdict": (defaultdict(list, a=T[0]), 1),
    "dictionary with a constructor": (Needs("p", a=T[0]), 1),
    "tuple with a constructor": (Row(T[0], T[1]), 2),
    "list with a constructor": (listed(T[0], "x"), 1),
    "dataclass": (Batch(T[0], {"a": [T[1]]}), 2),
    "frozen dataclass with slots": (Frozen(T[0]), 1),
    "user dictionary": (UserDict(a=T[0]), 1),
    "what torch.max returns": (torch.max(torch.stack(T), 0), 2),
    "a shape": (T[0].shape, 0),
    "a shape in a batch": ([T[0], T[0].shape], 1),
    "something else": (object(), 0),
    "a class": (Batch, 0),
}


@pytest.mark.parametrize("kind", VALUES)
def test_found_and_replaced(kind):
    """All tensors are found in order; a copy with others has the same types and attributes, the original its own."""
    value, count = VALUES[kind]
    found = tensors_in(value)
    assert len(found) == count
    if kind != "what torch.max returns":
        assert [t.tolist() for t in found] == [t.tolist() for t in T[:count]]
    doubled = map_tensors(lambda t: 2 * t, value)
    assert type(doubled) is type(value)
    assert [t.tolist() for t in tensors_in(doubled)] == [(2 * t).tolist() for t in found]
    assert all(a is b for a, b in zip(tensors_in(value), found, strict=True))
    assert getattr(doubled, "path", "p") == getattr(value, "path", "p")
    assert getattr(doubled, "name", "n") == getattr(value, "name", "n")
    if isinstance(value, defaultdict):
        assert doubled.default_factory is list


def test_what_contains_itself_is_entered_once():
    """A container that contains itself does no harm."""
    value = {"a": T[0]}
    value["self"] = value
    assert len(tensors_in([value, value])) == 2


def test_classes_by_name():
    """A class is known by its name, or by that of one of its bases, whatever package it is from."""
    other = type("Linear", (), {})
    assert is_a(nn.Linear(2, 2), "Linear")
    assert is_a(other(), "Linear")
    assert is_a(nn.Linear(2, 2), "Module")
    assert not is_a(nn.Linear(2, 2), "Conv2d")
