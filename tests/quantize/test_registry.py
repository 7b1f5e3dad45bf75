"""Layers whose axes are told: by ``register_layer`` for a class, by ``axes`` for a weight of one network."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_selfcompress import ChannelAxis, convert, plan_conversion, register_layer, revert
from lightning_selfcompress.quantize.layers import Quantized


class Columns(nn.Module):
    """A layer with a weight ``(inputs, outputs)``."""

    def __init__(self, inputs=4, outputs=3):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


def fresh():
    """A class that nothing was told of."""
    return type("Fresh", (Columns,), {})


class Told(Columns):
    """A class that is registered at the end of this file, as a user does it below the class."""


class Derived(Told):
    """A subclass of a registered class."""


class TestRegistered:
    """Layers of a registered class."""

    def test_become_quantized_layers_and_come_back(self):
        """A registered layer is converted along the axis told, computes the float function, and reverts exactly."""
        layer, x = Told(), torch.randn(5, 4)
        expected, weight, keys = layer(x), layer.weight, list(layer.state_dict())
        convert(layer)
        assert isinstance(layer, Quantized)
        assert layer.bit_depth.shape == (3,)
        assert_close(layer(x), expected, atol=0.1, rtol=0)
        revert(layer)
        assert type(layer) is Told
        assert layer.weight is weight
        assert list(layer.state_dict()) == keys

    def test_of_a_subclass(self):
        """A registration counts for subclasses."""
        assert convert(Derived()).compressed[0].weights == (("weight", ChannelAxis(1)),)

    def test_are_copied_and_pickled(self):
        """Copies and pickles of a registered layer are quantized layers."""
        layer, x = convert(Told()).model, torch.randn(5, 4)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), layer(x))

    def test_numbers_and_names_that_are_none_of_python(self):
        """An axis may be a number, and the name of a parameter any text."""

        class Matrices(nn.ParameterList):
            pass

        register_layer(Matrices, {"0": 1, "1": ChannelAxis(0)})
        layer = Matrices([torch.randn(4, 3), torch.randn(2, 5)])
        convert(layer)
        assert [layer.learned(name)[0].numel() for name in ("0", "1")] == [3, 2]
        assert torch.equal(layer[1], layer._quantized_weight("1"))

    def test_more_than_the_base_says(self):
        """A registration adds weights to those of a base that torch defines, and may say otherwise of one."""

        class Adapted(nn.Linear):
            def __init__(self):
                super().__init__(4, 3)
                self.down = nn.Parameter(torch.randn(4, 2))

        register_layer(Adapted, down=1)
        assert dict(convert(Adapted()).compressed[0].weights) == {"down": ChannelAxis(1), "weight": ChannelAxis(0)}

        class Turned(nn.Linear):
            pass

        register_layer(Turned, weight=1)
        assert dict(convert(Turned(4, 3)).compressed[0].weights) == {"weight": ChannelAxis(1)}

    def test_weight_that_is_none(self):
        """A parameter that a layer does not have, since it is None, is no weight."""
        kind = fresh()
        register_layer(kind, weight=1, gate=0)
        layer = kind()
        layer.register_parameter("gate", None)
        assert dict(convert(layer).compressed[0].weights) == {"weight": ChannelAxis(1)}

    def test_state_dict_holds_the_axis(self):
        """A state dict tells the axis of a weight whose type torch does not define, and refuses another one."""
        layer = convert(Told()).model
        state = layer.state_dict()
        assert state["channel_axis"].tolist() == [1.0, 1.0]
        assert "channel_axis" not in convert(nn.Linear(3, 3)).model.state_dict()
        layer.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"'channel_axis' to be ChannelAxis\(dim=1.*got ChannelAxis\(dim=0"):
            layer.load_state_dict(state | {"channel_axis": torch.tensor([0.0, 1.0])})


WRONG_CALLS = {
    "an object": (lambda: register_layer(Columns(), weight=1), TypeError, "subclass of nn.Module.*got Columns"),
    "no module class": (lambda: register_layer(dict, weight=1), TypeError, "subclass of nn.Module.*dict"),
    "no parameter": (lambda: register_layer(fresh()), ValueError, r"register_layer\(Fresh, \.\.\.\) to name param"),
    "text": (lambda: register_layer(fresh(), weight="rows"), TypeError, r"register_layer\(Fresh, weight=.*'rows'"),
    "a flag": (lambda: register_layer(fresh(), weight=True), TypeError, "got True"),
    "negative": (lambda: register_layer(fresh(), weight=-1), ValueError, r"Fresh, weight=.*dim=-1"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_registration(name):
    """What no layer could have is refused at once, naming the class."""
    call, error, message = WRONG_CALLS[name]
    with pytest.raises(error, match=message):
        call()


def test_two_registrations():
    """The same registration may be made twice; one that disagrees is refused, and the first one stays."""
    kind = fresh()
    register_layer(kind, weight=1)
    register_layer(kind, {"weight": ChannelAxis(1)})
    with pytest.raises(ValueError, match=r"one registration of Fresh, got two that disagree.*dim=1.*dim=0"):
        register_layer(kind, weight=0)
    assert convert(kind()).compressed[0].weights == (("weight", ChannelAxis(1)),)


class Bare(nn.Module):
    """A layer without parameters."""


@pytest.mark.parametrize(
    ("base", "axes", "message"),
    [
        (Bare, {"weight": 0}, "parameter 'weight' in each Fresh.*whose parameters are: none"),
        (Columns, {"kernel": 0}, "parameter 'kernel' in each Fresh.*whose parameters are: 'weight'"),
        (Columns, {"weight": 2}, r"register_layer\(Fresh, weight=...\).*dim=2.*\(4, 3\)"),
        (Columns, {"weight": ChannelAxis(1, groups=3)}, r"register_layer\(Fresh, weight=.*groups=3.*\(4, 3\)"),
    ],
)
def test_registration_that_does_not_fit_a_layer(base, axes, message):
    """A registration that a layer contradicts is an error of the conversion, which changes nothing."""
    kind = type("Fresh", (base,), {})
    register_layer(kind, axes)
    net = nn.Sequential(nn.Linear(3, 3), kind())
    with pytest.raises(ValueError, match=message):
        convert(net)
    assert type(net[0]) is nn.Linear


class TestAxes:
    """Axes that are told for the weights of one network."""

    def test_of_one_layer(self):
        """An axis by a weight's name converts this layer alone."""
        net = nn.Sequential(Columns(), Columns(3, 3))
        plan = convert(net, axes={"0.weight": ChannelAxis(1), "1.weight": "is left by choice"})
        assert [layer.name for layer in plan.compressed] == ["0"]
        assert [layer.reason for layer in plan.left_alone] == ["weight is left by choice"]

    def test_of_a_layer_that_is_quantized_already(self):
        """A weight that is told later joins the quantized weights of its layer, which keep their depths."""
        layer = nn.Linear(4, 3)
        layer.down = nn.Parameter(torch.randn(4, 2))
        convert(layer)
        with torch.no_grad():
            layer.bit_depth.fill_(5.0)
        depth = layer.bit_depth
        convert(layer, axes={"down": ChannelAxis(1)})
        assert layer.bit_depth is depth
        assert [layer.learned(n)[0].tolist() for n in ("weight", "down")] == [[5.0] * 3, [8.0] * 2]
        assert type(revert(layer)) is nn.Linear

    def test_of_experts(self):
        """Experts along dimension 0 have depths for each of their channels."""
        net = nn.ParameterDict({"experts": nn.Parameter(torch.randn(4, 3, 5))})
        convert(net, axes={"experts": ChannelAxis(1, groups=4)})
        with torch.no_grad():
            net.experts_bit_depth[3 * 2 + 1] = 0.0  # of expert 2
        assert [bool(row.any()) for row in net["experts"].flatten(0, 1)] == [i != 7 for i in range(12)]

    def test_of_no_parameter(self):
        """A name that is none of a parameter is refused, with one that is near."""
        with pytest.raises(ValueError, match=r"axes\['0.wieght'\] is of no parameter of Sequential.*'0.weight'"):
            plan_conversion(nn.Sequential(Columns()), axes={"0.wieght": ChannelAxis(1)})

    def test_out_of_range(self):
        """An axis that a parameter does not have is refused."""
        with pytest.raises(ValueError, match=r"axes\['0.weight'\].*dim=2.*\(4, 3\)"):
            plan_conversion(nn.Sequential(Columns()), axes={"0.weight": ChannelAxis(2)})


register_layer(Told, weight=ChannelAxis(dim=1))
