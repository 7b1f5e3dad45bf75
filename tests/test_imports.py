"""What is imported when: a public name at its first use, and nothing that it does without."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lightning_selfcompress

ROOT = str(Path(lightning_selfcompress.__file__).parent.parent)

# Stands for an environment in which only torch and numpy are installed.
BARE = """
    import sys
    from importlib.machinery import PathFinder

    ABSENT = {"lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "tensorboard", "onnx", "onnx_ir",
              "onnxscript", "onnxruntime", "sklearn", "matplotlib", "pooch", "rich", "jsonargparse"}

    class Bare(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return None if name.partition(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)

    sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run(code):
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_serving_needs_torch_and_numpy_alone(tmp_path):
    """Files are written, read and finalized where neither Lightning nor torchmetrics is installed."""
    code = f"""
        import torch
        from torch import nn
        from lightning_selfcompress import convert, export, finalize, load, remove_dead_channels, size_report

        net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        convert(net)
        net[0].bit_depth.data[1] = net[0].bias.data[1] = 0
        x = torch.randn(3, 8)
        remove_dead_channels(net, lambda net, x: net(x), inputs=[x])
        nbytes = export(net, {str(tmp_path / "net.scnn")!r})
        plain = load({str(tmp_path / "net.scnn")!r}, into=nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)))
        assert nbytes == size_report(net).nbytes
        assert torch.equal(plain(x), finalize(net)(x))
        print(plain[0].out_features, "lightning" in sys.modules)
    """
    assert run(textwrap.dedent(BARE) + textwrap.dedent(code)) == "5 False\n"


def test_what_needs_lightning_says_so():
    """Where Lightning is missing the callback's import names it."""
    code = """
        try:
            from lightning_selfcompress import SelfCompression
        except ModuleNotFoundError as error:
            print(error.name)
    """
    assert run(textwrap.dedent(BARE) + textwrap.dedent(code)) == "lightning\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["export", "--help"], ["inspect"]])
def test_help_imports_no_torch(arguments):
    """Help, the version and mistakes on the command line are there before torch could be imported."""
    code = f"""
        import sys
        from lightning_selfcompress.cli.main import main
        try:
            main({arguments!r})
        except SystemExit:
            print("torch" in sys.modules, "numpy" in sys.modules)
    """
    assert run(code).endswith("False False\n")


def test_version_is_told():
    """``selfcompress --version`` prints the package's version."""
    code = 'from lightning_selfcompress.cli.main import main; main(["--version"])'
    assert run(code) == f"selfcompress {lightning_selfcompress.__version__}\n"


def test_importing_the_package_imports_nothing_else():
    """The package itself is empty until something of it is asked for."""
    code = "import sys, lightning_selfcompress; print('torch' in sys.modules)"
    assert run(code) == "False\n"


def test_unknown_names_are_refused():
    """A name that the package does not have raises as for any module."""
    with pytest.raises(AttributeError, match="module 'lightning_selfcompress' has no attribute 'nothing'"):
        _ = lightning_selfcompress.nothing


def test_constants_that_the_parser_repeats():
    """What help lists without importing anything is what the commands take."""
    from lightning_selfcompress.cli import parser
    from lightning_selfcompress.demo import data
    from lightning_selfcompress.demo.run import TASKS
    from lightning_selfcompress.onnx.export import WEIGHTS

    assert set(parser.DATA_SETS) == set(TASKS)
    assert parser.ONNX_WEIGHTS == WEIGHTS
    assert parser.DATA_VARIABLE == data.DATA_VARIABLE
