"""Every command that the README and the docs show works: executed on tiny stand-ins, or parsed.

And the site has all pages, and the API page names what is there.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from nuteprune.cli.app import make_app
from tests.conftest import Run
from tests.scripts import script

from .conftest import TINY

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

EXECUTED = "executed, on the stand-ins of `workspace`"
DRY = "needs the hub and an accelerator: executed with --dry-run, on stand-ins"
PARSED = "needs the hub, other programs or several processes: its options are checked"
LARGE = "no stand-in is as large or as slow: its options are checked; other tests run its like"
LIKE = "another of these, or of test_json.py, differs in names and numbers: options are checked"

HOW = {
    "nuteprune demo --out first": LIKE,
    "nuteprune prune Qwen/Qwen3-0.6B --sparsity 0.2 --data my_text.jsonl --out small "
    "--dry-run": LIKE,
    "nuteprune prune Qwen/Qwen3-0.6B --sparsity 0.2 --data my_text.jsonl --out small "
    "--steps 400": EXECUTED,
    "nuteprune prune Qwen/Qwen3-0.6B --sparsity 0.2 --data my_text.jsonl --data self "
    "--shares 0.7,0.3 --out small": EXECUTED,
    "nuteprune prune Qwen/Qwen3-0.6B --sparsity 0.2 --data my_text.jsonl --out small "
    "--minutes 60": PARSED,
    "nuteprune demo": PARSED,
    "nuteprune prune demo --sparsity 0.1,0.2,0.3 --out ladder --steps 90": EXECUTED,
    "nuteprune prune MODEL --sparsity 0.2 --data DATA --out OUT --method wanda": EXECUTED,
    "nuteprune prune MODEL --speedup 1.3 --data DATA --out OUT": LARGE,
    "nuteprune prune MODEL --speedup 1.2,1.5@both:1x512+64 --data DATA --out OUT": LARGE,
    "nuteprune prune MODEL --speedup 1.3 --costs costs.json --data DATA --out OUT": LARGE,
    "nuteprune bench MODEL --save-costs costs.json --lengths 256 --new-tokens 32 "
    "--device cpu": LIKE,
    "nuteprune prune MODEL --sparsity 0.3 --set for_quantization=true --data DATA --out OUT": LARGE,
    "nuteprune prune MODEL --shape half.yaml --shapes uniform --data DATA --out OUT": LARGE,
    "nuteprune prune MODEL --sparsity 0.45 --shapes uniform --data DATA --out OUT": LARGE,
    "nuteprune prune MODEL --params 100M --data DATA --out OUT": LARGE,
    "nuteprune prune MODEL --size 200MB --data DATA --out OUT": LARGE,
    "nuteprune prune MODEL --memory 300MB@2048 --data DATA --out OUT": LARGE,
    "nuteprune prune huggyllama/llama-7b --config recipes/llama-7b.yaml --out small --dry-run": DRY,
    "nuteprune prune huggyllama/llama-7b --config recipes/llama-7b.yaml --out small": LIKE,
    "nuteprune prune huggyllama/llama-7b --config recipes/paper.yaml --data c4.jsonl "
    "--out small": DRY,
    "nuteprune prune MODEL --sparsity 0.3 --data DATA --out small --bits 8": EXECUTED,
    "nuteprune write MODEL --tokens 163840 --out own.jsonl": LIKE,
    "nuteprune prune MODEL --sparsity 0.3 --data DATA --out small --steps 400 "
    "--own-text own.jsonl": LARGE,
    "nuteprune prune MODEL --sparsity 0.3 --data DATA --out small --offload": PARSED,
    "torchrun --nproc_per_node 4 -m nuteprune.cli prune MODEL --sparsity 0.3 --data DATA "
    "--out small": PARSED,
    "torchrun --nproc_per_node 4 -m nuteprune.cli prune MODEL --sparsity 0.3 --data DATA "
    "--out small --set sharded=true": PARSED,
    "torchrun --nnodes 2 --node_rank 0 --master_addr FIRST --nproc_per_node 8 -m nuteprune.cli "
    "prune MODEL --sparsity 0.3 --data DATA --out small": PARSED,
    "accelerate launch --num_processes 4 -m nuteprune.cli prune MODEL --sparsity 0.3 --data DATA "
    "--out small": PARSED,
    "nuteprune prune MODEL --sparsity 0.2 --data DATA --out OUT "
    "--set report_to=tensorboard": PARSED,
    "nuteprune eval small --against Qwen/Qwen3-0.6B --data my_text.jsonl --data demo": PARSED,
    "nuteprune eval small --against demo --data demo --data code.jsonl "
    "--data medicine.jsonl": PARSED,
    "nuteprune eval ladder/sparsity-0.2 --against demo": EXECUTED,
    "nuteprune eval small --against demo --prompts asked.jsonl --answer-tokens 128": EXECUTED,
    "nuteprune eval small --against Qwen/Qwen3-0.6B --tasks commonsense7 --batch-size 16": PARSED,
    "nuteprune eval small --tasks school --include-path my-tasks": PARSED,
    "nuteprune eval better --against huggyllama/llama-7b --data wikitext2 "
    "--tasks commonsense7": PARSED,
    "nuteprune bench small --against Qwen/Qwen3-0.6B --save": EXECUTED,
    "nuteprune bench small --against demo": LIKE,
    "nuteprune bench better --against huggyllama/llama-7b --batch-sizes 1,8 --lengths 512": LIKE,
    "nuteprune recover small --data my_instructions.jsonl --out better": EXECUTED,
    "nuteprune recover small --out better --steps 100": LIKE,
    "nuteprune recover demo --out dense-tuned --steps 100": EXECUTED,
    "nuteprune recover small --data alpaca.json --out better": EXECUTED,
    "nuteprune export small --to gguf --out small.gguf --type q8_0": EXECUTED,
    "nuteprune export better --to gguf --out better.gguf": LIKE,
    "nuteprune export PRUNED --to gguf --out model.gguf --type q8_0": LIKE,
    "nuteprune export PRUNED --to onnx --out model.onnx": PARSED,
    "nuteprune vocab Qwen/Qwen3-0.6B --data my_text.jsonl --keep 32768 --out small": LARGE,
    "nuteprune family MODEL --out family.yaml": EXECUTED,
    "nuteprune prune MODEL --sparsity 0.2 --data DATA --out OUT --family family.yaml": EXECUTED,
    "nuteprune inspect small": EXECUTED,
    "nuteprune plan Qwen/Qwen3-8B --sparsity 0.2 --device-memory 24GiB": EXECUTED,
    "nuteprune report small": EXECUTED,
}
"""Each command in a block of code of README and docs -> how it is held to work."""


def shown() -> list[str]:
    """Return the commands in blocks of code, each once."""
    found = {}
    for page in PAGES:
        blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text("utf-8"), re.S | re.M)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            if re.match(r" *(nuteprune |(torchrun|accelerate) .* nuteprune\.cli )", line):
                found[" ".join(shlex.split(line, comments=True))] = page.name
    return list(found)


def arguments(command: str) -> list[str]:
    """Return what nuteprune gets of a command."""
    parts = shlex.split(command)
    start = parts.index("nuteprune.cli" if "nuteprune.cli" in parts else "nuteprune")
    return parts[start + 1 :]


def test_every_command_is_listed_and_none_that_is_gone() -> None:
    assert sorted(shown()) == sorted(HOW)


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c, how in HOW.items() if how in (EXECUTED, DRY)])
def test_commands_run(command: str, in_workspace: Path, workspace: Path, run: Run) -> None:
    name, *rest = arguments(command)
    out = Path(rest[rest.index("--out") + 1]) if "--out" in rest else None
    if out is not None:
        out.unlink(missing_ok=True)  # the link to what an earlier command made
    small = list(TINY[name])
    if HOW[command] == DRY and "--dry-run" not in rest:
        small.append("--dry-run")
    if HOW[command] == DRY and "--data" not in rest:
        small += ["--data", "my_text.jsonl"]
    if "ladder" in rest[0]:
        (in_workspace / "ladder").mkdir()
        (in_workspace / rest[0]).symlink_to(workspace / "small")
    code, stdout, stderr = run(name, *rest, *small)
    assert code == 0, stderr
    assert len(stdout.splitlines()) > 1
    if out is not None:
        assert out.exists() == ("--dry-run" not in [*rest, *small])


def named_options() -> list[tuple[str, str]]:
    """Return (command, options) of all commands, those in running text too."""
    found = [(arguments(c)[0], c) for c in HOW]
    for page in PAGES:
        text = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.S | re.M)
        for span in re.findall(r"`([^`]+)`", text):
            said = " ".join(span.split())
            words = said.removeprefix("nuteprune ").split()
            if words and (said.startswith("nuteprune ") or words[0] in TINY):
                found.append((words[0], said))
    return found


def test_every_option_that_is_named_exists() -> None:
    import typer

    commands = typer.main.get_command(make_app()).commands  # type: ignore[attr-defined]
    known = {
        name: {option for param in command.params for option in param.opts}
        for name, command in commands.items()
    }
    for command, said in named_options():
        assert command in known, said
        given: list[Any] = re.findall(
            r"(?<![\w-])--[a-z][a-z-]*", said.partition("nuteprune.cli")[2] or said
        )
        assert set(given) <= known[command] | {"--help"}, said


@pytest.mark.parametrize("name", ["settings.md", "json.md"])
def test_generated_pages_are_what_is_declared(name: str) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert page == script("reference", "docs").PAGES[name](), "python docs/reference.py"


def test_the_site_has_every_page() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [page for part in parts for page in pages(part)]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages(nav)) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_api_page_names_what_is_there() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: (\S+)\n(?: +options:\n +members: \[(.*)\])?", text, re.M)
    assert len(named) >= 8
    for path, members in named:
        module, _, last = path.rpartition(".")
        try:
            found = importlib.import_module(path)
        except ModuleNotFoundError:
            found = getattr(importlib.import_module(module), last)
        assert found.__doc__
        for member in filter(None, members.split(", ")):
            assert hasattr(found, member), f"{path}.{member}"


def block_with(page: str, words: str) -> str:
    """Return the one block of Python on a page that has such words."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    (code,) = [block for block in blocks if words in block]
    return code


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # transformers' own default
def test_the_loop_of_the_page_runs_as_it_stands(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = "docs/stages.md"
    code = block_with(page, "NutePruneTrainer, training_blocks")
    assert code.count('"Qwen/Qwen3-0.6B"') == 2
    assert "max_steps=400," in code
    small = "max_steps=1, neuron_multiple=4, calibration_blocks=2,"
    code = code.replace("Qwen/Qwen3-0.6B", str(model)).replace("max_steps=400,", small)
    code = code.replace("my_text.jsonl", str(text)).replace("length=512", "length=24")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})
    assert (tmp_path / "small" / "nuteprune.json").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize("page", ["README.md", "docs/stages.md"])
def test_the_calls_of_the_pages_run_as_they_stand(page: str, in_workspace: Path) -> None:
    code = block_with(page, "nuteprune.prune(")
    for name in ("small", "better"):
        (in_workspace / name).unlink()  # the links to what the commands made
    tiny = 'steps=2, batch_size=2, device="cpu", dtype="float32"'
    pruned = f"{tiny}, length=24, calibration_blocks=2, eval_blocks=2"
    assert code.count("steps=400") == code.count('out="better"') == 1
    code = code.replace("steps=400", pruned)
    code = code.replace('out="better"', f'out="better", length=256, {tiny}')
    done: dict[str, Any] = {}
    exec(compile(code, page, "exec"), done)
    for name, record in (("small", done["record"]), ("better", done["better"])):
        written = json.loads((in_workspace / name / "nuteprune.json").read_text())
        assert record["out"] == name
        assert {key: record[key] for key in written} == written
    assert done["record"]["sparsity"] >= 0.2
