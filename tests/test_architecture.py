"""The shape of the package: folders in one order, lightning at the edge, small files, no hidden name."""

import ast
import importlib
import pkgutil
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import lightning_selfcompress

PACKAGE = Path(lightning_selfcompress.__file__).parent
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
FOLDERS = [name.removesuffix(".__init__") for name in FILES if name.endswith(".__init__")]
STAGES = (  # each imports only those before it
    "errors",
    "tensors",
    "tables",
    "quantize",
    "activations",
    "packing",
    "channels",
    "size",
    "metrics",
    "running_statistics",
    "removal",
    "files",
    "onnx",
    "budget",
    "training",
    "monitoring",
    "callback",
    "reporting",
    "demo",
    "cli",
)
MAY_IMPORT_LIGHTNING = ("callback", "training", "monitoring", "reporting", "demo", "cli")


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


def stage_of(stem):
    return stem.partition(".")[0]


def test_the_parser_sees_imports(tmp_path):
    """Plain, nested, renamed and relative imports are all seen."""
    file = tmp_path / "file.py"
    file.write_text("import a.b as c\nfrom d import e\ndef f():\n    from .g import h\n    from . import i\n")
    own = PACKAGE.name
    assert imported(file) == {"a.b", "d", "d.e", f"{own}.g", f"{own}.h", own, f"{own}.i"}


def test_every_file_is_in_the_order():
    """The order names every file and folder of the package, and nothing else."""
    assert {stage_of(stem) for stem in FILES} - {"__init__"} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_only_earlier_ones(stage):
    """Imports run one way: no folder imports a later one."""
    for stem in (stem for stem in FILES if stage_of(stem) == stage):
        assert {stage_of(name) for name in imported_files(stem)} <= set(STAGES[: STAGES.index(stage) + 1])
        if stage not in ("cli", "demo"):  # which may ask for the version
            assert PACKAGE.name not in imported(FILES[stem])


def test_nothing_imports_in_circles():
    """Within a folder files import in one direction too."""
    order = list(TopologicalSorter({stem: imported_files(stem) for stem in FILES}).static_order())
    assert sorted(order) == sorted(FILES)


@pytest.mark.parametrize("stem", FILES)
def test_lightning_stays_at_the_edge(stem):
    """Only the callback, its stages, the demo and the command line know of lightning; the rest is plain torch."""
    roots = {name.split(".")[0] for name in imported(FILES[stem])}
    uses_lightning = bool(roots & {"lightning", "pytorch_lightning", "lightning_fabric"})
    assert not uses_lightning or stage_of(stem) in MAY_IMPORT_LIGHTNING


def test_few_files_lie_beside_the_folders():
    """The top of the package has at most seven files of its own."""
    assert len(list(PACKAGE.glob("*.py"))) <= 7


@pytest.mark.parametrize("stem", FILES)
def test_files_and_functions_are_short(stem):
    """No file has over 400 lines, and no function over 45."""
    text = FILES[stem].read_text(encoding="utf-8")
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if _code_lines(f) > 45}
    assert len(text.splitlines()) <= 400
    assert long == {}


def _code_lines(function):
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_name_hides_a_file(folder):
    """What a folder has under the name of one of its files is that file."""
    name = PACKAGE.name if folder == "__init__" else f"{PACKAGE.name}.{folder}"
    package = importlib.import_module(name)
    for inner in (m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "__main__"):
        importlib.import_module(f"{name}.{inner}")
        assert isinstance(getattr(package, inner), ModuleType)


def test_public_names():
    """What a type checker is told of the top is what is declared public, and what is imported when asked for."""
    public = lightning_selfcompress.__all__
    top = ast.parse(FILES["__init__"].read_text(encoding="utf-8")).body
    checked = next(node for node in top if isinstance(node, ast.If)).body
    homes = {alias.name: node.module for node in checked for alias in node.names}
    assert sorted(homes) == sorted(public)
    assert {n: f"{PACKAGE.name}.{home}" for n, home in lightning_selfcompress._HOMES.items()} == homes
    assert all(hasattr(lightning_selfcompress, name) and name in dir(lightning_selfcompress) for name in public)
