"""Compiled modules that shrink: as many recompilations as removals, the losses of the module that is not compiled."""

import lightning.pytorch as pl
import pytest
import torch
from fits import SCHEDULE, Widths, fit, largest_difference
from networks import Lit, batches
from torch import nn

from lightning_selfcompress.quantize.layers import Quantized

EPOCH = 60
TEN = {epoch: {"net.4": [epoch]} for epoch in range(10)}


class Counting:
    """A backend that counts graphs and their runs, and the runs in each epoch."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph(*args)

        return run


class Epochs(pl.Callback):
    """The losses, and what a backend did in each epoch."""

    def __init__(self, backend=None):
        self.backend, self.losses, self.seen = backend or Counting(), [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append((self.backend.graphs, self.backend.runs))
        self.backend.graphs = self.backend.runs = 0


class Quiet(Lit):
    """What can be compiled in one graph: dynamo cannot trace self.log everywhere, nor an item in a list."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


class Net(nn.Module):
    """The network as somebody's own class: torch compiles no nn.Sequential by its ``compile()``."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers(x)

    def __getitem__(self, index):
        return self.layers[index]


class Submodule(Quiet):
    def __init__(self, wrap):
        super().__init__()
        self.net = wrap(Net(self.net))


def whole(backend):
    return torch.compile(Quiet(), backend=backend)


def wrapped_part(backend):
    return Submodule(lambda net: torch.compile(net, backend=backend))


def part_in_place(backend):
    def wrap(net):
        net.compile(backend=backend)
        return net

    return Submodule(wrap)


def by_method(backend):
    module = Quiet()
    module.compile(backend=backend)
    return module


HOW = {
    "torch.compile(model) before fit": (whole, "net.4"),
    "a submodule in torch.compile": (wrapped_part, "net._orig_mod.layers.4"),
    "submodule.compile()": (part_in_place, "net.layers.4"),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def plain_losses():
    """Of the same training without a compiler."""
    epochs = Epochs()
    fit(1, epochs, make=Quiet, schedule=TEN, max_epochs=11)
    return epochs.losses


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch < 2.6 gives up on watched code")
@pytest.mark.case("Compilation", "{how}: ten removals, ten recompilations")
@pytest.mark.parametrize("how", HOW)
def test_every_removal_recompiles_once(how, plain_losses):
    """After each of ten removals one graph is compiled, and all steps run in it; the losses are the uncompiled ones."""
    make, layer = HOW[how]
    backend = Counting()
    epochs = Epochs(backend)
    schedule = {epoch: {layer: channels["net.4"]} for epoch, channels in TEN.items()}
    model, _ = fit(1, epochs, make=lambda: make(backend), schedule=schedule, max_epochs=11)
    assert model.get_submodule(layer).out_features <= 16 - 10
    watched = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610]  # the steps that ran uncompiled
    in_epochs = [sum(e * EPOCH < step <= (e + 1) * EPOCH for step in watched) for e in range(11)]
    assert epochs.seen == [(1, EPOCH - n) for n in in_epochs]
    some = slice(3 * EPOCH)  # the compiler adds in another order, which grows over hundreds of steps
    difference = largest_difference(epochs.losses[some], plain_losses[some])
    print(f"{how}: {difference:.2e}")
    assert difference < 1e-5


@pytest.mark.case("Compilation", "model.compile(), which Lightning leaves unused on one device")
def test_compiled_call_of_the_module():
    """A LightningModule with a compiled call is trained by its training_step, as without the callback."""
    backend = Counting()
    epochs, widths = Epochs(backend), Widths()
    fit(1, epochs, widths, make=lambda: by_method(backend))
    assert [w[3] for w in widths.seen] == [13, 12, 10, 10]
    assert epochs.seen == [(0, 0)] * 4


@pytest.mark.case("Compilation", "torch.compile(model), backend {backend}")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_backends(backend):
    """Compiled to kernels, forward and backward, the network shrinks with the losses of the uncompiled one."""
    epochs, plain = Epochs(), Epochs()
    # a C++ compiler takes seconds for each graph: one removal
    model, _ = fit(1, epochs, make=lambda: whole(backend), max_epochs=2, schedule={0: SCHEDULE[0]})
    assert model.net[4].out_features == 13
    fit(1, plain, make=Quiet, max_epochs=2, schedule={0: SCHEDULE[0]})
    difference = largest_difference(epochs.losses, plain.losses)
    print(f"{backend}: {difference:.2e}")
    assert difference < 1e-5


@pytest.mark.case("Compilation", "{how} of the trained network")
@pytest.mark.parametrize("how", ["torch.export", "torch.jit.trace"])
def test_shrunken_network_can_be_exported(how):
    """A network that shrank is exported, still quantized, and the program computes what it computes."""
    model, _ = fit(1)
    net = model.net.eval()
    images = next(iter(batches(1)))[0].double()
    exported = how == "torch.export"
    program = torch.export.export(net, (images,)).module() if exported else torch.jit.trace(net, (images,))
    assert isinstance(net[4], Quantized)
    assert net[4].out_features == 10
    torch.testing.assert_close(program(images), net(images), rtol=0, atol=1e-12)
