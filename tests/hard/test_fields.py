"""One field of a file is changed: a result, or one line and exit code 1 or 2, and nothing written.

The file stays valid JSON, YAML, safetensors or GGUF, so that a parser lets it through. Whatever is
wrong after that must be found by nuteprune.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import random
import re
import resource
import shutil
import signal
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from nuteprune.data import demo as assets
from nuteprune.files import SUMS, write_sums
from nuteprune.model.families import FAMILIES
from tests.undrawn import leave_blank

from .conftest import SEED, Server, cases, make_demo, make_model
from .test_fuzz import _as_before, call, content_of  # noqa: F401 (a fixture)

pytestmark = pytest.mark.hard

CPU_SECONDS, SECONDS, MEMORY = 60, 1200, 2**33
"""After so long a command hangs; and the bytes that it may map besides what is mapped."""
QUICK = "--length 16 --device cpu"
SMALL = f"{QUICK} --dtype float32 --batch-size 2 --set=neuron_multiple=4 --set=calibration_blocks=2"
SMALL += " --set=eval_blocks=2 --set=lora_rank=2 --set=save_steps=2"

EXPORT = "export {} --to gguf --pre-tokenizer smollm --out out.gguf"
WRITE = f"write {{}} --tokens 20 {QUICK} --out out.jsonl"
VOCAB = "vocab {} --data text.jsonl --keep 290 --length 16 --out out"
PLAN = "plan {} --sparsity 0.3 --length 16"
EVAL = f"eval {{}} --data text.jsonl {QUICK}"
RECOVER = f"recover {{}} --data text.jsonl --steps 1 --out out {QUICK}"
DRY = f"prune model --data text.jsonl --out out --dry-run --steps 0 {SMALL}"
TRY = f"{DRY} --sparsity 0.3"
RESUME = f"prune model --data text.jsonl --out begun --resume --steps 4 --sparsity 0.3 {SMALL}"
OF_MODEL = {EXPORT: 12, WRITE: 6, PLAN: 1, TRY.replace("model", "{}", 1): 1, VOCAB: 1}
OF_PRUNED = {"inspect {}": 9, EXPORT: 5, "report {}": 4, EVAL: 1, RECOVER: 1}
OF_RUN = {RESUME: 1}


@dataclass(frozen=True)
class Entry:
    """A file that is changed, and what reads it.

    Args:
        file: its name; of several that match one is drawn.
        cases: how many.
        commands: command -> how often, beside the others; braces stand for the file's folder.
    """

    file: str
    cases: int
    commands: dict[str, int]


ENTRIES = {
    "config": Entry("model/config.json", 1500, OF_MODEL),
    "generation config": Entry(
        "model/generation_config.json", 500, {WRITE: 6, EXPORT: 3, VOCAB: 1}
    ),
    "tokenizer": Entry("model/tokenizer.json", 900, OF_MODEL),
    "tokenizer config": Entry("model/tokenizer_config.json", 600, OF_MODEL),
    "weights": Entry("model/model.safetensors", 700, {EXPORT: 6, WRITE: 4, TRY: 1}),
    "index": Entry("sharded/model.safetensors.index.json", 500, {EXPORT: 3, WRITE: 1}),
    "record": Entry("pruned/nuteprune.json", 900, OF_PRUNED),
    "pruned config": Entry("pruned/config.json", 500, OF_PRUNED),
    "pruned run": Entry("pruned/run/*.json*", 150, {"report {}/..": 1}),
    "settings": Entry("begun/run/settings.json", 25, OF_RUN),
    "products": Entry("begun/run/*.safetensors", 25, OF_RUN),
    "metrics and text": Entry("begun/run/[!s]*.json*", 25, OF_RUN),
    "checkpoint": Entry("begun/run/checkpoint-2/*.json", 25, OF_RUN),
    "checkpoint's state": Entry("begun/run/checkpoint-2/*.safetensors", 25, OF_RUN),
    "text": Entry("text.jsonl", 150, {TRY: 3, VOCAB.format("model"): 1}),
    "rows": Entry("rows.jsonl", 100, {RECOVER.format("pruned").replace("text", "rows"): 1}),
    "chats": Entry("chats.jsonl", 100, {TRY.replace("text", "chats"): 1}),
    "own text": Entry("own.jsonl", 100, {f"{TRY} --own-text own.jsonl": 1}),
    "recipe": Entry("recipe.yaml", 500, {f"{DRY} --config recipe.yaml": 1}),
    "shape": Entry("shape.yaml", 250, {f"{DRY} --shape shape.yaml": 1}),
    "costs": Entry("costs.json", 150, {f"{DRY} --speedup 1.1@decode:1x8+2 --costs costs.json": 1}),
    "family": Entry("family.yaml", 40, {"family model --family family.yaml": 1}),
    "GGUF": Entry("demo.gguf", 100, {EXPORT.format("demo"): 1}),
}
PROGRESS = re.compile(r": \d+/\d+( |$)")
"""What long work says on its way, on a machine that is busy."""
RUNS = ("--resume", "recover", "vocab")
"""What may have begun to write when it fails."""


# --- one field ---------------------------------------------------------------------------------

ODD = [
    *(None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 10**6, 2**31, 2**63, 10**30, 1e308, "", "x"),
    *("0", "../x", "\x1b[31m\u202e", "ß" * 300, [], {}, [[]], [1, 2], [None], {"a": 1}, {"": {}}),
]


def near(value: Any) -> list[Any]:
    """Return values that are a little off."""
    if isinstance(value, bool) or value is None:
        return [not value, str(value), [value]]
    if isinstance(value, (int, float)):
        return [value + 1, value - 1, 2 * value, -value, value / 2, str(value), [value]]
    if isinstance(value, str):
        return [value + "x", value[:-1], value.upper(), f" {value}", [value], {value: value}]
    if isinstance(value, list):
        return [value[:-1], value[1:], value + value[:1], value[::-1], [value], *value[:1]]
    return [list(value), list(value.values()), {"x": value}, *list(value.values())[:1]]


def change(tree: Any, draw: random.Random) -> tuple[Any, str]:
    """Return a copy with one field changed, and what is changed in words."""
    holder: Any = [copy.deepcopy(tree)]
    whole, key, way = holder, 0, []
    while isinstance(holder[key], (dict, list)) and holder[key]:
        if way and draw.random() < 0.25:
            break
        holder = holder[key]
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
        way.append(key)
    before, how = holder[key], draw.random()
    if how < 0.15 and way:
        del holder[key]
        return whole[0], f"{way} gone"
    if how < 0.25 and isinstance(holder, dict):
        holder[f"{key}s"] = holder.pop(key)
        return whole[0], f"{way} renamed"
    holder[key] = draw.choice(near(before) if how < 0.6 else ODD)
    return whole[0], f"{way} from {str(before)[:60]!r} to {str(holder[key])[:60]!r}"


def change_text(
    read: Callable[[str], Any], write: Callable[[Any], str], content: bytes, draw: random.Random
) -> tuple[bytes, str]:
    tree, what = change(read(content.decode()), draw)
    return write(tree).encode("utf-8", "surrogatepass"), what


def change_line(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    lines = content.splitlines(keepends=True)
    number = draw.randrange(len(lines))
    line, what = change_text(json.loads, json.dumps, lines[number], draw)
    return b"".join([*lines[:number], line, b"\n", *lines[number + 1 :]]), f"line {number}: {what}"


def change_header(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    size = int.from_bytes(content[:8], "little")
    header, what = change_text(json.loads, json.dumps, content[8 : 8 + size], draw)
    return len(header).to_bytes(8, "little") + header + content[8 + size :], what


def change_gguf(content: bytes, draw: random.Random, scratch: Path) -> tuple[bytes, str]:
    from gguf import GGUFReader

    scratch.write_bytes(content)
    reader = GGUFReader(scratch)
    fields = [*reader.fields.values(), *(x.field for x in reader.tensors)]
    # The demo's file is known by its sum; of 2^32 blocks transformers makes a list.
    field = draw.choice(
        [x for x in fields if x.data and x.offset and not x.name.endswith("block_count")]
    )
    part = draw.choice(field.data)
    at = field.offset + sum(x.nbytes for x in field.parts[:part])
    size = field.parts[part].nbytes
    new = draw.choice([bytes(size), b"\xff" * size, draw.randbytes(size), b"\1" + bytes(size - 1)])
    return content[:at] + new[:size] + content[at + size :], f"{field.name}: {new[:16]!r}"


CHANGES: dict[str, Callable[..., tuple[bytes, str]]] = {
    ".json": partial(change_text, json.loads, json.dumps),
    ".yaml": partial(change_text, yaml.safe_load, partial(yaml.safe_dump, allow_unicode=True)),
    ".jsonl": change_line,
    ".safetensors": change_header,
}


# --- what must come of it ----------------------------------------------------------------------


class Hangs(BaseException):
    """A command that takes too long."""


@pytest.fixture
def limits() -> Iterator[None]:
    """Bound the memory that a case may ask for, and end one that hangs."""

    def stop(*_: Any) -> None:
        raise Hangs

    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, before[1]))
    handler = signal.signal(signal.SIGPROF, stop)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, handler)
    faulthandler.cancel_dump_traceback_later()
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def good(
    server: Server, tiny_model: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with all that is changed, and that works as it is."""
    here = tmp_path_factory.mktemp("good")
    texts = make_model(here, tiny_model, tiny_tokenizer)
    rows = [{"instruction": x[:4], "output": x[20:24]} for x in texts]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = [{"messages": [x | {"content": text[:3]} for x in turns]} for text in texts]
    for name, lines in (("rows", rows), ("chats", chats)):
        (here / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    make_demo(here / "model", here / "demo_model", tiny_model)
    shutil.copytree(here / "model", here / "sharded")
    model = tiny_model("llama", vocab_size=320, num_hidden_layers=2)
    (here / "sharded" / "model.safetensors").unlink()
    model.save_pretrained(here / "sharded", max_shard_size="60KB")
    (here / "recipe.yaml").write_text(
        "sparsity: 0.3\nsteps: 0\nlearning_rate: 0.002\ngates: neurons\nmethod: taylor\nseed: 3\n"
        "set: {}\n".replace("set: {}\n", "")
        + "lr_scheduler_kwargs: {power: 0.5}\n"
    )
    (here / "shape.yaml").write_text(
        "layers:\n- {kv_heads: 1, neurons: 24}\n- {kv_heads: 2, neurons: 40}\n"
    )
    out = f"prune model --data text.jsonl --sparsity 0.3 {SMALL} --steps 4 --out"
    bench = "--lengths 8 --new-tokens 2 --batch-sizes 1 --device cpu --dtype float32"
    commands = [
        f"{out} pruned",
        f"{WRITE.format('model').replace('20', '900').replace('out.', 'own.')}",
        f"bench model --save-costs costs.json {bench}",
        f"bench pruned --against model --save --repeats 1 {bench}",
        "family model --out family.yaml --json",
        EXPORT.format("demo_model").replace("out.", "demo."),
    ]
    for command in commands:
        ended = server.run(command.split(), folder=here)
        assert ended.code == 0, (command, ended.said)
    begun = here / "begun"
    ended = server.run(f"{out} begun".split(), begun, folder=here)
    at = next(i for i, (phase, _) in enumerate(ended.events) if phase == "finalizing")
    shutil.rmtree(begun)
    ended = server.run(f"{out} begun".split(), begun, {"at": at, "how": "kill"}, folder=here)
    assert ended.code == -signal.SIGKILL
    (here / "pruned" / SUMS).unlink()  # as of a file that its author has changed
    return here


def wheel_of(folder: Path, *_: Any) -> Path:
    """Return the demo's wheel, with the model of a folder."""
    with zipfile.ZipFile(folder / "out.whl", "w") as archive:
        archive.write(folder / "demo.gguf", assets.MODEL.member)
    return folder / "out.whl"


def attempt(here: Path, file: str, content: bytes, command: str) -> tuple[int, str | None]:
    """Run a command with a file's other content; returns its exit code, and what is wrong."""
    good = content_of(here)
    families, path = dict(FAMILIES), here / file
    path.write_bytes(content)
    if (sums := path.parent / SUMS).is_file() and len(content) % 2:  # else its sum is told as wrong
        sums.unlink()
        write_sums(path.parent)
    begun = content_of(here)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        code, said = call(command.split())
    except Hangs:
        code, said = -1, "it hangs"
    except AssertionError as error:
        code, said = -1, str(error)
    except BaseException as error:
        code, said = -1, repr(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    ended = content_of(here)
    other = {x for x in begun | ended if begun.get(x, "") != ended.get(x, "")}
    for name in sorted(good.keys() ^ ended.keys(), reverse=True):
        if name in ended:
            (here / name).unlink() if (here / name).is_file() else (here / name).rmdir()
    for name, was in sorted(good.items()):
        if was is None:
            (here / name).mkdir(exist_ok=True)
        elif ended.get(name) != was:
            (here / name).write_bytes(was)
    FAMILIES.clear()
    FAMILIES.update(families)
    return code, judge(code, said, file, command, other)


def judge(code: int, said: str, file: str, command: str, written: set[str]) -> str | None:
    """Return what is wrong with how a command ended; None if nothing is."""
    lines = [x for x in said.splitlines() if x.strip() and not PROGRESS.search(x)]
    if code not in (0, 1, 2):
        return said
    if code and (len(lines) != 1 or not lines[0].startswith("nuteprune: ")):
        return f"code {code}, and no single line: {said[-600:]}"
    if code and "NUTEPRUNE_DEBUG" in said and not file.endswith(".gguf"):
        return said.strip()
    if any(x in said for x in "\x1b\u202e"):
        return f"control characters: {said!r}"
    out = command.partition("--out ")[2].split(" ")[0] or "pruned/"  # of a report
    began = code == 0 or (code == 1 and any(x in command for x in RUNS))
    places = ("out.whl", "out-cache", *([out] if began else []))
    left = sorted(x for x in written if not x.startswith(places))
    return f"code {code}, and written is {left}" if left else None


@pytest.mark.parametrize("name", ENTRIES)
def test_a_changed_field_is_a_result_or_one_line_and_nothing_written(
    name: str, good: Path, limits: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry = ENTRIES[name]
    leave_blank(monkeypatch.setattr)
    monkeypatch.chdir(good)
    monkeypatch.setenv("NUTEPRUNE_CACHE", str(good / "out-cache"))
    monkeypatch.setattr(assets, "fetch", lambda *_: wheel_of(good))
    files = sorted(str(x.relative_to(good)) for x in good.glob(entry.file))
    assert files
    wrong, codes = [], Counter[int]()
    for number in cases(entry.cases):
        draw = random.Random(f"{SEED} {name} {number}")
        file = draw.choice(files)
        command = draw.choices(list(entry.commands), list(entry.commands.values()))[0]
        command = command.format(os.path.dirname(file))
        ending = Path(file).suffix
        how = CHANGES.get(ending) or partial(change_gguf, scratch=tmp_path / "x.gguf")
        content, what = how((good / file).read_bytes(), draw)
        code, problem = attempt(good, file, content, command)
        codes[code] += 1
        if problem is not None:
            wrong.append(f"case {number} of seed {SEED}: {file} {what}: {command}: {problem}")
            print(wrong[-1])
    print(f"{name}: {codes.total()} files with one field changed: exit codes {dict(codes)}")
    assert wrong == []


@pytest.mark.parametrize("name", ENTRIES)
def test_the_good_file_is_good(
    name: str, good: Path, limits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(good)
    monkeypatch.setenv("NUTEPRUNE_CACHE", str(good / "out-cache"))
    monkeypatch.setattr(assets, "fetch", lambda *_: wheel_of(good))
    entry = ENTRIES[name]
    file = next(iter(good.glob(entry.file)))
    relative = str(file.relative_to(good))
    for command in entry.commands:
        command = command.format(os.path.dirname(relative))
        assert attempt(good, relative, file.read_bytes(), command) == (0, None), command
