"""The command line: looking into files, writing them, comparing them, and saying what is wrong in one line."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from fits import SCHEDULE, Kill
from networks import Lit, batches, make_trainer
from torch import nn
from zoo import ZOO

from lightning_selfcompress import SelfCompression, convert, export, finalize, load, load_from_checkpoint, size_report
from lightning_selfcompress.cli import main
from lightning_selfcompress.inspection import read_contents
from lightning_selfcompress.layers import quantized_parameters

MODEL = ["--model", "networks:Lit"]
GROUPED = """
import lightning.pytorch as pl
from torch import nn


class Grouped(pl.LightningModule):
    def __init__(self):
        super().__init__()
        print("words of the module itself")
        self.net = nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 8, 2, groups=2), nn.Conv2d(8, 8, 2, bias=False),
            nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Conv2d(6, 6, 1), nn.Flatten(), nn.Linear(294, 4),
        )
        self.table = nn.Embedding(4, 4)


class Wanting(Grouped):
    def __init__(self, width):
        super().__init__()


class Broken:
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two checkpoints of one network, compressed and smaller, a float one, and packed files of the first."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = Lit()
    trainer = make_trainer(SelfCompression(gamma=0.05), Kill(SCHEDULE), max_epochs=4)
    trainer.fit(model, batches(60, 4))
    trainer.save_checkpoint(folder / "net.ckpt")
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    export(model, folder / "net.scnn")
    export(model, folder / "half.scnn", floats=torch.float16)
    assert size_report(model).weights_left < 0.9
    trainer = make_trainer()
    trainer.fit(Lit(), batches(2))
    trainer.save_checkpoint(folder / "float.ckpt")
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    """Commands are run where the files are."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def said(capsys):
    """Runs a command: its exit status, its lines on stdout, and stderr."""

    def run(*arguments):
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run


def values(said, *arguments):
    status, lines, err = said(*arguments, "--json")
    assert err == ""
    return status, json.loads("\n".join(lines))


class TestInspect:
    """selfcompress inspect."""

    def test_a_packed_file(self, said, folder):
        """The table has a line for each layer with its file's figures; they add up to the bytes of the file."""
        report = size_report(load_from_checkpoint(Lit, folder / "net.ckpt"))
        status, lines, err = said("inspect", "net.scnn")
        assert (status, err) == (0, "")
        assert lines[0] == f"net.scnn: packed file, version 1, {report.nbytes:,} bytes"
        account = [int(word) for word in lines[1].replace(",", "").split() if word.isdigit()]
        assert sum(account[:-1]) == account[-1] == report.nbytes == (folder / "net.scnn").stat().st_size
        assert lines[3].split() == ["layer", "shape", "channels", "of", "weights", "bits", "max", "bits", "bytes"]
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

    def test_a_checkpoint_needs_no_class(self, said, folder):
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

    def test_keys_are_those_of_the_help(self, said):
        """The keys of --json are documented in --help, all of them."""
        _, lines, _ = said("inspect", "--help")
        words = set(" ".join(lines).replace(",", " ").replace(":", " ").split())
        _, found = values(said, "inspect", "net.ckpt")
        rows = [found, found["head"], *found["layers"], *found["uncompressed"]]
        assert {key for row in rows for key in row} <= words

    def test_a_float_checkpoint(self, said):
        """Of a float network all tensors are listed as they are, and that nothing is compressed."""
        status, lines, _ = said("inspect", "float.ckpt")
        assert status == 0
        assert "Nothing in it is compressed." in lines
        assert not any("learned" in line or "bits a code" in line for line in lines)
        _, found = values(said, "inspect", "float.ckpt")
        assert (found["layers"], found["histogram"]) == ([], {})
        assert {row["name"] for row in found["uncompressed"]} == set(Lit().state_dict())

    @pytest.mark.parametrize("columns", [40, 72, 200])
    def test_fits_the_terminal(self, said, monkeypatch, columns):
        """Lines are as wide as the terminal at most: names are shortened in their middle, prose is wrapped."""
        wide = nn.ModuleDict({"a_long_name_of_a_submodule" * 2: nn.Linear(3, 4), "short": nn.BatchNorm1d(3)})
        convert(wide)
        export(wide, "wide.scnn")
        monkeypatch.setenv("COLUMNS", str(columns))
        _, lines, _ = said("inspect", "wide.scnn")
        assert max(map(len, lines)) <= max(columns, 65)  # numbers are never cut
        assert any(".." in line for line in lines) == (columns < 100)
        monkeypatch.delenv("COLUMNS")
        assert any("a_long_name_of_a_submodule" * 2 in line for line in said("inspect", "wide.scnn")[1])

    def test_what_shapes_do_not_tell(self, said, folder):
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
            "channels taken along dimension 0; shapes do not tell, --model does: net.0, net.1, net.2, net.4, table"
            in lines
        )
        status, lines, err = said("inspect", "grouped.ckpt", "--model", "grouped:Grouped", "--json")
        exact = json.loads("\n".join(lines))
        assert (status, exact["packed_nbytes"]) == (0, size_report(model).nbytes)
        assert err == "words of the module itself\n"
        assert [layer["name"] for layer in exact["layers"] if layer["note"]] == []

    @pytest.mark.parametrize("name", ZOO)
    def test_state_dicts_of_all_networks(self, name, tmp_path):
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
                assert np.array_equal(a.codes, b.codes)

    def test_a_layer_that_cannot_be_told(self, said):
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

    def test_tied_weights_once(self, said):
        """A weight that two layers share is one line."""
        net = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10)})
        net["head"].weight = net["embed"].weight
        convert(net)
        torch.save({"state_dict": net.state_dict(), "pytorch-lightning_version": "2.6"}, "tied.ckpt")
        _, found = values(said, "inspect", "tied.ckpt")
        assert [layer["name"] for layer in found["layers"]] == ["embed"]
        assert found["packed_nbytes"] == size_report(net).nbytes


