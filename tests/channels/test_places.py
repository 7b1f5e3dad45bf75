"""The reasons for which channels stay name the module that needs them, and what it needs."""

import pytest
import torch
from killing import converted, reason, watched
from torch import nn
from zoo import ZOO


class Post(nn.Module):
    """A residual stream whose normalization stands behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm1, self.last = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.norm1(x + self.inner(x))
        return x + self.last(x)


class Squeezed(nn.Module):
    def forward(self, x):
        return x.softmax(-1)


def reasons(net: nn.Module, *inputs) -> dict[str, str]:
    """Why the channels of each layer stay."""
    channels, watcher = watched(converted(net), *inputs)
    assert watcher.failures == []
    layers = [s.name.removesuffix(".bit_depth") for s in channels.slots if s.produces and s.name.endswith(".bit_depth")]
    return {layer: reason(channels, layer) for layer in layers}


def test_a_normalization_keeps_the_stream():
    """Every layer that adds to a stream stays for the first module that needs the stream as a whole."""
    net = nn.Sequential(nn.Linear(5, 6), Post(), Post(), nn.Linear(6, 3))
    found = reasons(net, torch.randn(4, 5, dtype=torch.float64))
    why = "LayerNorm at 1.norm1 needs every channel of the residual stream"
    assert {found[layer] for layer in ("0", "1.inner", "1.last", "2.inner", "2.last")} == {why}
    assert found["3"] == "it is an output of the network"


REASONS = {
    "one layer": (nn.LayerNorm(6), "LayerNorm at 1 needs every channel of its input"),
    "code of a module": (Squeezed(), "softmax in Squeezed at 1 needs every channel of its input"),
    "not zero": (nn.Sigmoid(), "Linear at 2 sums over it, and Sigmoid at 1 leaves it other than zero when it is dead"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_name_the_module(name):
    """A reason names the layer, or the module whose code it is, and what it needs."""
    body, why = REASONS[name]
    found = reasons(nn.Sequential(nn.Linear(5, 6), body, nn.Linear(6, 3)), torch.randn(4, 5, dtype=torch.float64))
    assert found["0"] == why


@pytest.mark.parametrize("name", ["vit", "char_transformer"])
def test_the_stream_of_transformers(name):
    """What stays of a transformer stays for its normalization, not for what happens to be added to it."""
    net, inputs = ZOO[name].make(), ZOO[name].inputs()
    found = reasons(net, *(t.double() if t.is_floating_point() else t for t in inputs))
    assert any("needs every channel of the residual stream" in why for why in found.values())
    assert not any("of a fixed size" in why for why in found.values())


def test_an_exception_forgets_the_places():
    """Where a module raises and its caller goes on, later reasons name the caller."""

    class Raises(nn.Module):
        def forward(self, x):
            raise KeyError

    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raises = Raises()

        def forward(self, x):
            try:
                return self.raises(x)
            except KeyError:
                return x.softmax(-1)

    found = reasons(nn.Sequential(nn.Linear(5, 6), Tries(), nn.Linear(6, 3)), torch.randn(4, 5, dtype=torch.float64))
    assert found["0"] == "softmax in Tries at 1 needs every channel of its input"


def test_no_hook_is_left():
    """Watching leaves no hook on any module."""
    net = converted(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)))
    watched(net, torch.randn(4, 5, dtype=torch.float64))
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called for m in net.modules())
