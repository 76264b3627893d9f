"""What a release ships: the wheel is built through the sdist, installed aside and run there."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytestmark = pytest.mark.slow(10)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Installed:
    """A wheel, unpacked by pip into a folder that goes before this environment's packages."""

    wheel: Path
    folder: Path
    cwd: Path

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command that sees the wheel's nuteprune, never the checkout's."""
        done = subprocess.run(
            command,
            cwd=self.cwd,
            env=os.environ | {"PYTHONPATH": str(self.folder)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def nuteprune(self, *arguments: str | Path) -> str:
        """Run the installed console script; return its standard output."""
        return self.run(self.folder / "bin" / "nuteprune", *arguments).stdout


def _quiet(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    built, folder, cwd = (tmp_path_factory.mktemp(name) for name in ("built", "wheel", "cwd"))
    _quiet(sys.executable, "-m", "build", "--no-isolation", "--outdir", built, ROOT)
    [wheel] = built.glob("*.whl")
    # The dependencies are this environment's: only nuteprune itself is in question.
    _quiet(sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, wheel)
    return Installed(wheel, folder, cwd)


def test_the_wheel_holds_every_file_of_the_package(installed: Installed) -> None:
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "nuteprune").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"nuteprune/py.typed", "nuteprune/export/modeling_pruned.py"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_python_imports_the_wheel_not_the_checkout(installed: Installed) -> None:
    out = installed.run(sys.executable, "-c", "import nuteprune; print(nuteprune.__file__)").stdout
    assert Path(out.strip()).is_relative_to(installed.folder)


def test_help_names_the_main_commands(installed: Installed) -> None:
    out = installed.nuteprune("--help")
    assert "prune" in out
    assert "demo" in out


def test_a_tiny_prune_runs_from_the_wheel(
    installed: Installed, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dense, text, small = tmp_path / "dense", tmp_path / "text.txt", tmp_path / "small"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tiny_tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=tiny_tokenizer.pad_token_id,
            bos_token_id=tiny_tokenizer.bos_token_id,
            eos_token_id=tiny_tokenizer.eos_token_id,
        )
    ).save_pretrained(dense)
    tiny_tokenizer.save_pretrained(dense)
    text.write_text("".join(f"Sentence {i} says that {i} is not {i + 1}.\n" for i in range(500)))

    installed.nuteprune(
        *("prune", dense, "--sparsity", "0.3", "--data", text, "--out", small, "--steps", "2"),
        *("--batch-size", "2", "--length", "32", "--device", "cpu"),
    )

    record = json.loads((small / "nuteprune.json").read_text())
    before, blocks_before = _count(dense)
    after, blocks_after = _count(small)
    params = record["params"]
    assert (params["before"], params["after"]) == (before, after)
    assert (params["blocks_before"], params["blocks_after"]) == (blocks_before, blocks_after)
    assert 1 - blocks_after / blocks_before >= 0.3


def _count(checkpoint: Path) -> tuple[int, int]:
    """Count a checkpoint's parameters from its file: all, and those of the layers' linears."""
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    linears = (name for name in sizes if ".layers." in name and len(shapes[name]) == 2)
    return sum(sizes.values()), sum(sizes[name] for name in linears)
