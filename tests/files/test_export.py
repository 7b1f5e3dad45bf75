"""Packed files and plain networks: the same outputs to the bit, the size reported, whole or not at all."""

import copy
import os
import pickle
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from fits import SCHEDULE, Kill
from networks import Lit, batches, make_trainer, small_net
from shrunken import outputs, shrunk
from torch import nn
from zoo import ZOO

from lightning_selfcompress import PackedFileError, SelfCompression, export, finalize, fold_batchnorm, load, size_report
from lightning_selfcompress.packing import estimated_size
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.quantize.layers import Quantized


def same(some, others):
    return len(some) == len(others) > 0 and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_a_file_is_the_network(name, tmp_path):
    """Exported and loaded into a fresh network, every network has its outputs to the bit and the bytes reported."""
    net, inputs = shrunk(name)
    nbytes = export(net, tmp_path / "net.scnn")
    assert nbytes == (tmp_path / "net.scnn").stat().st_size == size_report(net).nbytes
    plain, loaded = finalize(net), load(tmp_path / "net.scnn", ZOO[name].make())
    for other in (plain, loaded.eval()):
        assert same(outputs(net, inputs), outputs(other, inputs))
        assert not any(isinstance(m, Quantized) or "_removed_nbytes" in m.__dict__ for m in other.modules())
    assert str(loaded) == str(plain)
    assert {n: p.shape for n, p in loaded.state_dict().items()} == {n: p.shape for n, p in plain.state_dict().items()}
    assert estimated_size(net).nbytes == pytest.approx(nbytes, rel=0.02)


def compressed():
    """A small network after some epochs that removed channels."""
    torch.manual_seed(0)
    model = Lit()
    make_trainer(SelfCompression(gamma=0.05), Kill(SCHEDULE), max_epochs=4).fit(model, batches(60, 4))
    assert (model.net[0].out_channels, model.net[4].out_features) == (3, 10)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return compressed()


IMAGES = next(iter(batches()))[0]


def test_a_plain_network_is_the_users_own(model):
    """Finalize gives the user's class with torch's layers: it can be pickled, deep-copied, exported and trained."""
    plain = finalize(model)
    assert type(plain) is Lit
    assert {type(m) for m in plain.net} == {type(m) for m in small_net()}
    assert not plain._load_state_dict_pre_hooks
    for copied in (copy.deepcopy(plain.net), pickle.loads(pickle.dumps(plain.net))):
        assert torch.equal(copied(IMAGES), model.net(IMAGES))
    exported = torch.export.export(plain.net, (IMAGES,))
    torch.testing.assert_close(exported.module()(IMAGES), model.net(IMAGES))
    make_trainer().fit(plain, batches(2))


def test_finalize_leaves_the_model_alone(model):
    """The compressed network goes on as it was."""
    before = copy.deepcopy(model.state_dict())
    finalize(model)
    assert isinstance(model.net[0], Quantized)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("target", ["fresh", "shrunk", "converted", "itself"])
def test_load_into(model, target, tmp_path):
    """A file fills a fresh network, one of the sizes stored, a converted one and the one it came from."""
    export(model, tmp_path / "net.scnn")
    into = Lit() if target in ("fresh", "converted") else copy.deepcopy(model)
    if target == "shrunk":
        into = finalize(into)
        nn.init.zeros_(into.net[0].weight)
    if target == "converted":
        convert(into)
    parameters = list(into.parameters())
    loaded = load(tmp_path / "net.scnn", into)
    assert loaded is into
    assert torch.equal(loaded.eval().net(IMAGES), model.net(IMAGES))
    assert not any(isinstance(m, Quantized) for m in loaded.modules())
    if target == "shrunk":
        assert all(a is b for a, b in zip(parameters, loaded.parameters(), strict=True))
    make_trainer().fit(loaded, batches(2))


def test_load_a_part(model, tmp_path):
    """strict=False takes what both have; strict=True names what is missing and what is too much."""
    export(model, tmp_path / "net.scnn")

    class Longer(Lit):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(4, 4)

    with pytest.raises(PackedFileError, match=r"net\.scnn: expected .* Longer, found nothing for 'extra.weight'"):
        load(tmp_path / "net.scnn", Longer())
    loaded = load(tmp_path / "net.scnn", Longer(), strict=False)
    assert torch.equal(loaded.eval().net(IMAGES), model.net(IMAGES))
    with pytest.raises(PackedFileError, match=r"found nothing for '0.weight', .* and 'net.0.weight'"):
        load(tmp_path / "net.scnn", small_net())


def smaller(net):
    net[4], net[6] = nn.Linear(216, 9), nn.Linear(9, 4)


def other_kernel(net):
    net[0] = nn.Conv2d(1, 6, 5, padding=1)


def other_rank(net):
    net[6] = nn.Conv1d(16, 4, 1)


