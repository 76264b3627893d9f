"""What a DATA spec names: its sources and their documents.

A DATA spec is `demo` (three embedded sources), `demo:speeches,recipes` (some of them, so that the
others can judge), a `.txt`, `.jsonl`, `.json` or `.parquet` file, a folder of such files, or a
dataset on the hub as `id[:config[:split]]`; to train on also `self`, text that the model writes
itself (`nuteprune.stages.write`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from nuteprune.data import readers
from nuteprune.data.columns import laid_out, row_document
from nuteprune.data.fingerprint import Fingerprint
from nuteprune.data.readers import Documents
from nuteprune.errors import UserError
from nuteprune.files import at_home, check_name
from nuteprune.run_folder import SELF

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMO = "demo"

_HUB_SPEC = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^:\\]*){0,2}")


def iter_documents(
    spec: str, *, text_column: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Documents]:
    """Find the sources of a DATA spec; files and the hub are read when iterated over.

    Args:
        spec: the DATA spec.
        text_column: the column that holds the text; None finds it.
        tokenizer: renders rows of chat messages; may be None where there are none.

    Returns:
        Source name -> its documents, each of at most `MAX_DOCUMENT_CHARS` characters; in a
        fixed order.

    Raises:
        UserError: nothing of that name, or (on iteration) a source cannot be read.
    """
    refuse_self(spec)
    if names := embedded(spec):
        from nuteprune.data import demo  # few runs read it

        return {
            name: Documents(name, partial(iter, texts), Fingerprint(names=[f"{DEMO}:{name}"]))
            for name, texts in demo.documents(domains=names).items()
        }

    def documents(rows: Iterable[tuple[str, object]]) -> Iterator[str]:
        for where, row, layout in laid_out(rows, text_column):
            yield row_document(row, layout, where, tokenizer)

    if (files := local_files(spec)) is not None:
        known = Fingerprint()

        def file_documents(path: Path) -> Iterator[str]:
            known.add_file(path)
            rows = readers.file_rows(path, text_column)
            yield from readers.text_documents(path) if rows is None else documents(rows)

        def read() -> Iterator[str]:
            return chain.from_iterable(map(file_documents, files))

        name = at_home(spec).absolute().name or spec
        return {name: Documents(name, read, known)}
    parts = hub_parts(spec)
    known = Fingerprint(names=[parts[0].lower()])
    return {spec: Documents(spec, lambda: documents(readers.hub_rows(*parts)), known)}


def check_distinct(name: str, taken: Iterable[str]) -> None:
    """Refuse a text whose name another one has.

    Raises:
        UserError: if it is taken.
    """
    if name in taken:
        raise UserError(f"two texts are called {name}: name each only once, or rename a file")


def refuse_self(spec: str) -> None:
    """Refuse the model's own text where other text is wanted, such as to judge by.

    Raises:
        UserError: if a spec names it.
    """
    if spec == SELF:
        raise UserError(
            f"{SELF} is text that the model writes to be trained on; pass other text here, "
            f"such as {DEMO}, or ./{SELF} if a folder is meant"
        )


def embedded(spec: str) -> list[str]:
    """Return which embedded sources a DATA spec names, in a fixed order; none if it is another.

    Raises:
        UserError: it names one that does not exist.
    """
    name, colon, given = spec.partition(":")
    if name != DEMO:
        return []
    from nuteprune.data.demo import TEXTS

    names = given.split(",") if colon else list(TEXTS)
    if unknown := [x for x in names if x not in TEXTS]:
        raise UserError(
            f"{spec!r}: no embedded source is called {unknown[0]!r}; pass {DEMO}, or some of "
            f"{DEMO}:{','.join(TEXTS)}"
        )
    return [x for x in TEXTS if x in names]


def local_files(spec: str) -> list[Path] | None:
    """Return the files of a DATA spec, None if it is no path.

    Raises:
        UserError: it looks like a path, and nothing is there, or nothing of that name can be.
    """
    check_name(spec)
    path = at_home(spec)
    if os.path.exists(path):
        return readers.text_files(path)
    if path.suffix.lower() in readers.SUFFIXES or not _HUB_SPEC.fullmatch(spec):
        raise UserError(
            f"{spec!r}: no such file or folder; pass {DEMO}, a path, or a hub dataset as "
            "id[:config[:split]]"
        )
    return None


def hub_parts(spec: str) -> tuple[str, str | None, str]:
    """Return dataset, configuration and split that a DATA spec names on the hub."""
    dataset, config, split = (*spec.split(":"), "", "")[:3]
    return dataset, config or None, split or "train"
