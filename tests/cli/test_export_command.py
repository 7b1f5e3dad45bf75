"""selfcompress export."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import networks
import pytest
import torch
from commands import MODEL
from networks import Lit, batches

from lightning_selfcompress import finalize, load, load_from_checkpoint


def test_packed(said, folder):
    """It writes the bytes that export() does, and says how many; --float16 writes fewer."""
    status, lines, err = said("export", "net.ckpt", *MODEL, "-o", "out.scnn")
    data = (folder / "out.scnn").read_bytes()
    assert (status, lines, err) == (0, [f"out.scnn: {len(data):,} bytes"], "")
    assert data == (folder / "net.scnn").read_bytes()
    assert said("export", "net.ckpt", *MODEL, "-o", "out.scnn", "--float16")[0] == 0
    assert (folder / "out.scnn").read_bytes() == (folder / "half.scnn").read_bytes()


def test_state_dict(said):
    """The plain network's state dict is written: tensors alone, of the smaller shapes, dequantized."""
    assert said("export", "net.ckpt", *MODEL, "-o", "out.pt", "--to", "state-dict")[0] == 0
    found = torch.load("out.pt", weights_only=True)
    expected = finalize(load_from_checkpoint(Lit, "net.ckpt")).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not any("bit_depth" in key for key in found)
    assert said("export", "net.scnn", *MODEL, "-o", "packed.pt", "--to", "state-dict")[0] == 0
    from_packed = torch.load("packed.pt", weights_only=True)
    assert all(torch.equal(from_packed[key], expected[key]) for key in expected)


def test_onnx(said, monkeypatch):
    """The network, in evaluation mode, the path and inputs of the shapes given go to to_onnx."""
    seen = []

    def to_onnx(model, path, *inputs, **settings):
        print("words of the exporter")
        warnings.warn("this stays float", stacklevel=1)
        seen.append((model, inputs, settings))
        Path(path).write_bytes(b"onnx")

    monkeypatch.setattr("lightning_selfcompress.cli.commands.to_onnx", to_onnx)
    command = [
        "export",
        "net.ckpt",
        *MODEL,
        "-o",
        "out.onnx",
        "--to",
        "onnx",
        "--round-to",
        "16",
        "--weights",
        "multiply",
    ]
    status, lines, err = said(*command, "--input", "1,1,8,8", "--input", "2,3:int64")
    assert (status, lines) == (0, ["out.onnx: 4 bytes"])
    assert err == "words of the exporter\nselfcompress: this stays float\n"
    ((model, inputs, settings),) = seen
    assert settings == {"round_to": 16, "weights": "multiply", "codes": None, "fastest": False}
    assert [(tuple(t.shape), t.dtype) for t in inputs] == [((1, 1, 8, 8), torch.float32), ((2, 3), torch.int64)]
    assert not model.training


@pytest.mark.skipif(not hasattr(torch.onnx, "ops"), reason="torch's exporter writes DequantizeLinear since 2.8")
def test_onnx_runs(said, folder):
    """The file is that of the network: ONNX Runtime gets torch's outputs."""
    runtime = pytest.importorskip("onnxruntime")
    (folder / "runs.py").write_text(
        "from networks import Lit\n\n\nclass Runs(Lit):\n    def forward(self, x):\n        return self.net(x)\n"
    )
    command = ["export", "net.ckpt", "--model", "runs:Runs", "-o", "out.onnx", "--to", "onnx", "--round-to", "4"]
    assert said(*command, "--input", "1,1,8,8")[0] == 0
    session = runtime.InferenceSession("out.onnx", providers=["CPUExecutionProvider"])
    images = next(iter(batches()))[0]
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    expected = load_from_checkpoint(Lit, "net.ckpt").eval().net(images)
    torch.testing.assert_close(torch.from_numpy(found), expected.detach(), rtol=1e-4, atol=1e-4)
    command[1], command[5] = "net.scnn", "packed.onnx"
    assert said(*command, "--input", "1,1,8,8")[0] == 0
    assert (folder / "packed.onnx").read_bytes() == (folder / "out.onnx").read_bytes()


def test_a_float_checkpoint_says_so(said):
    """A network that was never compressed is written, with a line that says so."""
    status, _, err = said("export", "float.ckpt", *MODEL, "-o", "out.scnn")
    assert status == 0
    assert err.startswith("selfcompress: Nothing in this Lit is compressed")
    assert err.count("\n") == 1


def test_by_the_console_script(folder, tmp_path):
    """The installed command finds a class in the current folder, and its file opens."""
    (tmp_path / "mine.py").write_text("from networks import Lit\n\n\nclass Mine(Lit):\n    pass\n")
    script = shutil.which("selfcompress", path=str(Path(sys.executable).parent))
    command = [script] if script else [sys.executable, "-m", "lightning_selfcompress.cli"]
    path = [str(Path(networks.__file__).parent), str(Path(__file__).parents[2])]
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


@pytest.mark.skipif(not hasattr(torch.onnx, "ops"), reason="torch's exporter writes DequantizeLinear since 2.8")
def test_the_fastest_onnx_file(said, folder):
    """With ``--fastest`` the times of all forms are told beside the file; no other kind of file has forms."""
    pytest.importorskip("onnxruntime")
    (folder / "fast.py").write_text(
        "from networks import Lit\n\n\nclass Fast(Lit):\n    def forward(self, x):\n        return self.net(x)\n"
    )
    command = ["export", "net.ckpt", "--model", "fast:Fast", "-o", "out.onnx", "--fastest"]
    status, lines, err = said(*command, "--to", "onnx", "--input", "1,1,8,8")
    assert (status, len(lines)) == (0, 1)
    assert all(f"{form} " in err for form in ("float", "multiply", "dequantize"))
    assert "ms (kept)" in err
    status, _, err = said(*command, "--to", "packed")
    assert status == 1
    assert "Expected --fastest with --to onnx" in err
