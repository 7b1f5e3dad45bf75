"""Quantized layers: one contract for every kind, and what holds for some."""

import copy
import io
import pickle

import pytest
import torch
from layer_kinds import KINDS, same, tensors
from networks import trained_tensors
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_selfcompress.quantize import layers
from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.quantize.formula import bit_depth, q, q_composite, quantize
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.quantize.quantized_class import quantized_class
from lightning_selfcompress.quantize.registry import REGISTRY

# torch's own remarks on LSTMs with projections and on ways of tracing that users still take
pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections", "ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
RECURRENT = {name for name in KINDS if isinstance(KINDS[name].make(), nn.RNNBase)}
ONE_WEIGHT = {
    name for name in KINDS if "weight" in KINDS[name].make()._parameters
}  # q's rows are the output's channels


def loss(out):
    return sum(t.square().sum() for t in tensors(out))


def quantized_by_hand(p, function=q, inputs=None):
    """The value that the layer must show for the weight ``p``."""
    x, b, e = inputs or (p.latent, p.raw_depth, p.exponent)
    split = p.spec.axis.split(x)
    depth, exponent = p.spec.axis.expand(bit_depth(b), split), p.spec.axis.expand(e, split)
    return p.spec.axis.join(function(split, depth, exponent))


def half_level(p):
    """Half the step between levels, for each weight."""
    split = p.spec.axis.split(p.latent.detach())
    return p.spec.axis.join(torch.exp2(p.spec.axis.expand(p.exponent.detach(), split) - 1).expand_as(split))


def converted(layer, raw_depth=None):
    """The layer, converted in place; with ``raw_depth``, at about that many bits and with about half of it clipped."""
    convert(layer, initial_bits=8)
    for p in quantized_parameters(layer):
        if raw_depth is not None:
            with torch.no_grad():
                p.raw_depth.uniform_(raw_depth, raw_depth + 1)
                p.exponent.add_(7 - p.raw_depth)
    return layer


def float_twin(float_layer, layer):
    """A copy of the float layer whose weights are what ``layer`` shows."""
    twin = copy.deepcopy(float_layer)
    for p in quantized_parameters(layer):
        twin.get_parameter(p.name).data.copy_(quantized_by_hand(p))
    return twin


def double(inputs):
    """The same inputs in float64."""
    if isinstance(inputs, tuple):
        return tuple(double(t) for t in inputs)
    return inputs.double() if inputs.is_floating_point() else inputs


def saved_and_loaded(layer):
    """What torch.save and torch.load make of a whole layer."""
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def grads(layer):
    """The gradients at hand, by name."""
    return {name: p.grad.clone() for name, p in trained_tensors(layer).items() if p.grad is not None}


def gradients(layer, inputs, call=None):
    """Gradients of the loss for one batch, by parameter; of ``call`` where it stands for the layer."""
    layer.zero_grad()
    loss((layer if call is None else call)(*inputs)).backward()
    return grads(layer)


def changed_as_often(parameter):
    """Another parameter in the same memory, with other values and as many changes on its counter."""
    other = nn.Parameter(parameter.data)
    while other._version < parameter._version:
        other.mul_(1.5)
    return other


def count_calls(monkeypatch):
    """A list that grows by one with each quantized weight that is computed."""
    calls = []
    monkeypatch.setattr(layers, "quantize", lambda *args: calls.append(1) or quantize(*args))
    return calls


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def test_every_registered_type_is_under_contract():
    """A type added to the registry needs a row in the table above."""
    assert {t for t in REGISTRY if not any(isinstance(k.make(), t) for k in KINDS.values())} == set()