@pytest.mark.parametrize("change", [smaller, other_kernel, other_rank])
def test_a_network_that_does_not_fit(model, change, tmp_path):
    """Shapes that cannot have come from the network's are refused, and it is as it was."""
    export(model, tmp_path / "net.scnn")
    into = Lit()
    change(into.net)
    before = copy.deepcopy(into.state_dict())
    with pytest.raises(PackedFileError, match=r"net\.scnn: Expected"):
        load(tmp_path / "net.scnn", into)
    assert all(torch.equal(before[k], v) for k, v in into.state_dict().items())


def test_damaged_file_is_named(model, tmp_path):
    """The error says which file, and the network is as it was."""
    export(model, tmp_path / "net.scnn")
    data = bytearray((tmp_path / "net.scnn").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "net.scnn").write_bytes(data)
    with pytest.raises(PackedFileError, match=r"net\.scnn: .*checksum"):
        load(tmp_path / "net.scnn", Lit())
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere.scnn", Lit())


def test_nothing_half_written(model, tmp_path, monkeypatch):
    """A path that cannot be written raises, and an earlier file there stays whole."""
    with pytest.raises(OSError, match="nowhere"):
        export(model, tmp_path / "nowhere" / "net.scnn")
    (tmp_path / "net.scnn").write_bytes(b"earlier")

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        export(model, tmp_path / "net.scnn")
    assert [p.name for p in tmp_path.iterdir()] == ["net.scnn"]
    assert (tmp_path / "net.scnn").read_bytes() == b"earlier"


def test_where_files_go(model, tmp_path):
    """A folder's path is refused by name; what a link leads to is written."""
    with pytest.raises(IsADirectoryError, match="this is a folder") as caught:
        export(model, tmp_path)
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(FileNotFoundError, match="create it first") as caught:
        export(model, tmp_path / "nowhere" / "net.scnn")
    assert caught.value.filename == str(tmp_path / "nowhere" / "net.scnn")
    (tmp_path / "real.scnn").touch()
    (tmp_path / "link.scnn").symlink_to("real.scnn")
    export(model, tmp_path / "link.scnn")
    assert (tmp_path / "link.scnn").is_symlink()
    load(tmp_path / "real.scnn", Lit())
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_there_already(model, tmp_path):
    """A pipe or a device is not replaced; a file keeps its mode; an error names the user's path."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="a device or a pipe"):
        export(model, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(OSError, match="File name too long") as caught:
        export(model, tmp_path / ("x" * 300))
    assert caught.value.filename == str(tmp_path / ("x" * 300))
    (tmp_path / "net.scnn").touch(mode=0o600)
    export(model, tmp_path / "net.scnn")
    assert (tmp_path / "net.scnn").stat().st_mode & 0o777 == 0o600


def test_half_precision(model, tmp_path):
    """float16 for what is not quantized makes the file smaller, changes no value by more than a thousandth."""
    whole = export(model, tmp_path / "whole.scnn")
    half = export(model, tmp_path / "half.scnn", floats=torch.float16)
    assert half == size_report(model, floats=torch.float16).nbytes < whole
    one, other = (load(tmp_path / f"{n}.scnn", Lit()).state_dict() for n in ("whole", "half"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=0)
    assert torch.equal(other["net.0.weight"], one["net.0.weight"])
    with pytest.raises(ValueError, match=r"torch\.float16, got torch\.int8"):
        export(model, tmp_path / "x.scnn", floats=torch.int8)


def test_values_too_small_for_half_precision_stay(tmp_path):
    """Where float16 would lose a value, the tensor stays in float32."""
    net = nn.BatchNorm1d(2)
    net.running_var[:] = torch.tensor([1e-9, 1.0])
    net.weight.data[:] = torch.tensor([1.0001, 1e6])
    with pytest.warns(UserWarning, match="Nothing in this BatchNorm1d is compressed"):
        export(net, tmp_path / "net.scnn", floats=torch.float16)
    loaded = load(tmp_path / "net.scnn", nn.BatchNorm1d(2))
    assert torch.equal(loaded.running_var, net.running_var)
    assert torch.equal(loaded.weight, net.weight)


def test_weights_that_are_not_finite():
    """A network that is lost is not written."""
    net = small_net()
    convert(net)
    net[4].latent("weight").data[0, 0] = float("nan")
    size_report(net)  # still measures, while it trains
    with pytest.raises(ValueError, match=r"NaN or infinity in '4\.weight'"):
        export(net, "unused.scnn")


def test_values_that_a_file_cannot_hold(tmp_path):
    """Values not there yet are asked for by name; infinities are for masks; extra state is told of."""
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    convert(net)
    with pytest.raises(ValueError, match=r"'0\.weight', which is of a lazy layer\. Run or load the network first"):
        export(net, tmp_path / "net.scnn")
    with pytest.raises(ValueError, match="'weight', which is on the meta device"):
        export(nn.Linear(2, 2, device="meta"), tmp_path / "net.scnn")
    net = nn.Linear(4, 4)
    net.register_buffer("small", torch.zeros(3).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="Expected 'small' of one of the types float32"):
        export(net, tmp_path / "net.scnn")
    net.small = torch.full((2, 2), float("-inf")).triu(1)
    convert(net)
    export(net, tmp_path / "net.scnn")
    fresh = nn.Linear(4, 4)
    fresh.register_buffer("small", torch.zeros(2, 2))
    assert torch.equal(load(tmp_path / "net.scnn", fresh).small, net.small)
    net.small[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in 'small'"):
        export(net, tmp_path / "net.scnn")

    class Stateful(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

    net = nn.Sequential(Stateful(4, 4))
    convert(net)
    with pytest.warns(UserWarning, match="extra state of '0' is not stored"):
        export(net, tmp_path / "net.scnn")


def test_folding(model):
    """Folded into its convolution, batch normalization is gone and the outputs are the same but for rounding."""
    plain = finalize(model).net
    assert fold_batchnorm(plain, IMAGES) == 1
    assert isinstance(plain[1], nn.Identity)
    torch.testing.assert_close(plain(IMAGES), model.net(IMAGES), rtol=1e-4, atol=1e-5)


class Branches(nn.Module):
    """Normalizations that can be folded, and others that cannot."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.gone, self.read = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.up, self.up_norm = nn.ConvTranspose2d(3, 2, 2, bias=False), nn.BatchNorm2d(2)
        self.out, self.out_norm = nn.Linear(7, 7), nn.BatchNorm1d(7)

    def forward(self, x):
        x = self.stem_norm(input=self.stem(x)).relu()
        y = self.conv(x)
        y = self.norm(y) + y  # used with and without
        y = self.read(self.gone(y)) * self.read.weight.sum()
        return self.out_norm(self.out(self.up_norm(self.up(y))).flatten(1, 2).transpose(1, 2)[:, :, 0])


