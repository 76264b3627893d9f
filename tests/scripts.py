"""Scripts under benchmarks/ and docs/ as modules: no package, they import one another by name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"


def script(name: str, folder: str = "benchmarks") -> Any:
    """Return a script of a folder as a module."""
    if str(ROOT / folder) not in sys.path:
        sys.path.insert(0, str(ROOT / folder))
    return importlib.import_module(name)