class TestContract:
    """What every quantized layer promises, whatever its kind."""

    def test_starts_as_the_float_layer_rounded_to_8_bits(self, kind):
        """After conversion a layer is its float twin with every weight rounded by at most half a level, to the bit."""
        layer, inputs = kind.make(), kind.inputs()
        original = copy.deepcopy(layer)
        found = list(quantized_parameters(converted(layer)))
        assert found != []
        for p in found:
            weight, value = original.get_parameter(p.name), getattr(p.layer, p.weight_name)
            assert torch.equal(p.latent, weight)
            assert torch.equal(value, quantized_by_hand(p))
            assert bool(((value - weight).abs() <= half_level(p) * (1 + 1e-4)).all())  # 128 levels in float32
            assert p.raw_depth.tolist() == [8.0] * p.channels
        twin = float_twin(original, layer)
        assert same(layer(*inputs), twin(*inputs))
        with torch.no_grad():
            assert same(layer.eval()(*inputs), twin.eval()(*inputs))

    def test_gradients_are_those_of_the_formula(self, kind):
        """Latent weights, depths and exponents learn what autograd derives for the float layer fed with q."""
        layer, inputs = kind.make().double(), double(kind.inputs())
        original = copy.deepcopy(layer)
        actual = gradients(converted(layer, raw_depth=2.4), inputs)
        learned, weights = {}, {}
        for p in quantized_parameters(layer):
            learned[p.name] = [t.detach().clone().requires_grad_() for t in (p.latent, p.raw_depth, p.exponent)]
            weights[p.name] = quantized_by_hand(p, q_composite, learned[p.name])
        loss(functional_call(original, weights, inputs)).backward()
        for p in quantized_parameters(layer):
            for own, expected in zip((p.latent, p.raw_depth, p.exponent), learned[p.name], strict=True):
                assert bool(expected.grad.any())
                assert_close(own.grad, expected.grad, rtol=1e-9, atol=1e-10)
        for name, parameter in original.named_parameters():
            if name not in weights:
                assert_close(actual[name], parameter.grad, rtol=1e-9, atol=1e-10)

    def test_a_copy_is_the_same_and_stands_alone(self, kind):
        """A deep copy and a pickled one compute the same, under the same class, and share no memory."""
        layer, inputs = converted(kind.make(), raw_depth=2.4), kind.inputs()
        expected = layer(*inputs)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), saved_and_loaded(layer)):
            assert type(other) is type(layer)
            assert same(other(*inputs), expected)
            for p in quantized_parameters(other):
                with torch.no_grad():
                    p.raw_depth.zero_()
                assert not bool(getattr(p.layer, p.weight_name).any())
            assert same(layer(*inputs), expected)

    def test_state_dict_round_trip(self, kind):
        """A state dict holds all of a layer: its float keys in their order, and depths and exponents besides."""
        layer, inputs = kind.make(), kind.inputs()
        float_keys = list(layer.state_dict())
        converted(layer, raw_depth=2.4)
        state = layer.state_dict()
        added = {key for key in state if key.endswith(("bit_depth", "exponent"))}
        assert [key for key in state if key not in added] == float_keys
        for assign in (False, True):
            other = converted(kind.make())
            other(*inputs)
            other.load_state_dict(copy.deepcopy(state), assign=assign)
            assert same(other(*inputs), layer(*inputs))

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("assign", [True, False])
    def test_a_float_checkpoint_starts_anew(self, kind, strict, assign):
        """The state of a float network loads without a missing key and starts from that network's function."""
        trained, inputs = kind.make(), kind.inputs()
        layer = converted(kind.make(), raw_depth=2.4)
        layer(*inputs)
        result = layer.load_state_dict(copy.deepcopy(trained.state_dict()), strict=strict, assign=assign)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert same(layer(*inputs), converted(trained)(*inputs))

    def test_half_a_checkpoint_is_refused(self, kind):
        """A state with depths but without exponents is not taken for a float one: the missing keys are named."""
        layer = converted(kind.make())
        state = {key: value for key, value in layer.state_dict().items() if not key.endswith("exponent")}
        with pytest.raises(RuntimeError, match="exponent"):
            layer.load_state_dict(state)

    def test_compiles_whole(self, kind):
        """torch.compile takes a layer whole, with the same values and gradients, wherever it takes the float one."""
        if isinstance(kind.make(), nn.RNNBase):
            pytest.skip("torch.compile breaks the graph at every RNN")
        layer, inputs = converted(kind.make()), kind.inputs()
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert same(compiled(*inputs), layer(*inputs))
        assert_close(gradients(layer, inputs, compiled), gradients(layer, inputs))

    def test_is_traced_and_exported(self, kind):
        """torch.jit.trace and torch.export record the quantized weights."""
        layer, inputs = converted(kind.make(), raw_depth=2.4).eval(), kind.inputs()
        expected = tensors(layer(*inputs))
        traced = torch.jit.trace(layer, inputs)
        exported = torch.export.export(layer, inputs, strict=False).module()
        assert_close(tensors(traced(*inputs)), expected)
        assert_close(tensors(exported(*inputs)), expected)

    def test_functional_call(self, kind):
        """Parameters handed in from outside are quantized like the layer's own, and get the same gradients."""
        layer, inputs = converted(kind.make().double(), raw_depth=2.4), double(kind.inputs())
        handed_in = {name: p.detach().clone().requires_grad_() for name, p in trained_tensors(layer).items()}
        out = functional_call(layer, handed_in, inputs)
        assert same(out, layer(*inputs))
        loss(out).backward()
        for name, expected in gradients(layer, inputs).items():
            assert_close(handed_in[name].grad, expected, rtol=1e-9, atol=1e-10)

    def test_hooks_and_references_survive(self, kind):
        """Hooks fire as before, and who holds the layer or its parameters holds them still."""
        layer, inputs, fired = kind.make(), kind.inputs(), []
        layer.register_forward_pre_hook(lambda *_: fired.append("before"))
        layer.register_forward_hook(lambda *_: fired.append("after"))
        held = [layer], dict(layer.named_parameters())
        for parameter in held[1].values():
            parameter.register_hook(lambda *_: fired.append("gradient"))
        converted(layer)
        loss(layer(*inputs)).backward()
        assert isinstance(held[0][0], Quantized)
        now = dict(layer.named_parameters())
        assert all(now[name] is p for name, p in held[1].items())
        assert fired.count("before") == fired.count("after") == 1
        assert fired.count("gradient") == len([p for p in held[1].values() if p.grad is not None])

    def test_backward_passes_add_up(self, kind):
        """Two forwards before two backwards, or one after the other: the gradients are the sum of both."""
        layer, first, second = converted(kind.make().double(), 2.4), double(kind.inputs()), double(kind.inputs())
        one, two = gradients(layer, first), gradients(layer, second)
        expected = {name: one[name] + two[name] for name in one}
        layer.zero_grad()
        outs = [layer(*first), layer(*second)]
        for out in outs:
            loss(out).backward()
        assert_close(grads(layer), expected)
        layer.zero_grad()
        for inputs in (first, second):
            loss(layer(*inputs)).backward()
        assert_close(grads(layer), expected)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_activation_checkpointing(self, kind, use_reentrant):
        """Recomputing the forward during backward changes no gradient."""
        layer, inputs = converted(kind.make().double(), raw_depth=2.4), double(kind.inputs())
        expected = gradients(layer, inputs)
        inputs = tuple(t.requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs)
        if use_reentrant and not any(torch.is_tensor(t) and t.requires_grad for t in inputs):
            pytest.skip("reentrant checkpointing needs an input with a gradient")

        def recomputed(*inputs):
            # reentrant checkpointing does not look into nested tuples
            return checkpoint(lambda *args: tuple(tensors(layer(*args))), *inputs, use_reentrant=use_reentrant)

        assert_close(gradients(layer, inputs, recomputed), expected)

    def test_training_goes_on_after_inference_mode(self, kind):
        """A forward in inference mode leaves nothing behind that training could trip over."""
        layer, inputs = converted(kind.make(), raw_depth=2.4), kind.inputs()
        expected = gradients(copy.deepcopy(layer), inputs)
        with torch.inference_mode():
            inferred = tensors(layer(*inputs))
        assert_close([t.clone() for t in inferred], [t.detach() for t in tensors(layer(*inputs))])
        assert_close(gradients(layer, inputs), expected)

    def test_a_layer_made_in_inference_mode_works(self, kind):
        """A network converted and used under inference_mode computes what it computes outside."""
        with torch.inference_mode():
            layer, inputs = converted(kind.make(), raw_depth=2.4), kind.inputs()
            weights = {
                p.name: (getattr(p.layer, p.weight_name), quantized_by_hand(p)) for p in quantized_parameters(layer)
            }
            assert all(torch.equal(actual, expected) for actual, expected in weights.values())
            assert all(bool(torch.isfinite(t).all()) for t in tensors(layer(*inputs)))

    def test_depths_outlive_a_cast(self, kind):
        """Cast to bfloat16 and back, depths and exponents stay the same float32 parameters with the same values."""
        layer = converted(kind.make(), raw_depth=2.4)
        before = [
            (p.raw_depth, p.exponent, p.raw_depth.tolist(), p.exponent.tolist()) for p in quantized_parameters(layer)
        ]
        layer.to(torch.bfloat16)
        for p, (raw_depth, exponent, depths, exponents) in zip(quantized_parameters(layer), before, strict=True):
            assert p.raw_depth is raw_depth
            assert p.exponent is exponent
            assert (p.latent.dtype, p.raw_depth.dtype, p.exponent.dtype) == (
                torch.bfloat16,
                torch.float32,
                torch.float32,
            )
            assert (p.raw_depth.tolist(), p.exponent.tolist()) == (depths, exponents)
            assert torch.equal(getattr(p.layer, p.weight_name), quantized_by_hand(p))
            assert getattr(p.layer, p.weight_name).dtype == torch.bfloat16
        layer.float()
        assert [p.raw_depth.tolist() for p in quantized_parameters(layer)] == [depths for _, _, depths, _ in before]

    def test_double(self, kind):
        """After .double() the layer computes in float64, with the gradients of one that was converted in float64."""
        layer, inputs = kind.make(), double(kind.inputs())
        original = copy.deepcopy(layer).double()
        converted(layer).double()
        assert same(layer(*inputs), float_twin(original, layer)(*inputs))
        assert {g.dtype for g in gradients(layer, inputs).values()} == {torch.float64}