def test_folding_one_by_one():
    """What can be folded is, in whatever way it is called; the others stay as they were, and are named."""
    net = Branches().train()
    net.stem.eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
            module.running_mean.normal_()
    before, expected = copy.deepcopy(net.state_dict()), copy.deepcopy(net).eval()(IMAGES)
    with pytest.warns(UserWarning, match="norm, read stay: the output of the layer before is used elsewhere as well"):
        assert fold_batchnorm(net, IMAGES) == 2
    gone = [name for name, module in net.named_children() if isinstance(module, nn.Identity)]
    assert gone == ["stem_norm", "up_norm"]
    assert net.training
    assert not net.stem.training
    after = net.state_dict()
    kept = {k for k in before if not k.startswith(("stem", "up"))}
    assert all(torch.equal(before[k], after[k]) for k in kept)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    torch.testing.assert_close(net.eval()(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_folding_in_half_precision():
    """Rounding is that of the dtype."""
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).bfloat16().eval()
    net[1].running_mean.normal_()
    assert fold_batchnorm(net, IMAGES.bfloat16()) == 1


@dataclass
class Output:
    logits: torch.Tensor


class Returning(nn.Module):
    """Uses the output of a convolution with and without its normalization."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.norm, self.kind = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), kind

    def forward(self, x):
        y = self.conv(x)
        return self.kind(self.norm(y) + y)


@pytest.mark.parametrize("kind", [Output, lambda t: MappingProxyType({"logits": [t]})])
def test_folding_sees_outputs_of_all_kinds(kind):
    """Outputs in dataclasses and mappings are looked at too; where there are none, nothing is folded."""
    net = Returning(kind).eval()
    net.norm.running_mean.normal_()
    with pytest.warns(UserWarning, match="norm stay"):
        assert fold_batchnorm(net, IMAGES) == 0
    with pytest.raises(ValueError, match="Expected outputs with tensors of Returning"):
        fold_batchnorm(Returning(str), IMAGES)


def test_folding_looks_at_what_was_changed_in_place():
    """A layer whose output an activation has overwritten is not the one before the normalization."""
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(3))
    assert fold_batchnorm(net, torch.zeros(1, 1, 8, 8)) == 0


def test_folding_in_inference_mode():
    """There, too, what was changed in place is told from what was not."""
    with torch.inference_mode():
        net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.BatchNorm2d(3))
        assert fold_batchnorm(net, torch.randn(1, 1, 8, 8)) == 1


def test_folding_without_scale():
    """Normalization that learns nothing is folded too."""
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)).eval()
    net[1].running_mean.normal_()
    x = torch.randn(5, 4)
    expected = net(x)
    assert fold_batchnorm(net, x) == 1
    torch.testing.assert_close(net(x), expected)


def test_folding_of_quantized_layers():
    """They are to be made plain first."""
    net = small_net()
    convert(net)
    with pytest.raises(ValueError, match=r"Take finalize\(model\)"):
        fold_batchnorm(net, IMAGES)


def test_folding_with_wrong_inputs():
    """An error of the network itself leaves no hook behind, and the modes as they were."""
    net = Branches()
    with pytest.raises(RuntimeError):
        fold_batchnorm(net, torch.randn(1, 2, 8, 8))
    assert net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
