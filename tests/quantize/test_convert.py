"""Conversion in place and its inverse: what is quantized, what is left alone and why, what stays tied."""

import copy
import inspect

import pytest
import torch
from layer_kinds import KINDS, same, tensors
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.testing import assert_close
from zoo import ZOO

from lightning_selfcompress.quantize.conversion_plan import plan_conversion, unmatched
from lightning_selfcompress.quantize.convert import as_float, convert, revert
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import (
    learned_names,
    learned_tensors,
    quantized_parameters,
    weight_name_of,
)
from lightning_selfcompress.quantize.registry import REGISTRY, supported_types

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's own remark on speed


class Block(nn.Module):
    """Attention and a small MLP."""

    def __init__(self, width=4):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, width))


class Net(nn.Module):
    """Something of everything: nested containers, a tied head, buffers, a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.position = nn.Parameter(torch.randn(5, 4))
        self.register_buffer("mask", torch.ones(5, 5))


def tied_net(first, second):
    """Two layers with one weight."""
    net = nn.ModuleDict({"first": first, "second": second})
    second.weight = first.weight
    return net


def snapshot(model):
    """Everything about a model that conversion could change, by identity."""
    return (
        [(name, type(m), set(vars(m)), m.training) for name, m in model.named_modules()],
        [(name, id(p), p._version, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        [(name, id(b)) for name, b in model.named_buffers()],
        list(model.state_dict()),
    )


def quantized_names(model):
    return [name for name, m in model.named_modules() if isinstance(m, Quantized)]


@pytest.mark.parametrize("name", KINDS)
def test_revert_is_the_inverse(name):
    """revert(convert(layer)) is the layer: same class, same attributes, same parameters and keys, same outputs."""
    layer, inputs = KINDS[name].make(), KINDS[name].inputs()
    before, expected = snapshot(layer), layer(*inputs)
    convert(layer)
    assert isinstance(layer, Quantized)
    layer(*inputs)
    revert(layer)
    assert snapshot(layer) == before
    assert same(layer(*inputs), expected)


def test_revert_of_a_whole_network():
    """revert(convert(model)) is the model, and a second revert changes nothing more."""
    net = Net()
    before = snapshot(net)
    convert(net)
    assert snapshot(net) != before
    revert(net)
    revert(net)
    assert snapshot(net) == before


def test_training_goes_on_after_revert():
    """A reverted layer trains the same float parameters, recurrent ones included."""
    layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    convert(layer)
    layer(x)
    revert(layer)
    before = layer(x)[0].detach()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(x)[0].sum().backward()
    optimizer.step()
    assert not torch.equal(layer(x)[0], before)
    assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))


def test_converting_twice_is_converting_once():
    """A converted model is left as it is by a second conversion, whatever its initial_bits; both return one plan."""
    net = Net()
    first = convert(net)
    with torch.no_grad():
        net.head.bit_depth.sub_(3)
    before, depths = snapshot(net), net.head.bit_depth.tolist()
    assert convert(net, initial_bits=4) == first
    assert snapshot(net) == before
    assert net.head.bit_depth.tolist() == depths


def test_what_is_new_is_converted_later():
    """Layers added after a conversion are converted by the next one, the others keep what they learned."""
    net = nn.Sequential(nn.Linear(3, 3))
    convert(net)
    with torch.no_grad():
        net[0].bit_depth.fill_(5)
    net.append(nn.Linear(3, 2))
    convert(net, initial_bits=4)
    assert net[0].bit_depth.tolist() == [5.0] * 3
    assert net[1].bit_depth.tolist() == [4.0] * 2


def test_planning_changes_nothing():
    """A plan is what convert carries out; making it leaves the model as it was."""
    net = Net()
    before = snapshot(net)
    plan = plan_conversion(net, skip=["blocks.1"])
    assert snapshot(net) == before
    assert convert(net, skip=["blocks.1"]) == plan


@pytest.mark.parametrize("bits", [2, 2.5, 8.0, 24])
def test_initial_bits(bits):
    """All channels start at the bit depth asked for, and no weight moves by more than half a level."""
    net = Net()
    original = copy.deepcopy(net)
    convert(net, initial_bits=bits)
    for p in quantized_parameters(net):
        assert p.raw_depth.tolist() == [bits] * p.channels
        split = p.spec.axis.split(p.latent)
        half_level = p.spec.axis.join(torch.exp2(p.spec.axis.expand(p.exponent, split) - 1).expand_as(split))
        weight = dict(original.named_parameters())[p.name]
        rounding = weight.abs() * 2**-19  # exponents to 32 are float32 numbers known to 2^-20
        assert bool(((getattr(p.layer, p.weight_name) - weight).abs() <= half_level + rounding).all())


@pytest.mark.parametrize("bits", [1.99, 24.01, 0, -8, float("nan"), float("inf")])
def test_initial_bits_out_of_range(bits):
    """A start with less than 2 or more than 24 bits is refused, with the number in the message."""
    net = Net()
    before = snapshot(net)
    with pytest.raises(ValueError, match=f"initial_bits from 2 to 24, got {bits}"):
        convert(net, initial_bits=bits)
    assert snapshot(net) == before


class TestSkip:
    """What skip leaves in float."""

    @pytest.mark.parametrize(
        ("skip", "expected"),
        [
            (
                (),
                [
                    "embed",
                    *[f"blocks.{i}.{n}" for i in "01" for n in ("attn", "attn.out_proj", "mlp.0", "mlp.2")],
                    "head",
                ],
            ),
            (
                ["blocks.0.mlp.2", "blocks.1"],
                ["embed", "blocks.0.attn", "blocks.0.attn.out_proj", "blocks.0.mlp.0", "head"],
            ),
            (
                ["blocks.*.mlp"],
                ["embed", *[f"blocks.{i}.{n}" for i in "01" for n in ("attn", "attn.out_proj")], "head"],
            ),
            (["blocks", "e*"], []),
            ("blocks", ["embed", "head"]),
            ([nn.MultiheadAttention], ["embed", *[f"blocks.{i}.mlp.{n}" for i in "01" for n in "02"], "head"]),
            ([Block], ["embed", "head"]),
            (nn.Module, []),
            ([nn.Linear], ["blocks.0.attn", "blocks.1.attn"]),
        ],
    )
    def test_by_name_container_pattern_and_type(self, skip, expected):
        """A name means the module with all inside, a pattern all modules it fits, a type all modules of it."""
        net = Net()
        plan = convert(net, skip=skip)
        assert quantized_names(net) == expected
        assert [layer.name for layer in plan.compressed] == expected

    @pytest.mark.parametrize("entry", ["blok", "block", "layers.*", nn.Conv2d])
    def test_what_matches_nothing_is_named(self, entry):
        """An entry that matches no module is refused by name, and nothing is converted."""
        net = Net()
        before = snapshot(net)
        with pytest.raises(ValueError, match=r"matches no module of Net") as error:
            convert(net, skip=["head", entry])
        assert repr(entry) in str(error.value)
        assert snapshot(net) == before

    def test_a_near_miss_is_suggested(self):
        """A misspelt name is answered with the name that was meant."""
        with pytest.raises(ValueError, match=r"'blocks\.0\.attn'"):
            plan_conversion(Net(), skip=["blocks.0.atn"])

    @pytest.mark.parametrize("entry", [3, None, nn.Linear(2, 2), torch.Tensor])
    def test_what_is_no_name_or_type_is_refused(self, entry):
        """Anything but names, patterns and module types in skip is a TypeError."""
        with pytest.raises(TypeError, match=r"Expected module names, patterns or nn\.Module types"):
            plan_conversion(Net(), skip=[entry])

    def test_unmatched_lists_what_is_not_there_yet(self):
        """Entries that match no module so far can be asked for, without an error."""
        assert unmatched(Net(), ["head", "decoder", nn.Linear, nn.Conv2d]) == ["decoder", nn.Conv2d]

    def test_a_layer_quantized_before_is_not_said_to_be_float(self):
        """The plan is true after a second conversion with another skip as well."""
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        convert(net)
        plan = convert(net, skip=["1"])
        assert [layer.name for layer in plan.compressed] == quantized_names(net)


def half_normed():
    layer = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    weight_norm(layer, "q_proj_weight")
    return layer


def holder_of(parameter):
    module = nn.Module()
    module.register_parameter("weight", parameter)
    return module


class TaggedWeight(torch.Tensor):
    """A tensor subclass, as other libraries bring them."""


def with_tagged_weight():
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.randn(4, 3).as_subclass(TaggedWeight))
    return layer


def with_attribute(name):
    layer = nn.Linear(3, 4)
    setattr(layer, name, 8)
    return layer


class ComputedWeight(nn.Linear):
    """A user's layer with a weight property of its own."""

    @property
    def weight(self):
        return 2 * self.__getattr__("weight")


