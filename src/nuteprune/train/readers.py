"""Documents out of text, JSON and Parquet files and hub datasets, in bounded memory."""

from __future__ import annotations

import codecs
import difflib
import io
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from nuteprune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
MAX_DOCUMENT_CHARS = 2**20  # a longer document counts as several, one after the other
_MAX_JSON_ROW_CHARS = 2**24
_CHUNK_BYTES = 2**20
_PARQUET_ROWS = 64

_DOCUMENT_END = re.compile(r"\n(?:[ \t]*\n){2,}")
_BETWEEN_JSON_ROWS = re.compile(r"[\s,\[\]]*")

# Columns that make up a document, the likeliest first. The first and the last column of a layout
# must be there; any between may be missing.
_LAYOUTS = (
    ("text",),
    ("content",),
    ("document",),
    ("body",),
    ("article",),
    ("messages",),
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
)


def boundary(text: str, near: int) -> int:
    """Return a position to cut a text at: after the last white space shortly before `near`.

    Args:
        text: the text.
        near: the latest position wanted, in characters.

    Returns:
        The position, at most `near`; `near` itself where no white space is close.
    """
    start = max(0, near - 256)
    return max(text.rfind("\n", start, near), text.rfind(" ", start, near)) + 1 or near


def split_long(text: str) -> list[str]:
    """Cut a text into consecutive pieces of at most `MAX_DOCUMENT_CHARS` characters."""
    pieces = []
    while len(text) > MAX_DOCUMENT_CHARS:
        cut = boundary(text, MAX_DOCUMENT_CHARS)
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


def file_documents(
    path: Path, *, text_column: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    """Read the documents of a file.

    Args:
        path: a file whose suffix is one of `SUFFIXES`.
        text_column: the column that holds the text; None finds it.
        tokenizer: renders rows of chat messages; may be None where there are none.

    Returns:
        The documents in the file's order; some may be empty.

    Raises:
        UserError: the file cannot be read as what its suffix says, or holds no text column.
    """
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _text_documents(path)
    rows = _parquet_rows(path, text_column) if suffix == ".parquet" else _json_rows(path)
    return _row_documents(rows, text_column, tokenizer)


def hub_documents(
    dataset: str,
    config: str | None,
    split: str,
    *,
    text_column: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[str]:
    """Stream the documents of a dataset on the hub.

    Args:
        dataset: the dataset's id.
        config: the configuration's name; None is the default one.
        split: the split's name.
        text_column: the column that holds the text; None finds it.
        tokenizer: renders rows of chat messages; may be None where there are none.

    Returns:
        The documents in the dataset's order; some may be empty.

    Raises:
        UserError: the dataset cannot be reached or read, or holds no text column.
    """
    return _row_documents(_hub_rows(dataset, config, split), text_column, tokenizer)


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
    return UserError(f"{path}: cannot be read ({_one_line(error)}); pass another file")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _text_documents(path: Path) -> Iterator[str]:
    """Split at two or more empty lines; a document that goes on and on comes in pieces."""
    rest = ""
    for chunk in _decoded(path):
        *whole, rest = _DOCUMENT_END.split(rest + chunk)
        *pieces, rest = split_long(rest)
        yield from whole
        yield from pieces
    yield rest


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Read one JSON value after the other, be they lines or the members of one long array."""
    decode = json.JSONDecoder().raw_decode
    rest, line = "", 1
    for chunk in itertools.chain(_decoded(path), [""]):
        rest += chunk
        position = 0
        while True:
            start = _row_start(rest, position)
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


def _row_start(text: str, position: int) -> int:
    between = _BETWEEN_JSON_ROWS.match(text, position)
    return between.end() if between else position


def _parquet_rows(path: Path, text_column: str | None) -> Iterator[tuple[str, object]]:
    """Read rows of the columns that make up a document."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_CHUNK_BYTES) as file:
            names = file.schema_arrow.names
            layout = _layout(names, text_column, str(path))
            columns = [name for name in layout if name in names]
            number = itertools.count(1)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield f"{path}, row {next(number)}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _hub_rows(dataset: str, config: str | None, split: str) -> Iterator[tuple[str, object]]:
    import datasets

    try:
        rows = datasets.load_dataset(dataset, config, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{dataset}, row {number}", row
    # Whatever the hub client, the file system and the format's reader below `datasets` raise.
    except Exception as error:
        raise UserError(
            f"{dataset}: neither a local file or folder nor a dataset that the hub gives "
            f"({_one_line(error)}); pass a path, or id[:config[:split]]"
        ) from error


def _row_documents(
    rows: Iterator[tuple[str, object]],
    text_column: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[str]:
    """Turn rows into documents; the first row's layout holds for all."""
    layout: tuple[str, ...] | None = None
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: a row must be an object with named columns, not {type(row).__name__}; "
                'pass rows such as {"text": "..."}'
            )
        layout = layout or _layout(row, text_column, where)
        for name in (layout[0], layout[-1]):
            if name not in row:
                raise _missing(name, row, where)
        cells = (_cell_text(row, name, where, tokenizer) for name in layout)
        yield "\n\n".join(cell for cell in cells if cell)


def _layout(names: Collection[str], text_column: str | None, where: str) -> tuple[str, ...]:
    """Choose the columns that make up a document."""
    if text_column is not None:
        if text_column not in names:
            raise _missing(text_column, names, where)
        return (text_column,)
    for layout in _LAYOUTS:
        if layout[0] in names and layout[-1] in names:
            return layout
    known = {name for layout in _LAYOUTS for name in layout}
    near = [name for name in names if difflib.get_close_matches(name.lower(), known, n=1)]
    raise UserError(
        f"{where}: found no text among the columns {_listed(names)}; "
        f"name the one that holds it as text column{_perhaps(near)}"
    )


def _missing(name: str, names: Collection[str], where: str) -> UserError:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return UserError(
        f"{where}: no column '{name}' among the columns {_listed(names)}; "
        f"name one that every row has as text column{_perhaps(near)}"
    )


def _perhaps(near: list[str]) -> str:
    return f" (perhaps '{near[0]}')" if near else ""


def _listed(names: Collection[str]) -> str:
    return ", ".join(repr(name) for name in names) or "(none)"


def _cell_text(
    row: Mapping[str, object],
    name: str,
    where: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> str:
    cell = row.get(name)
    if cell is None:
        return ""
    if isinstance(cell, list):
        return _well_formed(_chat_text(cell, f"{where}, column '{name}'", tokenizer))
    if isinstance(cell, str):
        return _well_formed(cell)
    raise UserError(
        f"{where}: column '{name}' holds {type(cell).__name__}, not text; "
        "name another text column"
    )


def _well_formed(text: str) -> str:
    """Replace lone surrogates, which JSON can escape and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _chat_text(
    messages: list[object], where: str, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    turns = [
        {"role": message["role"], "content": message["content"]}
        for message in messages
        if isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    ]
    if len(turns) < len(messages):
        raise UserError(
            f"{where}: a list that is not chat messages; "
            'pass messages such as {"role": "user", "content": "..."}, or another text column'
        )
    if tokenizer is None or not tokenizer.chat_template:
        raise UserError(
            f"{where}: chat messages, but the model's tokenizer has no chat template; "
            "pass a model that has one, or a column of plain text as text column"
        )
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: the model's chat template refuses the messages ({_one_line(error)}); "
            "mend or remove the row"
        ) from error