@pytest.mark.parametrize("name", sorted(ONE_WEIGHT))
def test_a_channel_without_bits_is_silent(name):
    """Depth 0 zeroes exactly the weights that output channel i is made of; what it still puts out is its bias."""
    layer, inputs = KINDS[name].make(), KINDS[name].inputs()
    original, without_weights = copy.deepcopy(layer), copy.deepcopy(layer)
    without_weights.weight.data.zero_()
    before = converted(layer).weight.detach().clone()
    dim = 1 if hasattr(layer, "kernel_size") else -1
    assert layer.bit_depth.numel() == original(*inputs).shape[dim]
    for i in range(layer.bit_depth.numel()):
        made_of = torch.autograd.grad(original(*inputs).select(dim, i).sum(), original.weight)[0] != 0
        with torch.no_grad():
            layer.bit_depth.fill_(8.0)
            layer.bit_depth[i] = 0.0
        assert bool(before[made_of].any())
        assert torch.equal(layer.weight, before.masked_fill(made_of, 0.0))
        assert torch.equal(layer(*inputs).select(dim, i), without_weights(*inputs).select(dim, i))


@pytest.mark.parametrize("name", sorted(KINDS.keys() - ONE_WEIGHT))
def test_channels_of_layers_with_several_weights_are_rows(name):
    """Each weight of a recurrent or attention layer has depths of its own, one for each of its rows."""
    layer = converted(KINDS[name].make())
    for p in quantized_parameters(layer):
        before = getattr(p.layer, p.weight_name).detach().clone()
        with torch.no_grad():
            p.raw_depth[1] = 0.0
        assert p.channels == before.shape[0]
        before[1] = 0.0
        assert torch.equal(getattr(p.layer, p.weight_name), before)


