"""docs/compatibility.md, the table of what works and what is refused: every line of it is a test that ran.

A test marked ``case(section, what)`` is one line. What it reads there is "works" once the test has passed, or the
message of the refusal that it expected with the ``refusal`` fixture. A passing test whose line is missing there fails;
``make table`` writes the file.
"""

import re
import textwrap
from contextlib import contextmanager
from pathlib import Path

import lightning
import pytest
import torch

TABLE = Path(__file__).parents[2] / "docs" / "compatibility.md"
VERSIONS = f"torch {torch.__version__.partition('+')[0]} and lightning {lightning.__version__}"
HEAD = f"""# What works with SelfCompression, and what is refused

Every line is a test that runs in CI. Written by `make table`, with {VERSIONS}.
"""
SECTIONS = (
    "Checkpoints",
    "Loading without a Trainer",
    "Strategies",
    "Precision",
    "Optimization",
    "Compilation",
    "Other callbacks",
    "Trainer options",
    "Loggers",
    "LightningCLI",
    "Packages",
    "Bad input",
)

_lines = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--write-table", action="store_true", help=f"write {TABLE.name} from the cases that were run")


def pytest_configure(config):
    config.stash[_lines] = {}


def case_of(item):
    """Section and description of a test's case, with its parameters filled in; None if it is none."""
    mark = item.get_closest_marker("case")
    if mark is None:
        return None
    section, what = mark.args
    if section not in SECTIONS:
        raise pytest.UsageError(f"{item.nodeid}: expected a section among {', '.join(SECTIONS)}, got {section!r}.")
    parameters = getattr(item, "callspec", None)
    return section, what.format_map(parameters.params) if parameters else what


def pytest_collection_modifyitems(config, items):
    """No two tests are the same case, and no line of the file is without a test if all tests were collected."""
    cases = [case for case in map(case_of, items) if case is not None]
    twice = {case for case in cases if cases.count(case) > 1}
    if twice:
        raise pytest.UsageError(f"Expected every case once, got {twice} several times.")
    if config.getoption("--write-table") or config.args != config.getini("testpaths") or config.option.keyword:
        return
    known = {f"| {what} |" for _, what in cases}
    stale = [row for row in _rows() if not any(row.startswith(what) for what in known)]
    if stale:
        raise pytest.UsageError(f"{TABLE.name} has lines without a test, run `make table`:\n" + "\n".join(stale))


class Refusal:
    """Expects a refusal and keeps what it said."""

    def __init__(self, hidden):
        self.hidden, self.message = hidden, ""

    @contextmanager
    def __call__(self, kind, match):
        """The block raises this kind of error."""
        with pytest.raises(kind, match=match) as caught:
            yield
        self._keep(str(caught.value))

    @contextmanager
    def warning(self, match):
        """The block goes on, with a warning that says what is not done."""
        with pytest.warns(UserWarning, match=match) as caught:
            yield
        self._keep(next(str(w.message) for w in caught if re.search(match, str(w.message))))

    def say(self, message):
        """Keeps a message that was seen elsewhere, for example in another process."""
        self._keep(message)

    def _keep(self, message):
        for path in self.hidden:
            message = message.replace(str(path), "…")
        self.message = textwrap.shorten(message, 400, placeholder=" …").replace("|", r"\|")


@pytest.fixture
def refusal(tmp_path):
    """Expects a refusal: its message becomes the line of the case in the table."""
    return Refusal([tmp_path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    case = case_of(item)
    if case is not None:
        refusal = item.funcargs.get("refusal")
        message = refusal.message if refusal is not None else ""
        row = f"| {case[1]} | {f'refused: {message}' if message else 'works'} |"
        item.config.stash[_lines].setdefault(case[0], []).append(row)
        if not item.config.getoption("--write-table") and not _is_told(row):
            pytest.fail(f"{TABLE.name} does not say\n{row}\nRun `make table`.", pytrace=False)
    return result


def pytest_sessionfinish(session, exitstatus):
    lines = session.config.stash[_lines]
    if not session.config.getoption("--write-table") or exitstatus:
        return
    count = sum(map(len, lines.values()))
    refused = sum("| refused: " in row for rows in lines.values() for row in rows)
    text = [HEAD, f"{count} cases, {refused} of them refused with a message.\n"]
    for section in SECTIONS:
        if section in lines:
            text += [f"## {section}\n", "| case | |", "| --- | --- |", *lines[section], ""]
    TABLE.write_text("\n".join(text), encoding="utf-8")


def _is_told(row):
    """Whether the file has a line; with other versions, whose messages may differ, whether it has the case."""
    text = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    case = row.partition(" | ")[0]
    return row in _rows() if VERSIONS in text else any(r.partition(" | ")[0] == case for r in _rows())


def _rows():
    text = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    return [row for row in text.splitlines() if row.startswith("| ") and row not in ("| case | |", "| --- | --- |")]
