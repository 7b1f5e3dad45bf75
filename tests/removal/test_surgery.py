"""Surgery: entries leave, objects stay."""

import copy
import gc

import pytest
import torch
from killing import kill, watched
from torch import nn

from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.quantize.parameters import learned_tensors
from lightning_selfcompress.removal.optimizer_state import shrink_optimizer
from lightning_selfcompress.removal.plan import plan_removal
from lightning_selfcompress.removal.surgery import Replacement, give, remove, replace_tensors
from lightning_selfcompress.size.report import size_report
from lightning_selfcompress.tensors import stored_tensors


def net():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))
    convert(model)
    return model


def planned(model):
    """A plan that takes two channels of the convolution."""
    x = torch.randn(4, 1, 8, 8)
    channels, _ = watched(model, x)
    chosen = torch.zeros(channels.count, dtype=torch.bool).numpy()
    chosen[channels.of("0.bit_depth", 0)[[1, 4]]] = True
    kill(model, channels, chosen)
    return plan_removal(model, channels), x


def test_tensors_keep_their_identity():
    """Parameters, buffers, depths and exponents are the same objects, with their gradients sliced along."""
    model = net()
    plan, x = planned(model)
    model(x).square().mean().backward()
    before = stored_tensors(model)
    gradients = {name: t.grad.clone() for name, t in before.items() if t.grad is not None}
    records = remove(model, plan.edits)
    now = stored_tensors(model)
    assert all(now[name] is t for name, t in before.items())
    assert {r.name for r in records} == {e.name for e in plan.edits}
    assert all(r.old is r.new for r in records)
    assert {r.name: r.shape for r in records}["0.weight"] == (6, 1, 3, 3)
    assert now["0.weight"].shape == now["0.weight"].grad.shape == (4, 1, 3, 3)
    kept = [0, 2, 3, 5]
    assert torch.equal(now["0.weight"].grad, gradients["0.weight"][kept])
    assert torch.equal(now["0.bit_depth"].grad, gradients["0.bit_depth"][kept])
    assert now["1.running_mean"].shape == (4,)
    assert id(now["0.bit_depth"]) in learned_tensors(model)


def test_gradients_arrive_at_the_same_objects():
    """After a removal a backward pass, hooks and optimizers go on with the objects that they hold."""
    model = net()
    weight = model[0].latent("weight")
    optimizer = torch.optim.Adam(model.parameters())
    called = []
    weight.register_hook(lambda gradient: called.append(tuple(gradient.shape)))
    weight.register_post_accumulate_grad_hook(lambda p: called.append(tuple(p.grad.shape)))
    plan, x = planned(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if weight.shape[0] == 6:
            shrink_optimizer(optimizer, remove(model, plan.edits))
    assert called == [(6, 1, 3, 3)] * 2 + [(4, 1, 3, 3)] * 2
    assert optimizer.state[weight]["exp_avg"].shape == (4, 1, 3, 3)


def test_a_held_graph_keeps_the_old_object():
    """While a graph of the old shape is alive a new parameter is put in place; the graph still has its backward."""
    model = net()
    plan, x = planned(model)
    expected = copy.deepcopy(model)
    expected(x).square().mean().backward()
    loss = model(x).square().mean()
    weight = model[0].latent("weight")
    called = []
    weight.register_hook(lambda gradient: called.append(tuple(gradient.shape)))
    weight.tag = "mine"
    records = {r.name: r for r in remove(model, plan.edits)}
    new = model[0].latent("weight")
    assert new is not weight
    assert records["0.weight"].new is new
    assert records["0.weight"].old is weight
    assert (new.tag, tuple(new.shape), tuple(weight.shape)) == ("mine", (4, 1, 3, 3), (6, 1, 3, 3))
    loss.backward()
    assert torch.equal(weight.grad, expected[0].latent("weight").grad)
    model(x).square().mean().backward()
    assert called == [(6, 1, 3, 3), (4, 1, 3, 3)]


def test_a_graph_in_a_cycle_is_let_go():
    """A graph that is held by nothing but a cycle of objects is collected; the parameter stays the same object."""
    model = net()
    plan, x = planned(model)
    gc.disable()
    try:
        cycle = [model(x).square().mean()]
        cycle.append(cycle)
        del cycle
        assert all(r.old is r.new for r in remove(model, plan.edits))
    finally:
        gc.enable()


@pytest.mark.parametrize("trained", [True, False])
def test_give_and_take(trained):
    """A tensor gets other entries and its own ones back, as the same object; a frozen one is never replaced."""
    p = nn.Parameter(torch.randn(4, 3), requires_grad=trained)
    values = p.detach().clone()
    assert give(p, Replacement(torch.zeros(2, 3))) is p
    assert p.shape == (2, 3)
    assert give(p, Replacement(values, torch.ones(4, 3) if trained else None)) is p
    assert torch.equal(p, values)
    assert (p.grad is not None) is trained


def test_tied_weights_stay_tied():
    """A weight with two names gets its entries once, and both layers their sizes."""
    one, two = nn.Linear(3, 4), nn.Linear(3, 4)
    two.weight = one.weight
    model = nn.Sequential(one, two)
    now = replace_tensors(model, {id(one.weight): Replacement(torch.zeros(2, 3))})
    assert now[id(one.weight)] is one.weight is two.weight
    assert (one.out_features, two.out_features) == (2, 2)


def test_memory_format_and_device_stay():
    """A tensor in channels_last is in channels_last afterwards."""
    model = net().to(memory_format=torch.channels_last)
    plan, _ = planned(model)
    remove(model, plan.edits)
    assert model[0].latent("weight").is_contiguous(memory_format=torch.channels_last)


def test_tied_entries_count_once():
    """Bytes of what was removed are those of the float network, where two layers share a bias too."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(4, 6)
            self.two.bias, self.out = self.one.bias, nn.Linear(6, 2)

        def forward(self, x):
            return self.out((self.one(x) + self.two(x)).relu())

    model, x = Tied(), torch.randn(3, 4)
    convert(model)
    before = size_report(model).float_nbytes
    channels, _ = watched(model, x)
    chosen = torch.zeros(channels.count, dtype=torch.bool).numpy()
    chosen[channels.of("one.bit_depth", 0)[[2]]] = True
    kill(model, channels, chosen)
    remove(model, plan_removal(model, channels).edits)
    assert model.one.bias is model.two.bias
    assert model.one.bias.shape == (5,)
    assert size_report(model).float_nbytes == before