class TestKeptValue:
    """The quantized weight is computed once between changes, and anew after each."""

    @pytest.fixture
    def layer(self):
        return converted(nn.Linear(5, 4), raw_depth=2.4)

    def refreshed(self, layer, calls):
        """Whether the next access computes, and shows the current value either way."""
        before = len(calls)
        p = next(quantized_parameters(layer))
        assert torch.equal(layer.weight, quantized_by_hand(p))
        return len(calls) > before

    def test_computed_once_between_steps(self, layer, monkeypatch):
        """Any number of accesses, forwards and backwards between two steps costs one computation."""
        calls = count_calls(monkeypatch)
        x = torch.randn(3, 5)
        for _ in range(3):
            layer(x).sum().backward()
        with torch.no_grad():
            layer(x)
        with torch.inference_mode():
            layer(x)
        assert len(calls) == 1

    def test_released_after_backward_where_asked_to(self, layer, monkeypatch):
        """With release_after_backward the memory of the value is free once the gradient has arrived."""
        calls = count_calls(monkeypatch)
        x = torch.randn(3, 5)
        expected = gradients(layer, (x,))
        assert layer._quantized_values != {}
        layer.release_after_backward = True
        assert_close(gradients(layer, (x,)), expected)
        assert layer._quantized_values == {}
        assert self.refreshed(layer, calls)

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.latent("weight").mul_(1.5),
            lambda layer: layer.bit_depth.sub_(1),
            lambda layer: layer.exponent.add_(1),
            lambda layer: layer.weight.zero_(),
            lambda layer: layer.load_state_dict(converted(nn.Linear(5, 4)).state_dict()),
            lambda layer: layer.load_state_dict(nn.Linear(5, 4).state_dict(), assign=True),
            lambda layer: layer.register_parameter("weight", nn.Parameter(torch.randn(4, 5))),
            lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(4, 5))),
            lambda layer: setattr(layer, "weight", changed_as_often(layer.latent("weight"))),
            lambda layer: setattr(layer.latent("weight"), "data", torch.randn(4, 5)),
            lambda layer: (layer.latent("weight").data.mul_(1.5), layer.forget_quantized()),
            lambda layer: (layer.latent("weight").data.mul_(1.5), layer.train()),
            lambda layer: (layer.latent("weight").data.mul_(1.5), layer.eval()),
            lambda layer: layer.calibrate("weight"),
            lambda layer: layer.double(),
            lambda layer: layer.bfloat16(),
        ],
    )
    def test_computed_anew_after_a_change(self, layer, change, monkeypatch):
        """A change in place, by loading, by replacing, by casting or of the mode shows at the next access."""
        calls = count_calls(monkeypatch)
        assert self.refreshed(layer, calls)
        assert not self.refreshed(layer, calls)
        with torch.no_grad():
            change(layer)
        assert self.refreshed(layer, calls)
        assert not self.refreshed(layer, calls)

    def test_computed_anew_after_an_optimizer_step(self, layer, monkeypatch):
        """A step shows at the next access, also of an optimizer that writes through .data, unseen by torch."""

        class Unseen(torch.optim.Optimizer):
            def __init__(self, params):
                super().__init__(params, {})

            def step(self):
                for p in self.param_groups[0]["params"]:
                    p.data.sub_(p.grad, alpha=0.1)

        calls = count_calls(monkeypatch)
        for optimizer in (
            torch.optim.SGD(layer.parameters(), 0.1),
            torch.optim.Adam(layer.parameters()),
            Unseen(layer.parameters()),
        ):
            assert self.refreshed(layer, calls)
            layer(torch.randn(3, 5)).square().sum().backward()
            before = layer.latent("weight").detach().clone()
            optimizer.step()
            assert not torch.equal(layer.latent("weight"), before)
        assert self.refreshed(layer, calls)

    def test_frozen_layers_hand_out_values(self, layer):
        """A layer with no parameter to train, or under no_grad, hands out a weight without a gradient."""
        assert layer.weight.grad_fn is not None
        with torch.no_grad():
            assert layer.weight.grad_fn is None
            assert layer.weight.requires_grad  # as the float layer's: torch.matmul goes by it
        layer.latent("weight").requires_grad_(False)
        assert not layer.weight.requires_grad

    def test_says_where_to_write(self, layer):
        """What is written into the weight after training began is lost, with a warning that names the latent one."""
        layer(torch.randn(3, 5)).sum().backward()
        expected = layer.weight.detach().clone()
        with torch.no_grad():
            layer.weight.zero_()
            with pytest.warns(UserWarning, match=r"wrote into the quantized 'weight'.*layer.latent\('weight'\)"):
                assert torch.equal(layer.weight, expected)

    @pytest.mark.parametrize(
        "write",
        [
            lambda layer: nn.init.constant_(layer.weight, 0.25),
            lambda layer: layer.weight.data.fill_(0.25),
            lambda layer: layer.weight.copy_(torch.full((4, 5), 0.25)),
        ],
        ids=["nn.init", "data", "copy_"],
    )
    @pytest.mark.parametrize("seen", [lambda layer: layer.weight, lambda layer: layer.train().weight])
    def test_initialization_takes_effect(self, layer, write, seen):
        """What is written into the weight before anything was trained becomes the latent weight, and is quantized."""
        with torch.no_grad():
            write(layer)
        layer.forget_quantized()
        assert torch.equal(layer.latent("weight"), torch.full((4, 5), 0.25))
        assert_close(seen(layer).detach(), torch.full((4, 5), 0.25), rtol=0.05, atol=0)
        assert layer.bit_depth.tolist() == [layer._quantized["weight"].initial_bits] * 4

    def test_asked_for_what_belongs_to_a_parameter(self, layer):
        """Gradient, hooks and ``requires_grad`` of the weight are those of the latent weight."""
        calls = []
        layer.weight.register_hook(lambda gradient: calls.append(gradient.shape))
        layer.weight.register_post_accumulate_grad_hook(lambda p: calls.append(p is layer.latent("weight")))
        layer(torch.randn(3, 5)).sum().backward()
        assert calls == [(4, 5), True]
        assert layer.weight.grad is layer.latent("weight").grad is not None
        layer.weight.grad = None
        assert layer.latent("weight").grad is None
        layer.weight.requires_grad = False
        assert not layer.latent("weight").requires_grad
        assert not layer.weight.requires_grad
        layer.weight.requires_grad_()
        assert layer.latent("weight").requires_grad

    def test_nothing_outlives_a_copy(self, layer):
        """A kept value is no part of a layer's copies, its pickle or its state."""
        layer(torch.randn(3, 5))
        assert layer._quantized_values != {}
        assert copy.deepcopy(layer)._quantized_values == {}
        assert pickle.loads(pickle.dumps(layer))._quantized_values == {}
        assert list(layer.state_dict()) == ["weight", "bias", "bit_depth", "exponent"]