def qat_linear():
    return torch.ao.nn.qat.Linear(3, 4, qconfig=torch.ao.quantization.get_default_qat_qconfig())


LEFT_ALONE = {
    "lazy": (lambda: nn.LazyLinear(4), "lazy"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), "parametrized"),
    "weight_norm": (lambda: weight_norm(nn.Conv2d(3, 4, 3)), "weight_norm"),
    "spectral_norm": (lambda: spectral_norm(nn.Linear(3, 4)), "spectral_norm"),
    "pruned": (lambda: prune.random_unstructured(nn.Linear(3, 4), "weight", 0.5), "pruning"),
    "weight_norm in an LSTM": (lambda: weight_norm(nn.LSTM(3, 4), "weight_hh_l0"), "weight_norm"),
    "pruned GRU": (lambda: prune.random_unstructured(nn.GRU(3, 4), "weight_hh_l0", 0.5), "pruning"),
    "weight_norm in attention": (half_normed, "weight_norm"),
    "qat": (qat_linear, "torch.ao"),
    "tensor subclass": (with_tagged_weight, "TaggedWeight"),
    "max_norm": (lambda: nn.Embedding(10, 4, max_norm=1.0), "max_norm"),
    "sparse": (lambda: nn.Embedding(10, 4, sparse=True), "sparse"),
    "sparse bag": (lambda: nn.EmbeddingBag(10, 4, sparse=True), "sparse"),
    "meta": (lambda: nn.Linear(3, 4, device="meta"), "meta"),
    "empty": (lambda: nn.Linear(0, 4), "empty"),
    "integers": (lambda: nn.Embedding(3, 2, _weight=torch.ones(3, 2, dtype=torch.int32), _freeze=True), "int32"),
    "own bit_depth": (lambda: with_attribute("bit_depth"), "bit_depth"),
    "own exponent": (lambda: with_attribute("exponent"), "exponent"),
    "own property": (lambda: ComputedWeight(3, 4), "property"),
    "BatchNorm": (lambda: nn.BatchNorm2d(4), "one value per channel"),
    "foreign matrix": (lambda: holder_of(nn.Parameter(torch.randn(3, 4))), "there is no quantized class for it"),
}


