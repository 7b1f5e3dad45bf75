"""What the documentation needs besides its pages: formulas, and pages that lie elsewhere in the repository."""

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ELSEWHERE = {  # pages and files by their paths in the repository
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CITATION.cff": "CITATION.cff",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}

INLINE = r'<span class="arithmatex">\\\((.*?)\\\)</span>'  # as pymdownx.arithmatex leaves it


def formula(source: str, *_: Any, **__: Any) -> str:
    """Returns a block of LaTeX as MathML, which browsers draw without a script or a font of ours."""
    return f'<div class="formula">{convert(source, display="block")}</div>'


def on_page_content(html: str, **_: Any) -> str:
    """Makes a formula of what stands between two dollars."""
    return re.sub(INLINE, lambda found: convert(unescape(found[1])), html)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Makes a formula of each fenced block named ``math``, as the repository's own pages show it."""
    fence = {"name": "math", "class": "math", "format": formula}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and notebooks that lie elsewhere."""
    root = Path(config.config_file_path).parent
    notebooks = {path.relative_to(root).as_posix(): path for path in root.glob("notebooks/*.ipynb")}
    elsewhere = {page: root / path for path, page in ELSEWHERE.items()}
    for page, path in (elsewhere | notebooks).items():
        files.append(File.generated(config, page, content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Makes links that are right in the repository right in the site."""
    path = page.file.src_uri
    above = ("../docs/", "docs/") if path in ELSEWHERE.values() else ("../" * (path.count("/") + 1),)
    for beginning in above:
        markdown = markdown.replace(f"]({beginning}", "](")
    for source, name in ELSEWHERE.items():
        markdown = markdown.replace(f"]({source}", f"]({name}")
    return markdown
