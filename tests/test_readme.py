"""Every snippet of the README runs, and what it shows exists."""

import re
from pathlib import Path

import pytest
import torch
from mktestdocs import check_md_file

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_snippets_run(monkeypatch, tmp_path):
    """The README's Python, run from top to bottom in one namespace, raises nothing."""
    monkeypatch.chdir(tmp_path)
    can_export = hasattr(torch.onnx, "ops")  # since torch 2.8
    text = README if can_export else re.sub(r"^## ONNX$.*?(?=^## )", "", README, flags=re.M | re.S)
    Path("README.md").write_text(text)
    check_md_file(Path("README.md"), memory=True)


def test_make_targets_exist():
    """Every ``make`` command of the README is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    commands = set(re.findall(r"^make ([a-z-]+)", README, re.M))
    assert {"demo", "test"} <= commands <= targets


def test_selfcompress_commands_parse():
    """Every ``selfcompress`` command of the README is understood by the command line."""
    from lightning_selfcompress.cli.main import parser

    commands = re.findall(r"^selfcompress (.+)$", README, re.M)
    assert commands
    used = {parser().parse_args(re.sub(r"\s+#.*", "", command).split()).command for command in commands}
    assert used == {"demo", "inspect", "export", "diff", "report", "sweep"}


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_links_lead_to_files(link):
    """Pictures and files that the README links to are in the repository."""
    assert (ROOT / link).is_file()
