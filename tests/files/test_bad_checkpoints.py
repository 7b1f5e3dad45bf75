"""Checkpoints that are damaged, or of something else: an error that says so, and a network as it was."""

import pytest
import torch
from networks import Lit, batches, make_trainer
from torch import nn
from trained import trained

from lightning_selfcompress import SelfCompression, load_from_checkpoint
from lightning_selfcompress.errors import CheckpointError
from lightning_selfcompress.files.checkpoint import FORMAT, MARK
from lightning_selfcompress.tensors import stored_tensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoint of a network that has shrunk, as a file."""
    _, trainer = trained()
    path = tmp_path_factory.mktemp("saved") / "small.ckpt"
    trainer.save_checkpoint(path)
    return path


def truncated(path, saved):
    path.write_bytes(saved.read_bytes()[:-500])


def garbage(path, saved):
    path.write_bytes(bytes(range(256)) * 20)


def empty(path, saved):
    path.write_bytes(b"")


def with_flipped_bytes(path, saved):
    data = bytearray(saved.read_bytes())
    data[200:240] = bytes(b ^ 0xFF for b in data[200:240])
    path.write_bytes(data)


def with_a_flipped_weight(path, saved):
    data = bytearray(saved.read_bytes())
    values = torch.load(saved, weights_only=True)["state_dict"]["net.4.weight"].numpy().tobytes()
    data[data.index(values) + len(values) // 2] ^= 0x10
    path.write_bytes(data)


def a_tensor(path, saved):
    torch.save(torch.zeros(3), path)


def weights_alone(path, saved):
    torch.save(torch.load(saved, weights_only=True)["state_dict"], path)


def edited(change):
    def write(path, saved):
        checkpoint = torch.load(saved, weights_only=True)
        change(checkpoint["state_dict"])
        torch.save(checkpoint, path)

    return write


def longer_depths(state):
    state["net.4.bit_depth"] = torch.ones(11)


def other_kernel(state):
    state["net.0.weight"] = torch.zeros(3, 1, 5, 5)


def wider_layer(state):
    for name, tensor in list(state.items()):
        if name.startswith("net.4"):
            state[name] = torch.zeros(200, *tensor.shape[1:])


def fewer_dimensions(state):
    state["net.4.weight"] = state["net.4.weight"].flatten()


def missing_layer(state):
    for name in [n for n in state if n.startswith("net.6")]:
        del state[name]


def other_names(state):
    for name in list(state):
        state["backbone." + name] = state.pop(name)


def one_more_layer(state):
    for kind in ("weight", "bias", "bit_depth", "exponent"):
        state[f"extra.{kind}"] = torch.zeros(3)


def wider_bias(state):
    state["net.6.bias"] = torch.zeros(9)


def later_format(state):
    state[MARK] = torch.tensor(FORMAT + 1)


FILES = {
    "truncated": truncated,
    "with flipped bytes": with_flipped_bytes,
    "with one flipped bit in a weight": with_a_flipped_weight,
    "of random bytes": garbage,
    "empty": empty,
    "that holds a tensor": a_tensor,
    "that holds weights alone": weights_alone,
    "with more depths than channels": edited(longer_depths),
    "with another kernel": edited(other_kernel),
    "of a wider network": edited(wider_layer),
    "with a flattened weight": edited(fewer_dimensions),
    "with a layer missing": edited(missing_layer),
    "with other names": edited(other_names),
    "with a compressed layer more": edited(one_more_layer),
    "with a wider bias": edited(wider_bias),
    "of a later format": edited(later_format),
}


@pytest.mark.case("Bad input", "fit(ckpt_path=) of a checkpoint {kind}")
@pytest.mark.parametrize("kind", FILES)
def test_bad_checkpoint(kind, tmp_path, refusal, saved):
    """The error names the file or the parameter and what to do; the network in memory is as it was."""
    path = tmp_path / "bad.ckpt"
    FILES[kind](path, saved)
    model = Lit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = [p for p in model.parameters() if p.dim() > 1]
    with refusal(CheckpointError, r"Expected"):
        make_trainer(SelfCompression(gamma=0.05), max_epochs=3).fit(model, batches(), ckpt_path=path)
    now = stored_tensors(model)
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert all(any(p is q for q in model.parameters()) for p in kept)
    with pytest.raises(CheckpointError, match="Expected"):
        load_from_checkpoint(Lit, path)


@pytest.mark.case("Bad input", "fit(ckpt_path=) of a file that is not there")
def test_no_file(tmp_path, refusal):
    """A path that leads nowhere is named."""
    with refusal(FileNotFoundError, "nowhere.ckpt"):
        make_trainer(SelfCompression(gamma=0.05)).fit(Lit(), batches(), ckpt_path=tmp_path / "nowhere.ckpt")
    with pytest.raises(FileNotFoundError, match=r"nowhere.ckpt"):
        load_from_checkpoint(Lit, tmp_path / "nowhere.ckpt")


@pytest.mark.case("Bad input", "resumed with a layer in skip= that is compressed in the checkpoint")
def test_other_skip(saved, refusal):
    """Where the callback leaves out what the run had compressed, the layer is named."""
    with refusal(RuntimeError, r"'net\.6' to be float"):
        compression = SelfCompression(gamma=0.05, skip=["net.6"])
        make_trainer(compression, max_epochs=3).fit(Lit(), batches(), ckpt_path=saved)


@pytest.mark.case("Bad input", "a float checkpoint loaded into a network that has shrunk")
def test_float_checkpoint_into_a_smaller_network(tmp_path, refusal):
    """Full weights do not go into a smaller network, which stays as it is."""
    model, trainer = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = make_trainer()
    plain.fit(Lit(), batches())
    plain.save_checkpoint(tmp_path / "float.ckpt")
    with refusal(RuntimeError, "size mismatch"):
        trainer.test(model, batches(), ckpt_path=tmp_path / "float.ckpt")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.case("Bad input", "an optimizer that holds parameters of another module")
def test_foreign_optimizer(refusal):
    """An optimizer made for another network trains nothing here: refused, with its first parameter."""
    other = nn.Linear(7, 3)
    model = Lit(lambda _: torch.optim.SGD(other.parameters(), lr=0.1))
    with refusal(ValueError, r"\(3, 7\)"):
        make_trainer(SelfCompression(gamma=0.05)).fit(model, batches())


@pytest.mark.case("Bad input", "resumed with another number of optimizers")
def test_other_optimizers(saved, refusal):
    """A checkpoint of one optimizer does not go on with two."""

    def two(module):
        layers = list(module.net.parameters())
        return [torch.optim.Adam(layers[:4]), torch.optim.Adam(layers[4:])]

    class Manual(Lit):
        def __init__(self):
            super().__init__(two)
            self.automatic_optimization = False

    with refusal(ValueError, "optimizer"):
        make_trainer(SelfCompression(gamma=0.05), max_epochs=3).fit(Manual(), batches(), ckpt_path=saved)