class TestExport:
    """selfcompress export."""

    def test_packed(self, said, folder):
        """It writes the bytes that export() does, and says how many; --float16 writes fewer."""
        status, lines, err = said("export", "net.ckpt", *MODEL, "-o", "out.scnn")
        data = (folder / "out.scnn").read_bytes()
        assert (status, lines, err) == (0, [f"out.scnn: {len(data):,} bytes"], "")
        assert data == (folder / "net.scnn").read_bytes()
        assert said("export", "net.ckpt", *MODEL, "-o", "out.scnn", "--float16")[0] == 0
        assert (folder / "out.scnn").read_bytes() == (folder / "half.scnn").read_bytes()

    def test_state_dict(self, said):
        """The plain network's state dict is written: tensors alone, of the smaller shapes, dequantized."""
        assert said("export", "net.ckpt", *MODEL, "-o", "out.pt", "--to", "state-dict")[0] == 0
        found = torch.load("out.pt", weights_only=True)
        expected = finalize(load_from_checkpoint(Lit, "net.ckpt")).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert not any("bit_depth" in key for key in found)

    def test_onnx(self, said, monkeypatch):
        """The network, in evaluation mode, the path and inputs of the shapes given go to to_onnx."""
        seen = []

        def to_onnx(model, path, *inputs):
            print("words of the exporter")
            seen.append((model, inputs))
            Path(path).write_bytes(b"onnx")

        stand_in = types.SimpleNamespace(to_onnx=to_onnx)
        monkeypatch.setitem(sys.modules, "lightning_selfcompress.onnx_export", stand_in)
        command = ["export", "net.ckpt", *MODEL, "-o", "out.onnx", "--to", "onnx"]
        status, lines, err = said(*command, "--input", "1,1,8,8", "--input", "2,3:int64")
        assert (status, lines, err) == (0, ["out.onnx: 4 bytes"], "words of the exporter\n")
        ((model, inputs),) = seen
        assert [(tuple(t.shape), t.dtype) for t in inputs] == [((1, 1, 8, 8), torch.float32), ((2, 3), torch.int64)]
        assert not model.training

    def test_a_float_checkpoint_says_so(self, said):
        """A network that was never compressed is written, with a line that says so."""
        status, _, err = said("export", "float.ckpt", *MODEL, "-o", "out.scnn")
        assert status == 0
        assert err.startswith("selfcompress: Nothing in this Lit is compressed")
        assert err.count("\n") == 1

    def test_by_the_console_script(self, folder, tmp_path):
        """The installed command finds a class in the current folder, and its file opens."""
        (tmp_path / "mine.py").write_text("from networks import Lit\n\n\nclass Mine(Lit):\n    pass\n")
        script = shutil.which("selfcompress", path=str(Path(sys.executable).parent))
        command = [script] if script else [sys.executable, "-m", "lightning_selfcompress.cli"]
        path = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
        done = subprocess.run(
            [*command, "export", str(folder / "net.ckpt"), "--model", "mine:Mine", "-o", "net.scnn"],
            cwd=tmp_path,
            env={"PYTHONPATH": ":".join(path), "PATH": ""},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        images = next(iter(batches()))[0]
        expected = load_from_checkpoint(Lit, folder / "net.ckpt").eval()
        assert torch.equal(load(tmp_path / "net.scnn", Lit()).eval().net(images), expected.net(images))


class TestDiff:
    """selfcompress diff."""

    @pytest.mark.parametrize("pair", [("net.scnn", "net.scnn"), ("net.ckpt", "net.scnn"), ("net.ckpt", "weights.ckpt")])
    def test_equal(self, said, pair):
        """A network is equal to itself, in whatever kind of file: status 0."""
        status, lines, err = said("diff", *pair)
        assert (status, lines[-1], err) == (0, "The same network in both.", "")
        status, found = values(said, "diff", *pair)
        assert (status, found["equal"], found["differences"]) == (0, True, [])

    def test_other_values(self, said, folder):
        """Rounded to float16, tensors differ in bytes and by so much; codes do not: status 1."""
        status, found = values(said, "diff", "net.scnn", "half.scnn")
        assert (status, found["equal"]) == (1, False)
        one, other = (load(f, Lit()).state_dict() for f in ("net.scnn", "half.scnn"))
        expected = {n: float((one[n].double() - other[n].double()).abs().max()) for n in one}
        assert {d["name"]: d["largest"] for d in found["differences"]} == {n: d for n, d in expected.items() if d}
        for d in found["differences"]:
            assert (d["a"]["stored_as"], d["b"]["stored_as"], d["a"]["bits"]) == ("float32", "float16", None)
            assert d["a"]["nbytes"] == 2 * d["b"]["nbytes"]
        assert found["b"]["nbytes"] == (folder / "half.scnn").stat().st_size

    def test_other_shapes(self, said):
        """Against the float network every layer has other widths or bits, shown side by side."""
        status, lines, _ = said("diff", "net.scnn", "float.ckpt")
        assert status == 1
        _, found = values(said, "diff", "net.scnn", "float.ckpt")
        by_name = {d["name"]: d for d in found["differences"]}
        shrunk = by_name["net.4.weight"]
        assert shrunk["b"]["shape"] == [16, 216]
        assert shrunk["a"]["shape"] < shrunk["b"]["shape"]
        assert (shrunk["a"]["stored_as"], shrunk["b"]["stored_as"], shrunk["largest"]) == ("codes", "float32", None)
        (line,) = [line.split() for line in lines if line.startswith("net.4.weight")]
        assert line[1:3] == ["x".join(map(str, shrunk[side]["shape"])) for side in "ab"]
        assert line[3:5] == [f"{shrunk['a']['bits']:.2f}", "float32"]
        assert lines[-1] == f"{len(by_name)} tensors differ."

    def test_one_bit(self, said):
        """A single weight that has another code makes a difference, and its size is shown."""
        model = load_from_checkpoint(Lit, "net.ckpt")
        with torch.no_grad():
            layer = model.net[6]
            column = layer.weight.abs().sum(0).argmax()
            before = float(layer.weight[0, column])
            layer.latent("weight")[0, column] *= -1
            after = float(layer.weight[0, column])
        assert before != after
        export(model, "other.scnn")
        status, found = values(said, "diff", "net.scnn", "other.scnn")
        assert (status, [d["name"] for d in found["differences"]]) == (1, ["net.6.weight"])
        assert found["differences"][0]["largest"] == pytest.approx(abs(before - after))
        assert said("diff", "net.scnn", "other.scnn")[1][-1] == "1 tensor differs."

    def test_other_names(self, said):
        """What only one of them has is absent in the other."""
        model = load_from_checkpoint(Lit, "net.ckpt")
        export(model.net, "inner.scnn")
        status, found = values(said, "diff", "inner.scnn", "net.scnn")
        assert status == 1
        assert {(d["a"] is None, d["b"] is None) for d in found["differences"]} == {(True, False), (False, True)}
        assert any("absent" in line for line in said("diff", "inner.scnn", "net.scnn")[1])

    def test_groups(self, said):
        """Convolutions of the same weights in other groups differ."""
        for groups, conv in ((2, nn.Conv2d(4, 4, 1, groups=2)), (1, nn.Conv2d(2, 4, 1))):
            nn.init.ones_(conv.weight)
            nn.init.zeros_(conv.bias)
            convert(conv)
            export(conv, f"groups{groups}.scnn")
        _, found = values(said, "diff", "groups2.scnn", "groups1.scnn")
        assert [(d["name"], d["b"]) for d in found["differences"]] == [("groups", None)]

    def test_not_a_number(self, said):
        """NaN is equal to NaN, and differs from numbers by null."""
        for name, value in (("nan", torch.nan), ("number", 1.0)):
            state = {"a": torch.tensor([value, 2.0])}
            torch.save({"state_dict": state, "pytorch-lightning_version": "2.6"}, f"{name}.ckpt")
        assert values(said, "diff", "nan.ckpt", "nan.ckpt")[0] == 0
        status, found = values(said, "diff", "nan.ckpt", "number.ckpt")
        assert (status, found["differences"][0]["largest"]) == (1, None)

    def test_keys_and_statuses_are_in_the_help(self, said):
        """--help tells the keys of --json and what the exit statuses mean."""
        text = " ".join(said("diff", "--help")[1])
        words = set(text.replace(",", " ").replace("(", " ").replace(")", " ").replace(":", " ").split())
        _, found = values(said, "diff", "net.scnn", "float.ckpt")
        rows = [found, found["a"], *found["differences"], found["differences"][0]["a"]]
        assert {key for row in rows for key in row} <= words | {"nbytes;"}
        assert "0 if they hold the same network, 1 if they differ, 2 if something is wrong" in text


class NotPlain:
    """An object that a checkpoint may hold."""


def write_bad_files(folder):
    packed, checkpoint = (folder / "net.scnn").read_bytes(), (folder / "net.ckpt").read_bytes()
    (folder / "text.txt").write_text("nothing of the kind")
    (folder / "empty.scnn").write_bytes(b"")
    (folder / "cut.scnn").write_bytes(packed[:-9])
    (folder / "later.scnn").write_bytes(packed[:4] + b"\x63" + packed[5:])
    (folder / "cut.ckpt").write_bytes(checkpoint[:-500])
    middle = len(checkpoint) // 2
    (folder / "flipped.ckpt").write_bytes(checkpoint[:middle] + b"\x00\xff\x00" + checkpoint[middle + 3 :])
    torch.save(Lit().state_dict(), folder / "state.pt")
    objects = torch.load(folder / "weights.ckpt", weights_only=True) | {"hyper": NotPlain()}
    torch.save(objects, folder / "objects.ckpt")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("nowhere.scnn", r"'nowhere.scnn' to be a file that can be used: No such file or directory. Check the path."),
        (".", "Is a directory"),
        ("text.txt", "Expected a packed file or a Lightning checkpoint in 'text.txt', found a file of another kind"),
        ("empty.scnn", "or an empty one"),
        ("cut.scnn", "cut.scnn: Expected a checksum that fits the content. The file is damaged; take another copy."),
        ("later.scnn", "later.scnn: Expected version 1 of the format, got 99. Open it with the version"),
        ("cut.ckpt", "Expected a checkpoint in 'cut.ckpt', found a file that cannot be read: it is damaged"),
        ("flipped.ckpt", "it is damaged"),
        ("state.pt", "Expected a Lightning checkpoint in 'state.pt', found a dictionary without 'state_dict'"),
        ("objects.ckpt", "found objects that take code to make. Add --trust"),
    ],
)
def test_files_that_cannot_be_read(said, folder, file, reason):
    """Missing, damaged and other files: one line names file and remedy, status 1, of diff 2, nothing on stdout."""
    write_bad_files(folder)
    commands = (["inspect", file], ["inspect", file, "--json"], ["export", file, *MODEL, "-o", "never.scnn"])
    for status, command in (*((1, c) for c in commands), (2, ["diff", "net.scnn", file]), (2, ["diff", file, file])):
        found, lines, err = said(*command)
        assert (found, lines, err.count("\n")) == (status, [], 1)
        assert err.startswith("selfcompress: ")
        assert reason in err
    assert not list(folder.glob("never.*"))


