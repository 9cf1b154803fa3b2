"""Hooks of mkdocs.yml: pages from files outside of docs/, and links that work on the host too.

README.md, the READMEs of configs and kernels and the project's other Markdown files are pages of
the site. A link is written as the repository's host resolves it, relative to its file; here it
becomes one to the page, or plain text where the target is a file that is no page. A target that
does not exist is a warning, which ends a strict build.
"""

import logging
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PROJECT = Path(__file__).resolve().parents[2]
# Page of the site -> file of the project.
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "kernels.md": "kernels/README.md",
    **{
        f"configs/{path.parent.name}.md": path.relative_to(PROJECT).as_posix()
        for path in sorted(PROJECT.glob("configs/*/README.md"))
    },
}
PAGE_OF = {source: page for page, source in PAGES.items()}
FENCE = re.compile(r"^(```.*?^```)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
log = logging.getLogger("mkdocs.hooks.site")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are no files of docs/."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(PROJECT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_) -> str:
    """Resolves a page's links, but for those in blocks of code."""
    name = page.file.src_uri
    source = PAGES.get(name, f"docs/{name}")
    parts = FENCE.split(markdown)
    for number in range(0, len(parts), 2):
        parts[number] = LINK.sub(lambda link: _resolve(link, name, source), parts[number])
    return "".join(parts)


def _resolve(link: re.Match, page: str, source: str) -> str:
    mark, text, target = link.groups()
    path, hash_mark, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return link[0]
    found = os.path.normpath(os.path.join(os.path.dirname(source), path))
    if not (PROJECT / found).exists():
        log.warning("%s links to %s, which does not exist", source, target)
        return link[0]
    inside = PAGE_OF.get(found, found[5:] if found.startswith("docs/") else None)
    if inside is None:
        return text
    relative = os.path.relpath(inside, os.path.dirname(page) or ".")
    return f"{mark}[{text}]({relative}{hash_mark}{anchor})"
