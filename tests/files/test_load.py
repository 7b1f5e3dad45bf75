"""Packed files loaded: into networks that fit, whole; others are refused before anything is changed."""

import copy

import pytest
import torch
from killing import half_removed, reason, watched
from packed_networks import with_random_codes
from torch import nn

from lightning_selfcompress import PackedFileError, convert, export, finalize, load, size_report
from lightning_selfcompress.packing import Packed, as_it_is, to_bytes

IMAGES = torch.randn(2, 2, 9, 9)


def written(path, tensors, **attributes):
    """A file that says it holds these tensors and numbers, whatever network that is of."""
    numbers = {name.replace("__", "."): value for name, value in attributes.items()}
    path.write_bytes(to_bytes(Packed(tuple(as_it_is(name, t) for name, t in tensors.items()), numbers)))
    return path


def state(net, **changed):
    """A network's tensors, some of them of other shapes or types."""
    return net.state_dict() | {name.replace("__", "."): t for name, t in changed.items()}


def assert_refused(path, net, match):
    """The file is refused with a message, and the network is as it was."""
    before, classes = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    with pytest.raises(PackedFileError, match=match) as caught:
        load(path, net)
    assert str(caught.value).startswith(str(path))
    assert [type(m) for m in net.modules()] == classes
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


NETS = {
    "InstanceNorm2d": lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3)),
    "BatchNorm2d": lambda: nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8, affine=False, track_running_stats=False), nn.ReLU(), nn.Conv2d(8, 3, 3)
    ),
    "GroupNorm": lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 3, 3)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 3, 3)),
    "channels last": lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 3, 3)).to(
        memory_format=torch.channels_last
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NETS)
def test_what_shapes_do_not_tell(name, tmp_path):
    """Sizes and groups that modules keep as numbers, and how memory is laid out, are those of the smaller network."""
    full = NETS[name]()
    convert(full)
    channels, _ = watched(full, IMAGES)
    small = half_removed(full, channels)[0].eval()
    export(small, tmp_path / "net.scnn")
    loaded = load(tmp_path / "net.scnn", NETS[name]()).eval()
    assert loaded[0].out_channels < 8
    assert str(loaded) == str(finalize(small))
    assert torch.equal(loaded(IMAGES), small(IMAGES))
    assert [p.stride() for p in loaded.parameters()] == [p.stride() for p in finalize(small).parameters()]


def test_groups_that_no_file_could_tell():
    """Channels in groups of a normalization without tensors stay: a checkpoint would not know which are left."""
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(4, 8, affine=False), nn.Conv2d(8, 3, 3))
    convert(net)
    channels, _ = watched(net, IMAGES)
    assert "'1' has groups of them, which no file could tell" in reason(channels, "0")


def sequential(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers))


LSTM = lambda: nn.Sequential(nn.LSTM(3, 4))  # noqa: E731
NORMED = sequential(lambda: nn.Conv2d(2, 8, 3), lambda: nn.BatchNorm2d(8))
GROUPED = sequential(lambda: nn.Conv2d(4, 8, 3, groups=4))
MISFITS = {
    "bias longer": (NORMED, {"0__weight": torch.zeros(3, 2, 3, 3), "0__bias": torch.zeros(4)}, {}),
    "bias shorter": (sequential(lambda: nn.Linear(3, 4)), {"0__bias": torch.zeros(1)}, {}),
    "statistics of other channels": (NORMED, {"1__weight": torch.zeros(3), "1__bias": torch.zeros(3)}, {}),
    "half a group": (
        sequential(lambda: nn.GroupNorm(2, 8)),
        {"0__weight": torch.zeros(2), "0__bias": torch.zeros(2)},
        {},
    ),
    "other groups": (
        sequential(lambda: nn.GroupNorm(4, 16)),
        {"0__weight": torch.zeros(8), "0__bias": torch.zeros(8)},
        {"0__num_groups": 4},
    ),
    "a state of nothing": (LSTM, {"0__weight_hh_l0": torch.zeros(16, 0)}, {}),
    "a state of one": (LSTM, {"0__weight_hh_l0": torch.zeros(1, 1), "0__weight_ih_l0": torch.zeros(1, 3)}, {}),
    "a gate too few": (LSTM, {"0__bias_hh_l0": torch.zeros(12)}, {}),
    "a narrower LayerNorm": (
        sequential(lambda: nn.LayerNorm(5)),
        {"0__weight": torch.zeros(3), "0__bias": torch.zeros(3)},
        {},
    ),
    "no groups": (GROUPED, {}, {"0__groups": 0}),
    "groups that do not divide": (GROUPED, {}, {"0__groups": 3}),
    "huge groups": (GROUPED, {}, {"0__groups": 1 << 40}),
    "groups of too many channels": (sequential(lambda: nn.Conv2d(4, 8, 3)), {}, {"0__groups": 2}),
    "groups of a normalization": (NORMED, {}, {"1__groups": 1}),
    "a number of nobody": (NORMED, {}, {"nowhere__groups": 1}),
    "another number": (NORMED, {}, {"0__stride": 1}),
    "too many features": (
        sequential(lambda: nn.Linear(2, 2), lambda: nn.InstanceNorm1d(2)),
        {},
        {"1__num_features": 3},
    ),
    "complex numbers": (NORMED, {"0__bias": torch.zeros(8, dtype=torch.complex64)}, {}),
    "a fraction of a count": (NORMED, {"1__num_batches_tracked": torch.tensor(1.5)}, {}),
}


