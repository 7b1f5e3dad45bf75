"""Layers whose classes have other bases than modules, and classes that none can be derived from."""

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_selfcompress.quantize import convert as convert_file
from lightning_selfcompress.quantize.convert import convert, revert
from lightning_selfcompress.quantize.layers import Quantized

T = TypeVar("T")


class Slotted:
    __slots__ = ()


class SlottedOnce:
    __slots__ = ("extra",)


class HasWidth(Protocol):
    def width(self) -> int: ...


class Abstract(ABC, nn.LSTM):
    @abstractmethod
    def first(self, x): ...


class OfAbstract(Abstract):
    def first(self, x):
        return self(x)[0]


class OfABC(ABC, nn.Linear):
    pass


class OfGeneric(Generic[T], nn.Linear):
    pass


class OfBoth(OfABC, Generic[T]):
    pass


class OfSlotted(Slotted, nn.Conv1d):
    pass


class OfSlottedOnce(SlottedOnce, nn.Linear):
    pass


class OfProtocol(HasWidth, nn.Linear):
    def __init__(self, *sizes):
        nn.Linear.__init__(self, *sizes)

    def width(self):
        return self.out_features


class WithMethodsOfTheSameNames(nn.Linear):
    """Conversion uses none of these."""

    def register_buffer(self, *_, **__):
        raise AssertionError

    def __setattr__(self, name, value):
        assert name != "__class__"
        super().__setattr__(name, value)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: OfAbstract(4, 3), (5, 2, 4)),
        (lambda: OfABC(4, 3), (2, 4)),
        (lambda: OfGeneric(4, 3), (2, 4)),
        (lambda: OfBoth(4, 3), (2, 4)),
        (lambda: OfSlotted(4, 3, 1), (2, 4, 5)),
        (lambda: OfSlottedOnce(4, 3), (2, 4)),
        (lambda: OfProtocol(4, 3), (2, 4)),
        (lambda: WithMethodsOfTheSameNames(4, 3), (2, 4)),
    ],
)
def test_convert_like_others(layer, shape):
    """A layer is converted whatever its first base is, trains, and is reverted to what it was."""
    layer, x = layer(), torch.randn(shape)
    kind, keys, expected = type(layer), list(layer.state_dict()), layer(x)
    convert(layer)
    assert isinstance(layer, Quantized)
    assert isinstance(layer, kind)
    actual = layer(x)
    actual, expected = (out[0] if isinstance(out, tuple) else out for out in (actual, expected))
    assert_close(actual, expected, atol=0.1, rtol=0)
    actual.sum().backward()
    assert all(t.grad is not None for name in layer._quantized for t in layer.learned(name))
    revert(layer)
    assert type(layer) is kind
    assert list(layer.state_dict()) == keys


class Final(nn.Linear):
    def __init_subclass__(cls, **_):
        raise TypeError("Final is final")


class WithKeyword(nn.Linear):
    def __init_subclass__(cls, *, registry):
        pass


class OfDict(dict, nn.Linear):
    __hash__ = object.__hash__

    def __init__(self, *sizes):
        nn.Linear.__init__(self, *sizes)


@pytest.mark.parametrize(("kind", "reason"), [(Final, "Final is final"), (WithKeyword, "registry"), (OfDict, "OfDict")])
def test_classes_that_none_can_be_derived_from(kind, reason):
    """Such a layer stays as it is, with the reason in the plan, and the layers beside it are converted."""
    net = nn.ModuleDict({"odd": kind(4, 3), "plain": nn.Linear(4, 3)})
    before = set(vars(net["odd"])), list(net["odd"].state_dict())
    (left,) = convert(net).left_alone
    assert left.name == "odd"
    assert f"no class can be derived from {kind.__name__}" in left.reason
    assert reason in left.reason
    assert (set(vars(net["odd"])), list(net["odd"].state_dict())) == before
    assert isinstance(net["plain"], Quantized)


def test_conversion_that_fails_changes_nothing(monkeypatch):
    """If the conversion of one layer raises, all layers are what they were, with their state-dict keys."""
    net = nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 3), nn.Linear(3, 2))
    convert(net[0])
    depth = net[0].bit_depth
    before = [(type(m), list(vars(m)), dict(m._buffers), m._non_persistent_buffers_set.copy()) for m in net.modules()]
    keys = list(net.state_dict())

    def calibrate(layer, name):
        if layer.__dict__["_modules"] is net[2].__dict__["_modules"]:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(convert_file.Quantized, "calibrate", calibrate)
    with pytest.raises(RuntimeError, match="out of memory"):
        convert(net)
    now = [(type(m), list(vars(m)), dict(m._buffers), m._non_persistent_buffers_set.copy()) for m in net.modules()]
    assert now == before
    assert list(net.state_dict()) == keys
    assert net[0].bit_depth is depth
    assert net[1](torch.randn(2, 1, 3))[0].shape == (2, 1, 3)
