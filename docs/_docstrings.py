"""Docstrings as Markdown: examples become blocks of code, and roles become links."""

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"(?:^[ \t]*>>> .*\n?(?:^[ \t]*\S.*\n?)*)", re.M)
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`([^`]+)`")


def as_markdown(text: str) -> str:
    """Returns a docstring with its doctests fenced, and with its roles in plain code."""
    text = re.sub(r"[ \t]+# doctest: .*", "", text)
    text = EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)
    return ROLE.sub(r"`\1`", re.sub(r"::$", ":", text, flags=re.M))


class DocstringsAsMarkdown(Extension):
    """Hands mkdocstrings what it can show."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrites the docstring of each module, class and function."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
