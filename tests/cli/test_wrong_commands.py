"""Commands that cannot be done: one line, a status, and nothing written."""

import subprocess
import sys

import pytest
import torch
from commands import GROUPED, MODEL
from networks import Lit

from lightning_selfcompress.cli.main import main


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
    stretch = b"\x00\xff" * 100  # longer than what lies between the parts of the file, which nobody reads
    (folder / "flipped.ckpt").write_bytes(checkpoint[:middle] + stretch + checkpoint[middle + len(stretch) :])
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
        (
            "state.pt",
            "Expected a Lightning checkpoint in 'state.pt', found a dictionary without 'state_dict'",
        ),
        ("objects.ckpt", "found objects that take code to make. Add --trust"),
    ],
)
def test_files_that_cannot_be_read(said, folder, file, reason):
    """Missing, damaged and other files: one line names file and remedy, status 1, nothing on stdout."""
    write_bad_files(folder)
    commands = (["inspect", file], ["inspect", file, "--json"], ["export", file, *MODEL, "-o", "never.scnn"])
    for command in (*commands, ["diff", "net.scnn", file], ["diff", file, file]):
        status, lines, err = said(*command)
        assert (status, lines, err.count("\n")) == (1, [], 1)
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
            "Expected a class 'Lot' in 'networks'. LightningModules there: Regression, Lit, Gan",
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
        ([*EXPORT, "--round-to", "8"], "Expected --round-to with --to onnx, got --to packed"),
        ([*EXPORT, "--weights", "float"], "Expected --weights with --to onnx, got --to packed"),
        ([*EXPORT, "--to", "onnx", "--weights", "int3"], "argument --weights: invalid choice: 'int3' (choose from"),
        (
            [*EXPORT, "--to", "onnx", "--input", "1,8", "--round-to", "0"],
            "expected a whole number of at least 1, got 0",
        ),
        ([*EXPORT, "--to", "onnx"], "Expected --input SHAPE, such as --input 1,1,28,28, with --to onnx"),
        ([*EXPORT, "--to", "onnx", "--input", "1,a"], "expected a shape such as 1,1,28,28 or 1,128:int64, got 1,a"),
        ([*EXPORT, "--to", "onnx", "--input", "1,8:nn"], "expected a shape such as"),
        ([*EXPORT, "--input", "1,1,8,8"], "with --to onnx and only there"),
        ([*EXPORT, "--to", "state-dict", "--float16"], "Expected --float16 with --to packed, got --to state-dict"),
        (["export", "net.scnn", *MODEL, "-o", "never.scnn"], "'net.scnn' is a packed file already"),
        (
            ["export", "net.scnn", "--model", "grouped:Wanting", "-o", "never.pt", "--to", "state-dict"],
            "Take its check",
        ),
        (["export", "net.scnn", "--model", "networks:Gan", "-o", "never.pt", "--to", "state-dict"], "net.scnn: "),
        (["export", "net.ckpt", "-o", "never.scnn"], "the following arguments are required: --model"),
        (["inspect", "net.scnn", *MODEL], "'net.scnn' is a packed file already"),
        (["export", "net.ckpt", *MODEL, "-o", "net.ckpt"], "Expected another file than the one that is read"),
        (["export", "net.ckpt", "--model", "./networks:Lit", "-o", "never.scnn"], "--model as package.module:Class"),
        (["export", "net.ckpt", "--model", "leaves:Lit", "-o", "never.scnn"], "got SystemExit: 3"),
        ([*EXPORT, "--to", "onnx", "--input", "1,1,8,8", "--round-to", "x"], "a whole number of at least 1, got x"),
        (["diff", "net.scnn"], "the following arguments are required: B"),
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
    (folder / "leaves.py").write_text("raise SystemExit(3)\n")
    status, lines, err = said(*command)
    err = err.replace("words of the module itself\n", "")
    assert (status, lines, err.count("\n")) == (1, [], 1)
    assert reason in err
    assert len(err) < 700
    assert not list(folder.glob("never.*"))


def test_onnx_without_its_packages(said, monkeypatch):
    """Where the packages for ONNX are missing, the one missing is named, and what to install."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, _, err = said(*EXPORT, "--to", "onnx", "--input", "1,1,8,8")
    assert (status, err.count("\n")) == (1, 1)
    assert "onnx is missing. Install them with pip install onnx onnxscript." in err


@pytest.mark.parametrize("command", [["inspect", "text.txt"], ["diff", "net.scnn", "text.txt"]])
def test_debug_shows_the_traceback(command, folder):
    """With --debug an error is raised as it is."""
    write_bad_files(folder)
    with pytest.raises(ValueError, match="another kind"):
        main([*command, "--debug"])


def test_a_reader_that_leaves(folder):
    """`| head` ends the command without an error of its own."""
    command = [sys.executable, "-c", "import sys; from lightning_selfcompress.cli.main import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*command, "inspect", "net.scnn"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, text=True
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 1)
    process.stderr.close()


MARKER = """
from pathlib import Path

Path("ran").touch()


class X:
    pass


def make(module_class, kwargs):
    return module_class()
"""


@pytest.mark.parametrize("command", [["inspect"], ["export", "-o", "made.scnn"]])
@pytest.mark.parametrize(
    "hyper_parameters",
    [
        {"_instantiator": "marker.make"},
        {"_instantiator": "lightning.pytorch.cli.instantiate_module", "layer": {"class_path": "marker.X"}},
    ],
)
@pytest.mark.parametrize("key", ["hyper_parameters", "hparams"])
def test_a_checkpoint_cannot_have_code_imported(command, hyper_parameters, key, tmp_path, monkeypatch, said):
    """What hyperparameters name is not imported without --trust; the error says what they name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "marker.py").write_text(MARKER)
    state = dict(Lit().state_dict())
    saved = {"state_dict": state, key: hyper_parameters, "pytorch-lightning_version": "2.6.0"}
    torch.save(saved, tmp_path / "bad.ckpt")
    name, *rest = command
    status, _, error = said(name, "bad.ckpt", "--model", "networks:Lit", *rest)
    assert status == 1
    assert "found some that name code to import" in error
    assert "--trust" in error
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "made.scnn").exists()
