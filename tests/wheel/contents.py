"""Whether the wheel holds the package and nothing else, and the source distribution what its tests read."""

import sys
import tarfile
import zipfile

NEEDED = (  # what tests open by path
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "docs/compatibility.md",
    "docs/format.md",
    "notebooks/1-quickstart.ipynb",
    "tests/support/zoo.py",
    "benchmarks/step_time.py",
)


def main(paths: list[str]) -> None:
    wheel = next(path for path in paths if path.endswith(".whl"))
    source = next(path for path in paths if path.endswith(".tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    foreign = [n for n in names if not n.startswith(("lightning_selfcompress/", "lightning_selfcompress-"))]
    assert not foreign, f"the wheel holds {foreign[:3]}"
    data = ["py.typed", *(f"reporting/template/page.{kind}" for kind in ("html", "css", "js"))]
    absent = [name for name in data if f"lightning_selfcompress/{name}" not in names]
    assert not absent, f"the wheel has no {absent}"
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    missing = [name for name in NEEDED if name not in inside]
    assert not missing, f"the source distribution has no {missing}"


if __name__ == "__main__":
    main(sys.argv[1:])
