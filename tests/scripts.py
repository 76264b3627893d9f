"""The scripts under benchmarks/ as modules: no package, they import one another by name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> Any:
    """Return a script of benchmarks/ as a module."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(name)