def test_trust(said, folder):
    """Objects in a checkpoint are made where one says so."""
    write_bad_files(folder)
    assert said("diff", "objects.ckpt", "weights.ckpt", "--trust")[0] == 0
    assert said("export", "objects.ckpt", *MODEL, "-o", "trusted.scnn", "--trust")[0] == 0


EXPORT = ["export", "net.ckpt", *MODEL, "-o", "never.scnn"]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ([*EXPORT, "--model", "networks"], "Expected --model as package.module:Class, got 'networks'."),
        ([*EXPORT, "--model", "no.such:Thing"], "Expected a module 'no.such' for --model, found none in the current"),
        (
            [*EXPORT, "--model", "networks:Lot"],
            "Expected a class 'Lot' in 'networks'. LightningModules there: Lit, Gan",
        ),
        ([*EXPORT, "--model", "networks:small_net"], "Expected a LightningModule in --model 'networks:small_net', got"),
        ([*EXPORT, "--model", "grouped:Broken"], "Expected a LightningModule in --model 'grouped:Broken', got"),
        ([*EXPORT, "--model", "wants:Thing"], "Expected to import 'wants' for --model, but it needs 'no_such_package'"),
        ([*EXPORT, "--model", "raises:Thing"], "Expected to import 'raises' for --model, got ZeroDivisionError"),
        ([*EXPORT, "--model", "grouped:Wanting"], "Call save_hyperparameters() in its __init__"),
        ([*EXPORT, "--model", "networks:Gan"], "net.4"),
        ([*EXPORT, "-o", "nowhere/net.scnn"], "Expected a file in a folder that can be written, got -o 'nowhere/net"),
        ([*EXPORT, "-o", "."], "Expected a file in a folder that can be written, got -o '.'."),
        ([*EXPORT, "--to", "tflite"], "argument --to: invalid choice: 'tflite' (choose from"),
        ([*EXPORT, "--to", "onnx"], "Expected --input SHAPE, such as --input 1,1,28,28, with --to onnx"),
        ([*EXPORT, "--to", "onnx", "--input", "1,a"], "expected a shape such as 1,1,28,28 or 1,128:int64, got 1,a"),
        ([*EXPORT, "--to", "onnx", "--input", "1,8:nn"], "expected a shape such as"),
        ([*EXPORT, "--input", "1,1,8,8"], "with --to onnx and only there"),
        ([*EXPORT, "--to", "state-dict", "--float16"], "Expected --float16 with --to packed, got --to state-dict"),
        (["export", "net.scnn", *MODEL, "-o", "never.scnn"], "'net.scnn' is a packed file already"),
        (["export", "net.ckpt", "-o", "never.scnn"], "the following arguments are required: --model"),
        (["inspect", "net.scnn", *MODEL], "'net.scnn' is a packed file already"),
        (["inspect"], "the following arguments are required: FILE. See selfcompress inspect --help."),
        (["squeeze", "net.ckpt"], "invalid choice: 'squeeze'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_arguments(said, folder, command, reason):
    """What cannot be done is one line that names it and what to do, status 1, and nothing is written."""
    (folder / "grouped.py").write_text(GROUPED)
    (folder / "wants.py").write_text("import no_such_package\n")
    (folder / "raises.py").write_text("1 / 0\n")
    status, lines, err = said(*command)
    err = err.replace("words of the module itself\n", "")
    assert (status, lines, err.count("\n")) == (1, [], 1)
    assert reason in err
    assert len(err) < 700
    assert not list(folder.glob("never.*"))


def test_onnx_without_its_packages(said, monkeypatch):
    """Where the packages for ONNX are missing, the one missing is named."""
    monkeypatch.setitem(sys.modules, "lightning_selfcompress.onnx_export", None)
    status, _, err = said(*EXPORT, "--to", "onnx", "--input", "1,1,8,8")
    assert (status, err.count("\n")) == (1, 1)
    assert "lightning_selfcompress.onnx_export" in err


def test_wrong_arguments_of_diff(said):
    """Of diff, 1 means that files differ; wrong arguments are 2."""
    status, lines, err = said("diff", "net.scnn")
    assert (status, lines, err.count("\n")) == (2, [], 1)


@pytest.mark.parametrize("command", [["inspect", "text.txt"], ["diff", "net.scnn", "text.txt"]])
def test_debug_shows_the_traceback(command, folder):
    """With --debug an error is raised as it is."""
    write_bad_files(folder)
    with pytest.raises(ValueError, match="another kind"):
        main([*command, "--debug"])


def test_a_reader_that_leaves(folder):
    """`| head` ends the command without an error of its own."""
    command = [sys.executable, "-c", "import sys; from lightning_selfcompress.cli import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*command, "inspect", "net.scnn"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, text=True
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 1)
    process.stderr.close()