@pytest.mark.filterwarnings("ignore:.*(weight_norm|torch.ao|lazy|Lazy|zero-element)", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone_with_a_reason(name):
    """What cannot be quantized stays the float layer it was, and the plan says why."""
    make, reason = LEFT_ALONE[name]
    net = nn.ModuleDict({"layer": make(), "other": nn.Linear(2, 2)})
    layer = net["layer"]
    before = type(layer), set(vars(layer)), [(name, id(p)) for name, p in layer._parameters.items()]
    plan = convert(net)
    assert (type(layer), set(vars(layer)), [(name, id(p)) for name, p in layer._parameters.items()]) == before
    assert reason in {entry.name: entry.reason for entry in plan.layers}["layer"]
    assert type(net["other"]) is not nn.Linear


class TestTies:
    """Weights that several layers share."""

    @pytest.mark.parametrize(
        "net",
        [
            lambda: tied_net(nn.Embedding(10, 4), nn.Linear(4, 10)),
            lambda: tied_net(nn.Linear(4, 10), nn.Embedding(10, 4)),
            lambda: tied_net(nn.Linear(4, 4), nn.Linear(4, 4)),
            lambda: tied_net(nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 2, 3)),
        ],
    )
    def test_stay_tied(self, net):
        """Tied layers show one quantized weight, with one set of depths, counted and listed once."""
        net = net()
        weight = net["first"].weight
        plan = convert(net)
        first, second = net["first"], net["second"]
        assert first.latent("weight") is second.latent("weight") is weight
        assert first.bit_depth is second.bit_depth
        assert first.exponent is second.exponent
        assert torch.equal(first.weight, second.weight)
        assert [p.name for p in quantized_parameters(net)] == ["first.weight"]
        assert sum(layer.numel for layer in plan.compressed) == weight.numel()
        with torch.no_grad():
            first.bit_depth[0] = 0
        assert torch.equal(first.weight, second.weight)
        revert(net)
        assert first.weight is second.weight is weight

    def test_learn_from_both_uses(self):
        """A tied weight's depths get the sum of the gradients of all its uses."""
        net = tied_net(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
        convert(net, initial_bits=2.4)
        out = net["second"](net["first"](torch.arange(10)))
        value = net["first"].weight.detach().requires_grad_()
        (value @ value.t()).square().sum().backward()
        net["first"].weight.backward(value.grad)
        expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        net.zero_grad()
        out.square().sum().backward()
        assert_close([p.grad for p in net.parameters() if p.grad is not None], expected)

    def test_a_shared_module_is_one_layer(self):
        """A module registered under two names is converted once and stays the same object under both."""
        shared = nn.Linear(4, 4)
        net = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
        plan = convert(net)
        assert net["a"] is net["b"][0] is shared
        assert [layer.name for layer in plan.layers] == ["a"]
        assert len(list(quantized_parameters(net))) == 1
        assert convert(nn.ModuleDict({"a": shared, "b": shared}), skip=()).compressed[0].numel == 16

    def test_skip_by_either_name_of_a_shared_module(self):
        """A module registered under two names can be left out by each of them."""
        for name in ("a", "b"):
            shared = nn.Linear(4, 4)
            convert(nn.ModuleDict({"a": shared, "b": shared}), skip=[name])
            assert type(shared) is nn.Linear

    def test_tied_to_a_skipped_layer(self):
        """A layer whose weight a skipped one uses in float is left alone, with that layer's name as the reason."""
        net = Net()
        plan = convert(net, skip=["head"])
        reasons = {layer.name: layer.reason for layer in plan.left_alone}
        assert "tied to 'head.weight'" in reasons["embed"]
        assert type(net.embed) is nn.Embedding
        assert net.embed.weight is net.head.weight

    def test_tied_to_a_foreign_module(self):
        """A layer whose weight a module of another kind uses is left alone, and so is what is tied to it in turn."""
        net = nn.ModuleDict({"layer": nn.MultiheadAttention(4, 2, kdim=3, vdim=5), "other": nn.Linear(4, 4)})
        net["other"].weight = net["layer"].q_proj_weight
        net["foreign"] = holder_of(net["layer"].k_proj_weight)
        plan = convert(net)
        reasons = {layer.name: layer.reason for layer in plan.left_alone}
        assert [layer.name for layer in plan.compressed] == ["layer.out_proj"]
        assert "tied to 'foreign.weight'" in reasons["layer"]
        assert "tied to 'layer.q_proj_weight'" in reasons["other"]

    @pytest.mark.parametrize("before", ["first", "second"])
    def test_tied_to_a_layer_converted_before(self, before):
        """A layer tied to one that was converted earlier takes over its depths, along that layer's channels."""
        net = tied_net(nn.Embedding(10, 4), nn.Linear(4, 10))
        convert(net[before], initial_bits=4)
        convert(net)
        assert net["first"].bit_depth is net["second"].bit_depth
        assert net["first"].bit_depth.tolist() == [4.0] * (4 if before == "first" else 10)
        assert torch.equal(net["first"].weight, net["second"].weight)

    def test_survive_a_copy(self):
        """A deep copy of a model with tied weights is tied within itself."""
        net = tied_net(nn.Embedding(10, 4), nn.Linear(4, 10))
        convert(net)
        other = copy.deepcopy(net)
        assert other["first"].bit_depth is other["second"].bit_depth
        assert other["first"].latent("weight") is other["second"].latent("weight")
        assert other["first"].bit_depth is not net["first"].bit_depth


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value):
    """NaN or infinite weights are refused by name, and the model is unchanged."""
    net = Net()
    net.blocks[1].mlp[2].weight.data[1, 2] = value
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"'blocks\.1\.mlp\.2\.weight'"):
        convert(net)
    assert snapshot(net) == before
    convert(net, skip=["blocks.1.mlp.2"])
    assert type(net.blocks[1].mlp[2]) is nn.Linear


