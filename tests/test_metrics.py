"""The sizes as torchmetrics metrics."""

import copy
import pickle

import pytest
import torch
from matplotlib import pyplot
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_selfcompress.metrics import BitsPerWeight, NBytes
from lightning_selfcompress.packing import Packed, to_bytes
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.size.price import ModelSize
from lightning_selfcompress.size.report import size_report

METRICS = pytest.mark.parametrize("metric_type", [BitsPerWeight, NBytes])


class Measured(nn.Module):
    """A model that holds its own metrics, as a LightningModule does."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        convert(self.net)
        self.bits = BitsPerWeight(self)
        self.nbytes = NBytes(self.net)

    def shrink(self, bits):
        with torch.no_grad():
            for layer in (self.net[0], self.net[2]):
                layer.bit_depth.fill_(bits)


def test_values_are_those_of_the_size():
    """The metrics are Q, in float32, and the report's bytes, in float64."""
    model = Measured()
    model.shrink(2.5)
    bits, nbytes = model.bits.compute(), model.nbytes.compute()
    assert (bits.dtype, nbytes.dtype) == (torch.float32, torch.float64)
    assert (bits.item(), nbytes.item()) == (2.5, size_report(model.net).nbytes)
    assert bits.item() == ModelSize.of(model).bits_per_weight().item()
    assert not bits.requires_grad


@METRICS
def test_follows_the_model_without_updates(metric_type, recwarn):
    """The value is that of the model now, however often, without an update, a reset or a warning."""
    model = Measured()
    metric = metric_type(model)
    values = []
    for bits in (8.0, 4.0, 0.0):
        model.shrink(bits)
        values.append(metric.compute().item())
        assert metric.compute().item() == values[-1]
    metric.update()
    metric.reset()
    assert metric.compute().item() == values[-1]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 3
    assert metric().item() == values[-1]
    assert [str(w.message) for w in recwarn] == []


def test_known_bytes():
    """The bytes are those of the packed file; dead, the network has none of its 50 codes, and its 9 biases still."""
    model = Measured()
    assert model.nbytes.compute().item() == len(to_bytes(Packed.of(model.net)))
    alive = model.nbytes.compute().item()
    model.shrink(0.0)
    report = size_report(model.net)
    assert (
        model.nbytes.compute().item() == report.structure_nbytes + 9 * 4 + 2
    )  # a state of 4 bytes, 2 of which hold values
    assert alive - model.nbytes.compute().item() > 40  # 50 weights of nearly 8 bits, and some bytes of exponents


@METRICS
def test_nothing_quantized(metric_type):
    """Of a float model Q is 0, and the bytes are those of its state and of the file's structure around it."""
    model = nn.Linear(3, 4)
    value = metric_type(model).compute().item()
    nbytes = len(to_bytes(Packed.of(model)))
    assert nbytes == 64 + size_report(model).structure_nbytes
    assert value == {BitsPerWeight: 0, NBytes: nbytes}[metric_type]


@METRICS
def test_the_model_is_no_part_of_its_metric(metric_type):
    """A metric has no parameters, submodules or state of the model it measures."""
    metric = metric_type(nn.Linear(3, 4))
    assert isinstance(metric, Metric)
    assert list(metric.parameters()) == []
    assert list(metric.children()) == []
    assert metric.state_dict() == {}


def test_a_model_may_hold_its_own_metric():
    """Held by the model it measures, a metric adds nothing to the model's modules' parameters, keys or size."""
    model = Measured()
    assert list(model.state_dict()) == [f"net.{key}" for key in model.net.state_dict()]
    assert size_report(model).nbytes == size_report(nn.ModuleDict({"net": model.net})).nbytes
    model.double().train().eval()
    assert model.nbytes.compute().item() == size_report(model.net).nbytes


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_measures_the_copy(make_copy):
    """The metric in a copied model measures that copy, not the original."""
    model = Measured()
    other = make_copy(model)
    other.shrink(2.0)
    assert (other.bits.compute().item(), model.bits.compute().item()) == (2.0, 8.0)
    assert other.nbytes.compute().item() < model.nbytes.compute().item()


@METRICS
def test_a_collection_takes_it(metric_type):
    """A MetricCollection computes it under its name."""
    model = Measured()
    assert MetricCollection({"size": metric_type(model)}).compute() == {"size": metric_type(model).compute()}


@METRICS
@pytest.mark.parametrize("model", [None, 3, nn.Linear, "net"])
def test_what_is_no_module_is_refused(metric_type, model):
    """Anything but a module is a TypeError that names its type."""
    with pytest.raises(TypeError, match=f"an nn.Module, got {type(model).__name__}"):
        metric_type(model)


@METRICS
def test_plots(metric_type):
    """A metric draws itself as torchmetrics' do: its value of now, or those of several times, from zero."""
    metric = metric_type(convert(nn.Linear(6, 5)).model)
    values = [metric.compute() * share for share in (1.0, 0.5)]
    _, ax = metric.plot(values)
    (line,) = ax.get_lines()[:1]
    assert line.get_ydata().tolist() == pytest.approx([float(v) for v in values])
    assert len(metric.plot()[1].get_lines()) >= 1
    pyplot.close("all")
