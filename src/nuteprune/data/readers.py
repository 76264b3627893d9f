"""Reads documents from text, JSON and Parquet files and hub datasets, in bounded memory."""

from __future__ import annotations

import codecs
import io
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from nuteprune.data.columns import choose_layout
from nuteprune.data.fingerprint import Fingerprint
from nuteprune.errors import UserError, in_one_line

MAX_DOCUMENT_CHARS = 2**20  # a longer document counts as several, one after the other
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_MAX_JSON_ROW_CHARS = 2**24
_CHUNK_BYTES = 2**20
_PARQUET_ROWS = 64

T = TypeVar("T")
_DOCUMENT_END = re.compile(r"\n(?:[ \t]*\n){2,}")
_EMPTY_LINES = re.compile(r"\A(?:[ \t]*\n)+")
_BETWEEN_JSON_ROWS = re.compile(r"[\s,\[\]]*")


@dataclass(frozen=True)
class Documents:
    """The documents of one source, read anew each time they are iterated over.

    Args:
        name: what the user calls the source.
        read: starts reading it.
        fingerprint: that of the text read so far.

    Raises:
        UserError: on iteration, where the source cannot be read or holds no text.
    """

    name: str
    read: Callable[[], Iterator[str]]
    fingerprint: Fingerprint = field(default_factory=Fingerprint, compare=False)

    def __iter__(self) -> Iterator[str]:
        empty = True
        for text in itertools.chain.from_iterable(map(split_long, self.read())):
            if text and not text.isspace():
                empty = False
                self.fingerprint.add_document(text)
                yield text
        if empty:
            raise UserError(f"{self.name}: holds no text; pass a source that has some")

    def rows(self) -> Iterator[str]:
        """Yield the rows as they are, the empty and the long ones too."""
        for row in self.read():
            for text in split_long(row):
                self.fingerprint.add_document(text)
            yield row


def boundary(text: str, near: int) -> int:
    """Return where to cut a text: at its end, or after nearby white space.

    Args:
        text: the text.
        near: the latest position wanted, in characters.

    Returns:
        The position, at most `near`.
    """
    if near >= len(text):
        return len(text)
    start = max(0, near - 256)
    return max(text.rfind("\n", start, near), text.rfind(" ", start, near)) + 1 or near


def split_long(text: str, most: int | None = None) -> list[str]:
    """Cut a text into consecutive parts of at most `most` (`MAX_DOCUMENT_CHARS`) characters."""
    most = most or MAX_DOCUMENT_CHARS
    parts, start = [], 0
    while len(text) - start > most:
        window = text[start : start + most + 1]  # not all that is left: long texts have many parts
        end = start + boundary(window, most)
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def shuffled(
    items: Iterable[T], rng: random.Random, most: int, size_of: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Shuffle a stream: draw each item from a buffer of items with `most` characters in all."""
    held: list[T] = []
    size = 0
    for item in items:
        held.append(item)
        size += size_of(item)
        while size > most:
            drawn = rng.randrange(len(held))
            held[drawn], held[-1] = held[-1], held[drawn]
            size -= size_of(held[-1])
            yield held.pop()
    rng.shuffle(held)
    yield from held


def text_files(path: Path) -> list[Path]:
    """List the files that hold the text.

    Args:
        path: a file, or a folder that is searched to any depth, but for hidden files.

    Returns:
        The files whose suffix is one of `SUFFIXES`, by name.

    Raises:
        UserError: there is none.
    """
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [
        file
        for file in found
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        kinds = sorted({file.suffix or file.name for file in found if file.is_file()})
        raise UserError(
            f"{path}: no text file (found {', '.join(kinds[:8]) or 'nothing'}); "
            f"pass {', '.join(SUFFIXES)} or a folder of such files"
        )
    return files


def file_rows(path: Path, text_column: str | None) -> Iterator[tuple[str, object]] | None:
    """Read the rows of a file.

    Args:
        path: a file whose suffix is one of `SUFFIXES`.
        text_column: the column that holds the text; None finds it.

    Returns:
        (where the row comes from, the row), of Parquet with the columns of a document alone; None
        for plain text, which has no rows.
    """
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return None
    return _parquet_rows(path, text_column) if suffix == ".parquet" else _json_rows(path)


def _decoded(path: Path) -> Iterator[str]:
    """Read a UTF-8 file in non-empty chunks; line ends become newlines."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    read = 0
    try:
        with path.open("rb") as file:
            while data := file.read(_CHUNK_BYTES):
                read += len(data)
                if text := decoder.decode(data):
                    yield text
        if text := decoder.decode(b"", final=True):
            yield text
    except UnicodeDecodeError as error:
        offset = read - len(error.object) + error.start
        raise UserError(
            f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {offset}); "
            "pass a file saved as UTF-8"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read ({in_one_line(error)}); pass another file")


def text_documents(path: Path) -> Iterator[str]:
    """Split a file at two or more empty lines; a very long document comes in parts.

    Raises:
        UserError: the file cannot be read as UTF-8.
    """
    rest, ended = "", False
    for chunk in _decoded(path):
        rest += chunk
        if ended:  # the empty lines at the document's end may go on in this chunk
            rest = _EMPTY_LINES.sub("", rest, count=1)
        *whole, rest = _DOCUMENT_END.split(rest)
        *parts, rest = split_long(rest)
        yield from (*whole, *parts)
        ended = (ended or bool(whole)) and not parts
    yield rest


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Read one JSON value after the other, be they lines or the members of one long array."""
    decode = json.JSONDecoder().raw_decode
    rest, line = "", 1
    for chunk in itertools.chain(_decoded(path), [""]):
        rest += chunk
        position = 0
        while True:
            between = _BETWEEN_JSON_ROWS.match(rest, position)
            assert between is not None  # it may be empty
            start = between.end()
            line += rest.count("\n", position, start)
            position = start
            if start == len(rest):
                break
            where = f"{path}, line {line}"
            try:
                row, position = decode(rest, start)
            except (ValueError, RecursionError) as error:
                # The row may go on in the next chunk.
                if chunk and len(rest) - start <= _MAX_JSON_ROW_CHARS:
                    break
                problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise UserError(
                    f"{where}: not JSON ({problem}); pass one object per line or a list of "
                    f"objects, each of at most {_MAX_JSON_ROW_CHARS} characters"
                ) from error
            yield where, row
            line += rest.count("\n", start, position)
        rest = rest[position:]


def _parquet_rows(path: Path, text_column: str | None) -> Iterator[tuple[str, object]]:
    """Read rows of the columns that make up a document."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_CHUNK_BYTES) as file:
            names = file.schema_arrow.names
            layout = choose_layout(names, text_column, str(path))
            columns = [name for name in layout if name in names]
            number = itertools.count(1)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield f"{path}, row {next(number)}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def hub_rows(dataset: str, config: str | None, split: str) -> Iterator[tuple[str, object]]:
    """Stream the rows of a dataset on the hub, as (where the row comes from, the row).

    Raises:
        UserError: the dataset cannot be reached or read.
    """
    import datasets

    try:
        rows = datasets.load_dataset(dataset, config, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{dataset}, row {number}", row
    # Whatever the hub client, the file system and the format's reader below `datasets` raise.
    except Exception as error:
        raise UserError(
            f"{dataset}: neither a local file or folder nor a dataset that the hub gives "
            f"({in_one_line(error)}); pass a path, or id[:config[:split]]"
        ) from error
