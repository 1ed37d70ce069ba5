"""For the site: a link that leads out of docs/ (to settings, tests) is shown as its text alone.

In the repository such links work; the site has no such files.
"""

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^\]\n]+)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page."""
    folder = posixpath.dirname(page.file.src_uri)

    def kept(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        return f"`{match[1]}`" if target.startswith("..") else match[0]

    return _LINK.sub(kept, markdown)
