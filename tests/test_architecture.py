"""The shape of the package: stages in one order, lightning at the edge."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_selfcompress

PACKAGE = Path(lightning_selfcompress.__file__).parent
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
STAGES = (
    "quantizer",
    "layers",
    "parameters",
    "convert",
    "graph",
    "packing",
    "coupling",
    "terminal",
    "size",
    "metrics",
    "surgery",
    "shapes",
    "prune",
    "checkpoint",
    "finalize",
    "files",
    "export",
    "load",
    "onnx_batch",
    "onnx_nodes",
    "onnx_constants",
    "onnx_widths",
    "onnx_weights",
    "onnx_export",
    "inspection",
    "comparison",
    "presentation",
    "dryrun",
    "fade",
    "removal",
    "strategies",
    "neighbours",
    "conversion",
    "optim",
    "report",
    "callback",
)
MAY_IMPORT_LIGHTNING = ("callback", "demo", "data", "cli")  # beginnings of names


def imported(path):
    """Full names of what a file imports, wherever in the file it does so."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = PACKAGE.name if node.level else node.module
            names |= {f"{module}.{node.module}"} if node.level and node.module else {module}
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def imported_files(stem):
    """The files of the package that a file imports; a folder stands for its ``__init__``."""
    names = {name.removeprefix(f"{PACKAGE.name}.") for name in imported(FILES[stem])}
    folders = {f"{name}.__init__" for name in names if not stem.startswith(f"{name}.")}
    return (names | folders) & FILES.keys()


def test_the_parser_sees_imports(tmp_path):
    """Plain, nested, renamed and relative imports are all seen."""
    file = tmp_path / "file.py"
    file.write_text("import a.b as c\nfrom d import e\ndef f():\n    from .g import h\n    from . import i\n")
    own = PACKAGE.name
    assert imported(file) == {"a.b", "d", "d.e", f"{own}.g", f"{own}.h", own, f"{own}.i"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_only_earlier_ones(stage):
    """Imports run one way: no stage imports a later one, nor anything outside the order."""
    for stem in (stem for stem in FILES if stem.partition(".")[0] == stage):
        assert {name.partition(".")[0] for name in imported_files(stem)} <= set(STAGES[: STAGES.index(stage) + 1])
        assert PACKAGE.name not in imported(FILES[stem])


def test_nothing_imports_in_circles():
    """The files outside the order of stages import in one direction too."""
    order = list(TopologicalSorter({stem: imported_files(stem) for stem in FILES}).static_order())
    assert sorted(order) == sorted(FILES)


@pytest.mark.parametrize("stem", FILES)
def test_lightning_stays_at_the_edge(stem):
    """Only the callback, the demo, its data and the command line know of lightning; the rest is plain torch."""
    roots = {name.split(".")[0] for name in imported(FILES[stem])}
    uses_lightning = bool(roots & {"lightning", "pytorch_lightning", "lightning_fabric"})
    assert not uses_lightning or stem.startswith(MAY_IMPORT_LIGHTNING)


def test_public_names():
    """What the package imports at its top is what it declares public, each once and in order."""
    public = lightning_selfcompress.__all__
    top = ast.parse(FILES["__init__"].read_text(encoding="utf-8")).body
    assert sorted(alias.name for node in top if isinstance(node, ast.ImportFrom) for alias in node.names) == public
    assert [name for name in public if not hasattr(lightning_selfcompress, name)] == []
