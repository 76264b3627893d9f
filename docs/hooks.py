"""What mkdocs is to do besides: bring along the files outside of docs/ that pages link to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_LINK = re.compile(r"\]\(\.\./([^)#]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add each linked file to the site, under its path in the repository."""
    root = Path(config["config_file_path"]).parent
    for page in files.documentation_pages():
        for name in _LINK.findall(page.content_string):
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links to such files lead to where they are in the site."""
    return _LINK.sub(r"](\1)", markdown)
