"""The README tells of every module, and names none that is gone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tree_is_the_modules_own_first_lines() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## What is where")[1].split("```")[1]
    listed = [line for line in tree.splitlines() if line.startswith("  ")]
    source = ROOT / "src" / "nuteprune"
    told = []
    for path in source.rglob("*.py"):
        if path.name != "__init__.py":
            first = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]
            name = str(path.relative_to(source))
            told.append(f"  {name:27} {first.rstrip('.').replace('`', '')}")
    assert sorted(listed) == sorted(told)


def test_links_lead_to_files() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            target = page.parent / link
            assert target.exists(), f"{page.name}: {link}"
            # The site brings along files, and cannot bring a folder.
            assert target.is_file() or not link.startswith("../"), f"{page.name}: {link}"
