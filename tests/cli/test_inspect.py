"""selfcompress inspect."""

import json
import sys

import numpy as np
import pytest
import torch
from commands import GROUPED, values
from networks import Lit, make_trainer
from torch import nn
from zoo import ZOO

from lightning_selfcompress import ChannelAxis, convert, export, load_from_checkpoint, size_report
from lightning_selfcompress.cli.contents import read_contents
from lightning_selfcompress.quantize.parameters import quantized_parameters


def test_a_packed_file(said, folder):
    """The table has a line for each layer with its file's figures; they add up to the bytes of the file."""
    report = size_report(load_from_checkpoint(Lit, folder / "net.ckpt"))
    status, lines, err = said("inspect", "net.scnn")
    assert (status, err) == (0, "")
    assert lines[0] == f"net.scnn: packed file, version 1, {report.nbytes:,} bytes"
    account = [int(word) for word in lines[1].replace(",", "").split() if word.isdigit()]
    assert sum(account[:-1]) == account[-1] == report.nbytes == (folder / "net.scnn").stat().st_size
    assert lines[3].split() == ["layer", "shape", "channels", "of", "weights", "whole", "bits", "max", "whole", "bytes"]
    for line, layer in zip(lines[5:8], report.layers, strict=True):
        cells = line.replace(",", "").split()
        assert (cells[0], int(cells[4]), int(cells[7])) == (
            layer.name,
            layer.weights,
            layer.code_nbytes + layer.scale_nbytes,
        )
        assert float(cells[5]) == pytest.approx(layer.code_bits / layer.weights, abs=0.005)
    total = lines[9].replace(",", "").split()
    assert (total[0], int(total[3]), int(total[6])) == (
        "total",
        report.total.weights,
        report.total.code_nbytes + report.total.scale_nbytes,
    )
    plain = [line.split() for line in lines[11:] if line.startswith("net.")]
    assert sum(int(cells[-1]) for cells in plain) == report.bias_nbytes + report.other_nbytes
    assert ["net.1", "num_batches_tracked", "int16", "1", "2"] in plain
    start = lines.index("bits a code needs, and in how many channels") + 1
    bars = [line.split() for line in lines[start:]]
    assert [int(n) for n, *_ in bars] == list(range(int(bars[0][0]), int(bars[-1][0]) + 1))
    assert sum(int(channels) for _, channels, *_ in bars) == sum(int(line.split()[3]) for line in lines[5:8])
    assert all(len("".join(bar)) == int(channels) for _, channels, *bar in bars)


def test_a_checkpoint_needs_no_class(said, folder):
    """A checkpoint is shown as the packed file it would be, with learned bits, from its state dict alone."""
    report = size_report(load_from_checkpoint(Lit, folder / "net.ckpt"))
    _, packed = values(said, "inspect", "net.scnn")
    status, found = values(said, "inspect", "net.ckpt")
    assert (status, found["kind"], found["packed_nbytes"]) == (0, "checkpoint", report.nbytes)
    assert found["nbytes"] == (folder / "net.ckpt").stat().st_size
    assert (found["head"]["epoch"], found["head"]["global_step"]) == (4, 240)
    assert (packed["head"], packed["nbytes"]) == ({"format_version": 1}, report.nbytes)
    learned = [layer.pop("learned_bits") for layer in found["layers"]]
    assert learned == [pytest.approx(layer.learned_bits / layer.weights) for layer in report.layers]
    assert [layer.pop("learned_bits") for layer in packed["layers"]] == [None] * 3
    for key in ("layers", "uncompressed", "histogram"):
        assert found[key] == packed[key]
    assert values(said, "inspect", "weights.ckpt")[1]["packed_nbytes"] == report.nbytes
    head = said("inspect", "net.ckpt")[1][0]
    sizes = f"{found['nbytes']:,} bytes; about {report.nbytes:,} bytes as a packed file"
    assert head.endswith(f"epoch 4, step 240, {sizes}")


def test_keys_are_those_of_the_help(said):
    """The keys of --json are documented in --help, all of them."""
    _, lines, _ = said("inspect", "--help")
    words = set(" ".join(lines).replace(",", " ").replace(":", " ").split())
    _, found = values(said, "inspect", "net.ckpt")
    rows = [found, found["head"], *found["layers"], *found["uncompressed"]]
    assert {key for row in rows for key in row} <= words


def test_a_float_checkpoint(said):
    """Of a float network all tensors are listed as they are, and that nothing is compressed."""
    status, lines, _ = said("inspect", "float.ckpt")
    assert status == 0
    assert "Nothing in it is compressed." in lines
    assert not any("learned" in line or "bits a code" in line for line in lines)
    _, found = values(said, "inspect", "float.ckpt")
    assert (found["layers"], found["histogram"]) == ([], {})
    assert {row["name"] for row in found["uncompressed"]} == set(Lit().state_dict())


@pytest.mark.parametrize("columns", [40, 72, 200])
def test_fits_the_terminal(said, monkeypatch, columns):
    """Lines are as wide as the terminal at most: names are shortened in their middle, prose is wrapped."""
    wide = nn.ModuleDict({"a_long_name_of_a_submodule" * 2: nn.Linear(3, 4), "short": nn.BatchNorm1d(3)})
    convert(wide)
    export(wide, "wide.scnn")
    monkeypatch.setenv("COLUMNS", str(columns))
    _, lines, _ = said("inspect", "wide.scnn")
    assert max(map(len, lines)) <= max(columns, 72)  # numbers are never cut
    assert any(".." in line for line in lines) == (columns < 100)
    monkeypatch.delenv("COLUMNS")
    assert any("a_long_name_of_a_submodule" * 2 in line for line in said("inspect", "wide.scnn")[1])