@pytest.mark.parametrize("changed", ["weight", "bit_depth", "exponent"])
def test_gradients_per_sample(changed):
    """torch.func.grad and vmap see through a layer, whichever one of its tensors is handed in."""
    layer, x = converted(nn.Linear(5, 4).double(), raw_depth=2.4), torch.randn(3, 5, dtype=torch.float64)
    parameter = layer.state_dict(keep_vars=True)[changed]

    def of_one_sample(value, sample):
        return functional_call(layer, {changed: value}, (sample,)).square().sum()

    each = torch.func.vmap(torch.func.grad(of_one_sample), (None, 0))(parameter.detach(), x)
    layer(x).square().sum().backward()
    assert_close(each.sum(0), parameter.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_transforms_of_the_input(transform):
    """Transforms of torch.func with respect to the input treat a layer like its float twin."""
    layer = nn.Linear(5, 4).double()
    original, x = copy.deepcopy(layer), torch.randn(3, 5, dtype=torch.float64)
    twin = float_twin(original, converted(layer, raw_depth=2.4))
    actual, expected = (transform(lambda x, net=net: net(x).square())(x) for net in (layer, twin))
    assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_encoder_fast_path_sees_quantized_weights(monkeypatch):
    """The fused evaluation path of a transformer encoder layer, which skips forward, computes what training does."""
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
    x = torch.randn(3, 5, 8)
    expected = converted(layer, raw_depth=3.0)(x)
    taken, fused = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: taken.append(1) or fused(*args))
    with torch.no_grad():
        assert_close(layer.eval()(x), expected.detach(), rtol=1e-5, atol=1e-5)  # float32, sums in another order
    assert taken == [1]