@pytest.mark.parametrize("what", MISFITS)
def test_files_that_do_not_fit(what, tmp_path):
    """Shapes, numbers and types that go with no such network are refused; torch would crash on some, or say nothing."""
    make, changed, numbers = MISFITS[what]
    path = written(tmp_path / "net.scnn", state(make(), **changed), **numbers)
    assert_refused(path, make(), "xpected")
    converted = make()
    convert(converted)
    assert_refused(path, converted, "xpected")


def test_groups_of_the_network_itself(tmp_path):
    """A convolution may be the network; one without a number in the file has one group."""
    convs = [nn.Conv2d(4, 8, 3, groups=4) for _ in range(2)]
    with_random_codes(convs[0])
    export(convs[0], tmp_path / "net.scnn")
    assert str(load(tmp_path / "net.scnn", convs[1])) == str(finalize(convs[0]))
    one = written(tmp_path / "one.scnn", nn.Conv2d(1, 4, 3).state_dict())
    assert load(one, nn.Conv2d(4, 4, 3, groups=4)).groups == 1


def tied():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=8))
    net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize("left", [1, 3])
def test_groups_of_tied_convolutions(left, tmp_path):
    """A weight that is stored once has its groups wherever it is used."""
    small = nn.Sequential(*(nn.Conv2d(left, left, 3, groups=left) for _ in range(2)))
    small[1].weight = small[0].weight
    path = tmp_path / "net.scnn"
    with pytest.warns(UserWarning, match="Nothing in this Sequential is compressed"):
        export(small, path)
    loaded, images = load(path, tied()), torch.randn(1, left, 7, 7)
    assert str(loaded) == str(small)
    assert loaded[1].weight is loaded[0].weight
    assert torch.equal(loaded(images), small(images))


def test_narrower_types_are_told(tmp_path):
    """A network keeps its types; where these hold less than is stored, that is said."""
    path = written(tmp_path / "net.scnn", nn.Linear(2, 2).double().state_dict())
    with pytest.warns(UserWarning, match="'weight', 'bias': rounded to the types of the network"):
        assert load(path, nn.Linear(2, 2)).weight.dtype == torch.float32


def test_nothing_in_common(tmp_path):
    """Even a part of it has to be there."""
    path = written(tmp_path / "net.scnn", {"other": torch.zeros(3)})
    with pytest.raises(PackedFileError, match="expected tensors of a Linear, found none"):
        load(path, nn.Linear(2, 2), strict=False)
    with pytest.raises(TypeError, match=r"such as MyNet\(\), got <class"):
        load(path, nn.Linear)


def test_tensors_that_are_not_ordinary(tmp_path):
    """Expanded buffers get a place for each entry; networks without values are refused."""
    nets = [nn.Linear(2, 2) for _ in range(2)]
    for i, net in enumerate(nets):
        net.register_buffer("shift", torch.full((1, 3), float(i)).expand(4, 3))
    export(with_random_codes(nets[1]), tmp_path / "net.scnn")
    assert torch.equal(load(tmp_path / "net.scnn", nets[0]).shift, torch.ones(4, 3))
    with pytest.raises(ValueError, match="'weight', which is on the meta device"):
        load(tmp_path / "net.scnn", nn.Linear(2, 2, device="meta"))


def test_layers_without_weights(tmp_path):
    """A layer that has lost all its inputs is stored, measured and loaded as any other."""
    nets = [nn.ModuleList([nn.Linear(0, 3), nn.Linear(2, 0), nn.Linear(2, 2)]) for _ in range(2)]
    with_random_codes(nets[0])
    nbytes = export(nets[0], tmp_path / "net.scnn")
    assert nbytes == size_report(nets[0]).nbytes
    assert size_report(nets[0], exact=False).nbytes == pytest.approx(nbytes, abs=10)
    loaded = load(tmp_path / "net.scnn", nets[1])
    assert torch.equal(loaded[0].bias, nets[0][0].bias)
    assert torch.equal(loaded[2].weight, nets[0][2].weight)


@pytest.mark.parametrize("make", [lambda: torch.eye(4).to_sparse(), lambda: torch.zeros(3).to(torch.float8_e4m3fn)])
def test_what_no_file_could_hold_is_measured(make, tmp_path):
    """Sizes are logged while it trains; the export says what is in the way."""
    net = nn.Linear(2, 2)
    convert(net)
    small = size_report(net).nbytes
    net.register_buffer("odd", make())
    assert size_report(net).nbytes > small
    assert size_report(net, exact=False).nbytes > small
    with pytest.raises(ValueError, match="Expected 'odd'"):
        export(net, tmp_path / "net.scnn")