def test_weights_of_zeros():
    """A layer of zeros, as residual branches start with, keeps its function, learns, and has room for usual weights."""
    layer = nn.Linear(16, 4, bias=False)
    nn.init.zeros_(layer.weight)
    convert(layer)
    x = torch.randn(3, 16)
    assert not bool(layer(x).any())
    layer(x).sum().backward()
    assert bool(layer.latent("weight").grad.all())
    largest = torch.exp2(layer.exponent.detach()) * 127
    assert bool(((largest >= 0.25) & (largest < 0.25 * 2 ** (1 / 16))).all())  # 1 / sqrt(16), as usually drawn


class TestAsFloat:
    """The float network for code that must not notice."""

    def test_within_it_is_the_float_network(self):
        """Within the context types, keys and parameters are those before conversion; after it all is as it was."""
        net = Net()
        before = snapshot(net)
        convert(net)
        converted = snapshot(net)
        with as_float(net):
            assert snapshot(net) == before
        assert snapshot(net) == converted

    def test_after_an_exception(self):
        """The model is quantized again when the code inside fails, and the failure passes through."""
        net = Net()
        convert(net)
        converted = snapshot(net)
        with pytest.raises(RuntimeError, match="inside"), as_float(net):
            raise RuntimeError("inside")
        assert snapshot(net) == converted

    @pytest.mark.parametrize("name", KINDS)
    def test_outputs(self, name):
        """Every kind of layer computes in float inside and with the same quantized weights after it."""
        layer, inputs = KINDS[name].make(), KINDS[name].inputs()
        in_float = tensors(layer(*inputs))
        convert(layer, initial_bits=3)
        quantized = tensors(layer(*inputs))
        assert not same(quantized, in_float)
        with as_float(layer):
            assert same(layer(*inputs), in_float)
        assert same(layer(*inputs), quantized)

    def test_changes_inside_count(self):
        """Weights changed inside are those that are quantized afterwards."""
        layer = nn.Linear(3, 4)
        convert(layer)
        layer.weight.sum().item()
        with as_float(layer):
            layer.weight.data.zero_()
        assert not bool(layer.weight.any())

    def test_a_float_model(self):
        """A model without quantized layers passes through."""
        net = Net()
        before = snapshot(net)
        with as_float(net):
            assert snapshot(net) == before
        assert snapshot(net) == before