def test_what_shapes_do_not_tell(said, folder):
    """Square and grouped weights are marked, with --model they are exact and the mark is gone."""
    (folder / "grouped.py").write_text(GROUPED)
    sys.path.insert(0, str(folder))
    from grouped import Grouped

    model = Grouped()
    convert(model)
    with torch.no_grad():
        for p in quantized_parameters(model):
            p.raw_depth.uniform_(-1, 6)
    trainer = make_trainer()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(folder / "grouped.ckpt", weights_only=True)
    _, found = values(said, "inspect", "grouped.ckpt")
    marked = [layer["name"] for layer in found["layers"] if layer["note"]]
    assert marked == ["net.0", "net.1", "net.2", "net.4", "table"]
    lines = said("inspect", "grouped.ckpt")[1]
    assert (
        "channels taken along dimension 0; shapes do not tell, --model does: net.0, net.1, net.2, net.4, table" in lines
    )
    status, lines, err = said("inspect", "grouped.ckpt", "--model", "grouped:Grouped", "--json")
    exact = json.loads("\n".join(lines))
    assert (status, exact["packed_nbytes"]) == (0, size_report(model).nbytes)
    assert err == "words of the module itself\n"
    assert [layer["name"] for layer in exact["layers"] if layer["note"]] == []


@pytest.mark.parametrize("name", ZOO)
def test_state_dicts_of_all_networks(name, tmp_path):
    """From the state dict of every network come its packed file's tensors, but for weights marked as unsure."""
    torch.manual_seed(0)
    net = ZOO[name].make()
    convert(net)
    with torch.no_grad():
        for p in quantized_parameters(net):
            p.raw_depth.uniform_(-1, 8)
    torch.save({"state_dict": net.state_dict(), "pytorch-lightning_version": "2.6"}, tmp_path / "net.ckpt")
    export(net, tmp_path / "net.scnn")
    one, other = (read_contents(tmp_path / f) for f in ("net.ckpt", "net.scnn"))
    assert [t.name for t in one.packed.tensors] == [t.name for t in other.packed.tensors]
    for a, b in zip(one.packed.tensors, other.packed.tensors, strict=True):
        if a.name not in one.notes:
            assert torch.equal(a.tensor(), b.tensor())
            rows = [None if t.codes is None else t.codes.rows for t in (a, b)]
            assert np.array_equal(*rows)


def test_a_layer_that_cannot_be_told(said):
    """Depths that fit no dimension of their weight are said in the table, and the other layers are shown."""
    checkpoint = torch.load("weights.ckpt", weights_only=True)
    checkpoint["state_dict"]["net.4.bit_depth"] = torch.ones(7)
    torch.save(checkpoint, "odd.ckpt")
    status, lines, _ = said("inspect", "odd.ckpt")
    assert status == 0
    assert [line.split()[2:4] for line in lines if line.startswith("net.4  ") and "?" in line] == [["?", "?"]]
    (note,) = [line for line in lines if line.endswith(": net.4")]
    assert note.startswith("codes not known, 7 bit depths and")
    _, found = values(said, "inspect", "odd.ckpt")
    assert [(layer["name"], layer["bits"] is None) for layer in found["layers"]] == [
        ("net.0", False),
        ("net.4", True),
        ("net.6", False),
    ]


def test_tied_weights_once(said):
    """A weight that two layers share is one line."""
    net = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10)})
    net["head"].weight = net["embed"].weight
    convert(net)
    torch.save({"state_dict": net.state_dict(), "pytorch-lightning_version": "2.6"}, "tied.ckpt")
    _, found = values(said, "inspect", "tied.ckpt")
    assert [layer["name"] for layer in found["layers"]] == ["embed"]
    assert found["packed_nbytes"] == size_report(net).nbytes


@pytest.mark.parametrize(
    "facts", [{"epoch": float("inf")}, {"epoch": {"a": 1}}, {"global_step": torch.tensor(3)}, {"epoch": "\ud800"}]
)
def test_json_of_any_checkpoint(said, folder, facts):
    """Whatever stands where an epoch should, ``--json`` is JSON."""
    known = {"pytorch-lightning_version": "2.6.0", "epoch": 1, "global_step": 3}
    torch.save({**known, **facts, "state_dict": {"weight": torch.tensor([1.0, torch.nan])}}, folder / "odd.ckpt")
    status, lines, _ = said("inspect", "odd.ckpt", "--json")
    assert status == 0
    assert json.loads("\n".join(lines))["file"].endswith("odd.ckpt")
    assert said("inspect", "odd.ckpt")[0] == 0


def test_a_checkpoint_tells_the_axes_that_no_type_tells(tmp_path):
    """The codes of layers of unknown types are read along the axes in the checkpoint, which is no tensor shown."""
    net = nn.ParameterDict({"experts": torch.randn(3, 8, 5), "square": torch.randn(6, 6)})
    convert(net, axes={"experts": ChannelAxis(1, groups=3), "square": ChannelAxis(1)})
    path = tmp_path / "net.ckpt"
    torch.save({"state_dict": net.state_dict(), "pytorch-lightning_version": "2.6.6"}, path)
    contents = read_contents(str(path))
    assert contents.notes == {}
    assert {t.name: t.codes.axis for t in contents.packed.tensors} == {
        "experts": ChannelAxis(1, groups=3),
        "square": ChannelAxis(1),
    }