@pytest.mark.parametrize("name", sorted(RECURRENT))
def test_recurrent_layers_keep_no_float_weights_aside(name):
    """The list that recurrent layers compute with holds the quantized weights and is no attribute of the instance."""
    layer = converted(KINDS[name].make(), raw_depth=2.4)
    shown = dict(zip(layer._flat_weights_names, layer._flat_weights, strict=True))
    assert all(torch.equal(shown[p.weight_name], quantized_by_hand(p)) for p in quantized_parameters(layer))
    assert "_flat_weights" not in vars(layer)


def test_quantized_classes_are_made_once():
    """The quantized class of a layer type is one class, a subclass of that type, named after it."""
    made = quantized_class(nn.Linear, ("weight",))
    assert made is quantized_class(nn.Linear, ("weight",))
    assert made.__name__ == "QuantizedLinear"
    assert issubclass(made, nn.Linear)
    assert type(converted(nn.Linear(2, 2))) is made


def test_mixed_precision_weights_still_learn():
    """Under autocast, and with bfloat16 weights, depths get finite float32 gradients."""
    layer, x = converted(nn.Linear(5, 4), raw_depth=2.4), torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        layer(x).float().square().sum().backward()
    layer.to(torch.bfloat16)(x.bfloat16()).float().square().sum().backward()
    for p in (layer.bit_depth, layer.exponent):
        assert p.grad.dtype == torch.float32
        assert bool(p.grad.any())


@pytest.mark.parametrize(
    ("axis", "shape", "channels", "per_channel"),
    [
        (ChannelAxis(), (4, 3, 2), 4, (4, 1, 1)),
        (ChannelAxis(dim=1), (3, 4), 4, (1, 4)),
        (ChannelAxis(dim=1, groups=2), (6, 4, 3), 8, (2, 1, 4, 1)),
    ],
)
def test_channel_axis(axis, shape, channels, per_channel):
    """An axis counts channels, splits groups off and joins them again, and finds each channel's extremes."""
    weight = torch.randn(shape)
    split = axis.split(weight)
    assert axis.channels(weight) == channels
    assert torch.equal(axis.join(split), weight)
    assert tuple(axis.expand(torch.zeros(channels), split).shape) == per_channel
    low, high = axis.extremes(weight)
    everywhere = [axis.join(axis.expand(t, split).expand_as(split)) for t in (low, high)]
    assert bool((everywhere[0] <= weight).all() & (weight <= everywhere[1]).all())
    for extreme, shown in zip((low, high), everywhere, strict=True):
        assert sorted(set(extreme.tolist())) == sorted(set(weight[weight == shown].tolist()))