class TestPrinting:
    """The plan as text."""

    def test_names_kinds_and_reasons(self):
        """Printed, a plan counts layers by kind, and lists what stays in float with names, values and reason."""
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
        assert str(plan_conversion(net, skip=[nn.Linear])) == (
            "Compressed: 180 weights in 2 layers (2 Conv2d)\n"
            "Left in float:\n"
            "  1 BatchNorm2d ('1'; 8 values): one value per channel, no weight matrix\n"
            "  1 Linear ('4'; 10 values): skip='Linear'"
        )

    def test_is_the_same_after_conversion(self):
        """Kinds are the user's classes, before conversion and after."""
        net = Net()
        before = str(plan_conversion(net))
        convert(net)
        assert str(plan_conversion(net)) == before
        assert "Quantized" not in before

    def test_loose_parameters_have_their_names(self):
        """A parameter that is in no layer is named, whether it lies in a module with others or in a list of torch."""
        net = nn.Module()
        net.pos, net.lin = nn.Parameter(torch.zeros(48, 16)), nn.Linear(4, 4)
        assert "  parameter 'pos', 768 values: there is no quantized class" in str(plan_conversion(net))
        net.rows = nn.ParameterList([nn.Parameter(torch.zeros(3, 3)) for _ in range(3)])
        text = str(plan_conversion(net))
        assert "  4 parameters ('pos', 'rows.0', 'rows.1', ...; 795 values): there is no quantized class" in text
        assert "ParameterList" not in text

    def test_kinds_are_public(self):
        """A class that torch has for itself is named as the public one it is derived from."""
        plan = plan_conversion(nn.TransformerEncoderLayer(8, 2), skip=["self_attn"])
        assert "  1 Linear ('self_attn.out_proj'; 72 values): skip='self_attn'" in str(plan)

    def test_long_lists_are_cut(self):
        """Of many modules left alone for one reason three are named."""
        net = nn.Sequential(*[nn.LayerNorm(2) for _ in range(5)])
        assert "  5 LayerNorm ('0', '1', '2', ...; 20 values): one value" in str(plan_conversion(net))

    def test_nothing_to_compress(self):
        """A model without any layer to quantize says so."""
        assert str(convert(nn.ReLU())) == "Compressed: 0 weights in 0 layers"

    def test_supported_types_come_from_the_registry(self):
        """Messages list the types of the registry, all of them."""
        assert supported_types().split(", ") == [t.__name__ for t in REGISTRY]
        assert all(inspect.isclass(t) for t in REGISTRY)


