"""Whatever a user passes: a result, or one line and exit code 2, and nothing written."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from nuteprune.cli.app import main
from nuteprune.errors import UserError
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.read_settings import read_given, read_mapping
from nuteprune.train.config import NutePruneConfig
from tests.unplanned import leave_unplanned

from .conftest import SEED, cases

FEW, MANY = 8, len(cases(500))


@dataclasses.dataclass(frozen=True)
class Case:
    """A command and the files that it finds.

    Args:
        args: the command line; MODEL stands for a good model, TEXT for good text.
        files: name -> content of files in the working folder.
        model: changes a copy of the good model, named `model` in the working folder.
    """

    args: list[str]
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    model: Callable[[Path], object] | None = None


# --- what may be passed ----------------------------------------------------------------------

GOOD = {
    "--sparsity": "0.3",
    "--data": "TEXT",
    "--out": "out",
    "--steps": "1",
    "--batch-size": "2",
    "--length": "16",
    "--device": "cpu",
    "--dtype": "float32",
}
ODD_WORDS = [
    *("", " ", "-", "--", "None", "null", "true", "nan", "inf", "-inf", "1e400", "-1", "0", "1.5"),
    *("99999999999999999999", "0x10", "1_0", "１２", "0.2,0.2", "0.5,0.2", ",", "[1, 2]", "{a: 1}"),
    *("..", "/dev/null", "~nobody/x", "/proc/self/mem", "missing/file.txt", "a/b", "a/b/c", "a:b"),
    *("x" * 5000, "\udcff", "<script>", "line\nline", "\x1b[31m", "heads,heads", "kv_groups", "🙂"),
    *("demo.txt", "uniform", "free", "cuda", "meta", "mps", "float16", "int8", "text", "*"),
]
words = st.one_of(st.sampled_from(ODD_WORDS), st.text(max_size=12).filter(lambda x: "\0" not in x))
numbers = st.sampled_from([-1, 0, 1, 2, 7, 10**12, 10**30, 0.5, -0.5, 1e-9, 1e300])
values = st.recursive(
    st.one_of(words, numbers, st.none(), st.booleans(), st.floats()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)
# Left out: what compiles for minutes, or changes this process for good.
KINDS = (PruneJob, NutePruneConfig)
SETTINGS = sorted(
    {f.name for f in dataclasses.fields(NutePruneConfig) if f.init}
    - {"torch_compile", "torch_compile_backend", "torch_compile_mode", "full_determinism"}
)
keys = st.one_of(st.sampled_from(SETTINGS), words.filter(lambda x: "=" not in x))


def prune(changes: dict[str, str] | None = None, *more: str) -> list[str]:
    options = {**GOOD, **(changes or {})}
    flat = [part for name, value in options.items() for part in (f"{name}={value}",)]
    return ["prune", "MODEL", *flat, "--set=neuron_multiple=4", "--dry-run", *more]


OPTIONS = [*GOOD, "--gates", "--shapes", "--text-column", "--eval-data", "--config"]
OPTIONS += ["--shape", "--sparsty", "--set"]
options = st.dictionaries(
    st.sampled_from([x for x in OPTIONS if x != "--out"]), words, min_size=1, max_size=3
).map(lambda changes: Case(prune(changes)))

assignments = st.tuples(keys, values).map(
    lambda pair: Case(prune(None, f"--set={pair[0]}={json.dumps(pair[1], default=str)}"))
)

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
ODD_YAML = [
    *(
        "",
        "- 1",
        "a: b: c",
        "&a [*a]",
        "&a {a: *a}",
        "? [1]\n: 2",
        "\t- x",
        "%TAG",
        "!!python/name:os",
    ),
    *(
        "!!python/object/apply:os.system [id]",
        "a: !!binary x",
        "steps: 2024-99-99",
        "{" * 1100,
        BOMB,
    ),
    *("steps: " + "9" * 6000, "<<: 1", "seed: *x", "learning_rate: .nan", "steps: 1\nsteps: 2"),
]
mappings = st.dictionaries(keys, values, max_size=3)
documents = st.one_of(
    st.sampled_from(ODD_YAML).map(str.encode),
    mappings.map(lambda x: yaml.dump(x).encode("utf-8", "surrogateescape")),
    mappings.map(lambda x: json.dumps(x).encode()),
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda x: x.encode("utf-8", "replace")),
)
configs = documents.map(lambda x: Case(prune({"--config": "c.yaml"}), {"c.yaml": x}))

counts = st.one_of(st.integers(-2, 80), values)
layers = st.dictionaries(
    st.sampled_from(["heads", "kv_heads", "neurons", "attention", "mlp", "odd"]), counts, max_size=4
)
shapes_asked = st.one_of(
    documents,
    st.fixed_dictionaries(
        {},
        optional={
            "hidden": counts,
            "heads": counts,
            "neurons": counts,
            "schema": counts,
            "layers": st.one_of(
                st.lists(st.one_of(layers, values), min_size=2, max_size=4), values
            ),
        },
    ).map(lambda x: json.dumps(x).encode()),
)


def shaped(content: bytes) -> Case:
    args = [x for x in prune({"--shape": "s.json"}) if not x.startswith("--sparsity")]
    return Case(args, {"s.json": content})


rows = st.lists(
    st.one_of(
        values,
        st.fixed_dictionaries({"text": values}),
        st.fixed_dictionaries({"messages": values}),
        st.fixed_dictionaries({"instruction": words, "output": values}),
        st.fixed_dictionaries({"text": st.text(max_size=80)}),
    ),
    max_size=8,
)
lines = rows.map(lambda x: "\n".join(json.dumps(row) for row in x).encode())
LONG = b"x" * 2_000_000
ODD_TEXT = [
    *(b"", b"\n\n\n", b"a", b"\xff\xfe", b"a\xc3", b"\xef\xbb\xbf", b"\0" * 40, b"[", b"[" * 5000),
    *(b'{"text": "\\ud800"}', b'{"text": "' + LONG, LONG, b"word " * 400, b"\r\n" * 50, b"PAR1"),
    *(b'{"text": NaN}', b'{"text": 1e999}', b'{"a": {"text": "x"}}', b'{"text": ""}\n' * 9),
]
contents = st.one_of(st.sampled_from(ODD_TEXT), lines, st.binary(max_size=300))
contents |= st.text(max_size=300).map(lambda x: x.encode("utf-8", "replace"))
data = st.tuples(
    st.sampled_from(["d.txt", "d.jsonl", "d.json", "d.parquet", "d.csv", "D.TXT", ".txt"]),
    contents,
    st.one_of(st.just(""), words),
    st.booleans(),
).map(
    lambda x: Case(
        prune({"--data": "f" if x[3] else f"f/{x[0]}"} | ({"--text-column": x[2]} if x[2] else {})),
        {f"f/{x[0]}": x[1]},
    )
)


def edit(name: str, key: str, value: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content[key] = value
        (folder / name).write_text(json.dumps(content, default=str))

    return change


def harm(name: str, at: int, how: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        at_here = at % len(content)
        if how == "cut":
            del content[at_here:]
        elif how == "flip":
            content[at_here] ^= 0x40
        (folder / name).write_bytes(content)
        if how == "gone":
            (folder / name).unlink()

    return change


FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
CONFIG_KEYS = [
    *("model_type", "architectures", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "vocab_size", "rms_norm_eps", "rope_parameters", "dtype"),
    *("hidden_act", "max_position_embeddings", "tie_word_embeddings", "auto_map", "torch_dtype"),
    *("pad_token_id", "eos_token_id", "attention_bias", "quantization_config", "layer_types"),
]
TOKENIZER_KEYS = ["tokenizer_class", "pad_token", "eos_token", "bos_token", "chat_template", "x"]
changes = st.one_of(
    st.tuples(st.just("config.json"), st.sampled_from(CONFIG_KEYS), values).map(lambda x: edit(*x)),
    st.tuples(st.just("tokenizer_config.json"), st.sampled_from(TOKENIZER_KEYS), values).map(
        lambda x: edit(*x)
    ),
    st.tuples(
        st.sampled_from(FILES), st.integers(0, 10**6), st.sampled_from(["cut", "flip", "gone"])
    ).map(lambda x: harm(*x)),
)
models = changes.map(lambda change: Case(["prune", "model", *prune()[2:]], model=change))

OUTS = ["f/file", "f/file/below", "/proc/nope", "/dev/null", "/dev/null/x", "x" * 300, "link", "."]
OUTS += ["f", "/proc/self/fd/x", "/sys/x/y"]
outs = st.sampled_from(OUTS).map(
    lambda out: Case([x for x in prune({"--out": out}) if x != "--dry-run"], {"f/file": b"mine"})
)

others = st.one_of(
    st.lists(st.one_of(words, st.sampled_from(["--help-me", "--json", "MODEL", "--out=x"]))).map(
        lambda x: ["inspect", *x]
    ),
    st.tuples(words, words, words).map(
        lambda x: ["export", x[0], f"--to={x[1]}", f"--out={x[2] or 'o'}"]
    ),
    st.tuples(words, words).map(
        lambda x: ["export", "MODEL", "--to=gguf", f"--type={x[0]}", f"--out={x[1]}x/"]
    ),
    words.map(lambda x: ["report", x]),
    words.map(lambda x: [x]),
).map(Case)

ENTRIES = {
    "options": options,
    "--set": assignments,
    "--config": configs,
    "--shape": shapes_asked.map(shaped),
    "--data": data,
    "--out": outs,
    "model folder": models,
    "other commands": others,
}


# --- what must come of it --------------------------------------------------------------------


def call(args: list[str]) -> tuple[int, str]:
    """Call the command line in this process; returns exit code and stderr."""
    error = io.StringIO()
    before = sys.argv
    sys.argv = ["nuteprune", *args]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
            main()
    except SystemExit as stopped:
        return int(stopped.code or 0), error.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("the command line did not exit")


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def content_of(folder: Path) -> dict[str, bytes | None]:
    return {
        str(x.relative_to(folder)): x.read_bytes() if x.is_file() else None
        for x in folder.rglob("*")
    }


def check(case: Case, model: Path, text: Path) -> None:
    with working_folder() as here:
        for name, content in case.files.items():
            (here / name).parent.mkdir(exist_ok=True)
            (here / name).write_bytes(content)
        (here / "link").symlink_to(here / "nowhere" / "else")
        if case.model is not None:
            shutil.copytree(model, here / "model")
            case.model(here / "model")
        before = content_of(here)
        places = {"MODEL": str(model), "--data=TEXT": f"--data={text}"}
        code, said = call([places.get(x, x) for x in case.args])
        assert code in (0, 2), said
        assert content_of(here) == before
    if code == 2:
        lines = [line for line in said.splitlines() if line.strip()]
        assert len(lines) == 1, said
        assert lines[0].startswith("nuteprune: ")
        assert len(lines[0]) < 7000
        assert "Traceback" not in said


@pytest.fixture(scope="module")
def good(tiny_model, tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("good")
    tiny_model("llama", vocab_size=512).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    sentences = [f"teacher {i} is less pruned than student {i + 1} " * 4 for i in range(40)]
    (folder / "text.txt").write_text("\n\n\n".join(sentences))
    return folder / "model", folder / "text.txt"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back what a command sets for its process."""
    import warnings

    from transformers.utils import logging

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    leave_unplanned(monkeypatch.setattr)
    level = logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    logging.set_verbosity(level)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "count",
    [pytest.param(FEW, marks=pytest.mark.slow), pytest.param(MANY, marks=pytest.mark.hard(20))],
)
def test_bad_input_is_one_line_and_nothing_written(
    entry: str, count: int, good: tuple[Path, Path]
) -> None:
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count == FEW,
        suppress_health_check=list(HealthCheck),
    )
    @given(ENTRIES[entry])
    def holds(case: Case) -> None:
        tried.append(case)
        check(case, *good)

    tried: list[Case] = []
    (holds if count == FEW else seed(SEED)(holds))()
    print(f"{entry}: {len(tried)} cases of seed {SEED}")


@settings(max_examples=5 * settings().max_examples, deadline=None, database=None, derandomize=True)
@given(documents)
def test_any_file_of_settings_is_settings_or_a_user_error(content: bytes) -> None:
    """The reader alone, so that the normal suite has the time for as many."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_bytes(content)
        try:
            found = read_given(read_mapping(path, "--config"), {}, KINDS)
        except UserError:
            return
    declared_here = {x.name for kind in KINDS for x in dataclasses.fields(kind)}
    assert found.keys() <= declared_here


def test_the_good_case_is_good(good: tuple[Path, Path]) -> None:
    """What all cases above are changes of works, so that it is the change that is refused."""
    check(Case(prune()), *good)
    with working_folder():
        places = {"MODEL": str(good[0]), "--data=TEXT": f"--data={good[1]}"}
        assert call([places.get(x, x) for x in prune()])[0] == 0
