"""CONTRIBUTING has a line per module, README the measured results, and links lead somewhere.

After a change of a first line, the files or the results: python tests/test_readme.py writes
both anew.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path
from statistics import geometric_mean

from nuteprune.model.families import FAMILIES

ROOT = Path(__file__).parents[1]
DENSE = 134_515_008  # parameters of the embedded model
SOURCE = ROOT / "src" / "nuteprune"
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
RESULTS = re.compile(r"(?<=<!-- results -->\n\n).*?(?=\n\n)", re.S)
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


def result_table() -> str:
    """Return README's table: what NutePrune's runs of the frontier came to."""
    found = json.loads((ROOT / "benchmarks" / "results" / "frontier.json").read_text("utf-8"))
    rows = [x for x in found["rows"] if x["method"] == "surgeon" and x["minutes"] > 6]
    rows.sort(key=lambda x: (x["target"], x["minutes"]))
    answers = rows[0]["answers"]
    cells = [
        ["", "dense", *(f"{x['target']:.0%} removed, {x['minutes']:g} minutes" for x in rows)],
        ["---"] * (len(rows) + 2),
        ["parameters", f"{DENSE / 1e6:.1f}M", *(f"{x['params'] / 1e6:.1f}M" for x in rows)],
        [
            "other text",
            "1 x",
            *(f"{times(x['other'], found['dense']['other']):.2f} x" for x in rows),
        ],
        [
            "answers that loop",
            f"{answers['looping']['before']:.0f} %",
            *(f"{x['answers']['looping']['after']:.0f} %" for x in rows),
        ],
        [
            "context kept",
            "100 %",
            *(f"{next(iter(x['context'].values()))['kept']:.0f} %" for x in rows),
        ],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def times(ours: dict[str, float], dense: dict[str, float]) -> float:
    return geometric_mean(x / dense[name] for name, x in ours.items())


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


def test_readme_has_the_results() -> None:
    assert RESULTS.findall(README.read_text(encoding="utf-8")) == [result_table()]


def test_readme_counts_the_families() -> None:
    assert f"\n{len(FAMILIES)} model types are supported" in README.read_text(encoding="utf-8")


def test_readme_is_short() -> None:
    """A visitor with three minutes reads it to its end."""
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    assert len(text.split()) <= 900
    assert all(len(x) <= 120 for x in text.splitlines() if not x.startswith("|"))


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
    README.write_text(RESULTS.sub(lambda _: result_table(), text), encoding="utf-8")
    text = CONTRIBUTING.read_text(encoding="utf-8")
    CONTRIBUTING.write_text(TREE.sub(lambda _: module_tree(), text), encoding="utf-8")