def test_the_layers_own_module_may_be_the_model():
    """A single layer is a model: it converts, plans and reverts like any other."""
    layer = nn.Linear(3, 4)
    assert [entry.name for entry in convert(layer).compressed] == [""]
    assert [p.name for p in quantized_parameters(layer)] == ["weight"]


def test_half_precision_models_get_float32_depths():
    """Depths and exponents are float32 for bfloat16 weights and float64 for float64 ones."""
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        layer = nn.Linear(3, 4, dtype=dtype)
        convert(layer)
        assert (layer.bit_depth.dtype, layer.exponent.dtype) == (expected, expected)
        assert layer.weight.dtype == dtype


def test_frozen_weights_stay_frozen():
    """Conversion does not unfreeze: a latent weight keeps its requires_grad."""
    layer = nn.Linear(3, 4).requires_grad_(False)
    convert(layer)
    assert not layer.latent("weight").requires_grad
    assert not layer.bias.requires_grad


@pytest.mark.parametrize("name", ZOO)
def test_parameters_are_the_same_list(name):
    """Conversion adds no parameter, and neither does revert: the same objects in the same order."""
    net = ZOO[name].make()
    before = list(net.named_parameters())
    for change in (convert, revert, convert):
        change(net)
        now = list(net.named_parameters())
        assert [n for n, _ in now] == [n for n, _ in before]
        assert all(p is q for (_, p), (_, q) in zip(now, before, strict=True))
    assert len(learned_tensors(net)) == 2 * len(list(quantized_parameters(net)))


@pytest.mark.parametrize("weight", ["weight", "net.0.weight", "rnn.weight_ih_l0", "attn.in_proj_weight", "a.weight_hh"])
def test_names_of_depths_are_put_together_and_taken_apart(weight):
    """The weight of the name of its depths is the weight; other names are no depths."""
    depth, exponent = learned_names(weight)
    assert weight_name_of(depth) == weight
    assert depth.endswith("bit_depth")
    assert exponent.endswith("exponent")
    assert weight_name_of(weight) is weight_name_of(exponent) is None


@pytest.mark.parametrize("move", ["double", "half", "bfloat16", "cpu"])
def test_what_is_learned_keeps_its_identity_when_moved(move):
    """An optimizer of depths and exponents goes on after a cast, as it does with parameters."""
    layer = nn.Linear(3, 2)
    convert(layer)
    before = layer.learned("weight")
    layer(torch.randn(4, 3)).sum().backward()
    getattr(layer, move)()
    assert all(a is b and a.is_leaf and a.requires_grad for a, b in zip(layer.learned("weight"), before, strict=True))
    assert layer.bit_depth.dtype == (torch.float64 if move == "double" else torch.float32)
    assert layer.bit_depth.grad.dtype == layer.bit_depth.dtype


def test_assigned_state_is_trained():
    """load_state_dict(assign=True) puts other tensors in place, which are trained like those before."""
    layer, other = nn.Linear(3, 2), nn.Linear(3, 2)
    convert(layer)
    convert(other)
    other.bit_depth.data.fill_(5.0)
    layer.load_state_dict(other.state_dict(), assign=True)
    assert layer.bit_depth.tolist() == [5.0, 5.0]
    layer(torch.randn(4, 3)).sum().backward()
    assert all(t.grad is not None for t in layer.learned("weight"))
