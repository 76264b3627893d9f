"""README has a line per room, CONTRIBUTING one per module: the first lines of their docstrings.

After a change of a first line or of the files: python tests/test_readme.py writes both anew.
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "nuteprune"
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
ROOM = re.compile(r"^\| `src/nuteprune/.*\n", re.M)
TREE = re.compile(r"(?<=## The modules\n\n```\n).*?(?=```)", re.S)


def first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, path
    return docstring.splitlines()[0].rstrip(".")


def rooms() -> list[str]:
    """Return the package's folders in the order of the linter's contract, lowest layer first."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    layers = [x.strip("()") for x in tools["importlinter"]["contracts"][0]["layers"]]
    order = [x for x in reversed(layers) if (SOURCE / x).is_dir()]
    assert sorted(order) == sorted(path.parent.name for path in SOURCE.glob("*/__init__.py"))
    return order


def room_table() -> str:
    return "".join(
        f"| `src/nuteprune/{room}/` | {first_line(SOURCE / room / '__init__.py')} |\n"
        for room in rooms()
    )


def module_tree() -> str:
    lines = []
    for folder in (SOURCE, *(SOURCE / room for room in rooms())):
        if folder != SOURCE:
            lines.append(f"\n{folder.name}/: {first_line(folder / '__init__.py')}\n")
        for path in sorted(folder.glob("*.py") if folder == SOURCE else folder.rglob("*.py")):
            if path.name != "__init__.py":
                name = str(path.relative_to(SOURCE))
                lines.append(f"{name:26} {first_line(path).replace('`', '')}\n")
    return "".join(lines)


def test_readme_has_the_rooms() -> None:
    assert "".join(ROOM.findall(README.read_text(encoding="utf-8"))) == room_table()


def test_contributing_has_the_modules() -> None:
    assert TREE.findall(CONTRIBUTING.read_text(encoding="utf-8")) == [module_tree()]


def test_contributing_names_what_is_there() -> None:
    text, _, _ = CONTRIBUTING.read_text(encoding="utf-8").partition("## The modules")
    named = re.findall(r"`([\w/]+\.py)(?::(\w+))?`", text)
    assert len(named) > 60
    for name, attribute in named:
        path = SOURCE / name if (SOURCE / name).is_file() else ROOT / name
        found = re.search(rf"(?:def|class) {attribute}\b", path.read_text(encoding="utf-8"))
        assert not attribute or found, f"{name}:{attribute}"


def anchors(page: Path) -> set[str]:
    """Return what links to a page may name after #: its headings, as GitHub spells them."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", x).strip().lower().replace(" ", "-") for x in headings}


def test_links_lead_to_files_and_headings() -> None:
    for page in (README, CONTRIBUTING, ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, heading = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name}: {link}"
            assert not heading or heading in anchors(target), f"{page.name}: {link}"
            # The site brings along files, and cannot bring a folder.
            assert target.is_file() or not link.startswith("../"), f"{page.name}: {link}"


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    start = ROOM.search(text)
    assert start is not None
    rest = ROOM.sub("", text[start.start() :])
    README.write_text(text[: start.start()] + room_table() + rest, encoding="utf-8")
    text = CONTRIBUTING.read_text(encoding="utf-8")
    CONTRIBUTING.write_text(TREE.sub(lambda _: module_tree(), text), encoding="utf-8")
