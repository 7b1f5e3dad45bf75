"""Every snippet of the README and of the documentation runs, and what they show exists."""

import json
import re
from pathlib import Path

import pytest
import torch
from mktestdocs import check_md_file

import lightning_selfcompress

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted(ROOT.glob("docs/**/*.md"))}
README = (ROOT / "README.md").read_text("utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
DOCUMENTS = {"README.md": README, "CONTRIBUTING.md": CONTRIBUTING, "benchmarks/README.md": BENCHMARKS, **PAGES}


def results(name):
    """The runs of a benchmark, a line of JSON each."""
    return (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text("utf-8")


@pytest.mark.parametrize("name", [name for name, text in DOCUMENTS.items() if "```python" in text])
def test_python_snippets_run(name, monkeypatch, tmp_path):
    """A document's Python, run from top to bottom in one namespace, raises nothing."""
    if name == "docs/onnx.md" and not hasattr(torch.onnx, "ops"):
        pytest.skip("ONNX files are written from torch 2.8 on")
    monkeypatch.chdir(tmp_path)
    check_md_file(ROOT / name, memory=True)


def test_make_targets_exist():
    """Every ``make`` command of a document is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z-]+)", README, re.M))
    commands = {c for text in DOCUMENTS.values() for c in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M)}
    assert commands <= targets


def test_selfcompress_commands_parse():
    """Every ``selfcompress`` command of a document is understood by the command line."""
    from lightning_selfcompress.cli.main import parser

    commands = [c for text in DOCUMENTS.values() for c in re.findall(r"^selfcompress (.+)$", text, re.M)]
    used = {parser().parse_args(re.sub(r"\s+#.*", "", command).split()).command for command in commands}
    assert used == {"demo", "inspect", "export", "diff", "report", "sweep"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files(name):
    """Pictures and files that a document links to are in the repository, where its links say."""
    text = re.sub(r"```.*?```", "", DOCUMENTS[name], flags=re.S)
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    generated = {ROOT / "docs" / page for page in ("benchmarks.md", "changelog.md", "contributing.md")}
    missing = [link for link in links if not ((ROOT / name).parent / link).exists()]
    assert missing == []
    assert not [link for link in links if ((ROOT / name).parent / link).resolve() in generated]


def test_every_page_is_in_the_navigation():
    """A page of the folder is found by who looks through the site, and the README names each that is no reference."""
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"^ *- (?:\w+: )?(\S+\.md)$", navigation, re.M))
    elsewhere = {"index.md", "benchmarks.md", "changelog.md", "contributing.md"}
    assert listed == {name.removeprefix("docs/") for name in PAGES} | elsewhere
    assert {name for name in PAGES if "/api/" not in name and f"]({name})" not in README} == {"docs/releasing.md"}


@pytest.mark.parametrize("name", lightning_selfcompress.__all__)
def test_public_names_are_on_a_page(name):
    """Every public name has its place among the pages of the reference, and one alone."""
    reference = "\n".join(text for page, text in PAGES.items() if page.startswith("docs/api/"))
    assert len(re.findall(rf"^::: lightning_selfcompress\.{name}$", reference, re.M)) == 1


def test_figures_of_choosing_are_measured():
    """The accuracies and bytes of *Choosing gamma, steps and learning rate* are in the results of its benchmarks."""
    runs = [json.loads(line) for name in ("budget", "choosing") for line in results(name).splitlines()]
    known = {f"{run['accuracy']:.2f}" for run in runs} | {f"{run['nbytes']:,}" for run in runs}
    tables = re.findall(r"^\| (?:float|[\d.]+) \|(.*)$", PAGES["docs/choosing.md"], re.M)
    found = {figure for row in tables for figure in re.findall(r"\d+\.\d\d|\d+,\d{3}", row)}
    assert found - {"1,680"} <= known  # steps
    assert len(found) > 15
