"""What mkdocs does beyond its settings: the changelog becomes a page, and links that leave docs/ are taken care of.

The pages are read in the repository as well, where such links lead somewhere.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\[([^]]*)\]\(((?!https?://|#|mailto:)[^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the changelog, which lies outside docs/."""
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to files outside the site at the repository, if the settings name one, and else keep their text."""
    folder = "" if page.file.src_uri == "changelog.md" else posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def resolved(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))  # from the root of the repository
        if path.startswith("docs/"):
            inside = posixpath.relpath(path, posixpath.join("docs", posixpath.dirname(page.file.src_uri)))
            return f"[{text}]({inside})"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})" if config.repo_url else text

    return _LINK.sub(resolved, markdown)
