"""Hooks of mkdocs.yml: the pages at the top of the repository as pages of the site.

Guarantees: their text is not copied anywhere. Links to pages of docs/ lead to these on the site; links to other files
of the repository, which the site doesn't hold, become plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[1]
TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# The names that tests find blocks by stand behind the language, where Markdown for the site knows only options.
_NAMED_BLOCK = re.compile(r"^( *```\w+) [\w-]+$", re.MULTILINE)
_CODE = re.compile(r'<code>[^<]*</code>|<div class="language-bash highlight">.*?</div>', re.DOTALL)
_OPTION = re.compile(r"--[a-z]\w+")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+://|#)([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of TOP."""
    for source, target in TOP.items():
        text = (REPOSITORY / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=for_site(text, source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """What the site writes differently."""
    markdown = _NAMED_BLOCK.sub(r"\1", markdown)
    if page.file.src_uri in TOP.values():
        return markdown
    return for_site(markdown, f"docs/{page.file.src_uri}")


def on_page_content(html: str, **_: Any) -> str:
    """Options in running text, tables and commands, marked so that site.css keeps `--name` on one line."""
    return _CODE.sub(lambda code: _OPTION.sub(r'<span class="option">\g<0></span>', code[0]), html)


def for_site(markdown: str, source: str) -> str:
    """The text of the page at `source`, a path below the repository, with links as the site needs them."""
    site_page = TOP.get(source) or source.removeprefix("docs/")

    def link(found: re.Match[str]) -> str:
        image, text, name, anchor = found.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), name))
        target = TOP.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target is None:
            return str(text)
        relative = posixpath.relpath(target, posixpath.dirname(site_page) or ".")
        return f"{image}[{text}]({relative}{anchor or ''})"

    return _LINK.sub(link, markdown)
