"""Rows of named columns as documents: plain text, chat messages or instructions."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from nuteprune.errors import UserError, in_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Columns that make up a document, the likeliest first. The first and the last column of a layout
# must be there; one between may be missing.
_LAYOUTS = (
    ("messages",),  # before "text": Alpaca has its rows once more as plain text
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("text",),
    ("content",),
    ("document",),
    ("body",),
    ("article",),
)
_SHOWN_NAMES = 20
# Llama 3's template writes today's date, by which a row would be held out on one day and not on
# the next; a macro goes before the function of that name.
_SAME_DAY = "{%- macro strftime_now(form) -%}26 Jul 2024{%- endmacro -%}"


def laid_out(
    rows: Iterable[tuple[str, object]], text_column: str | None
) -> Iterator[tuple[str, Mapping[str, object], tuple[str, ...]]]:
    """Find a document's columns in the first row, and check that all rows have them.

    Args:
        rows: (where the row comes from, the row: column name -> cell).
        text_column: the column that holds the text; None finds it.

    Returns:
        Where each row comes from, the row, and the columns.

    Raises:
        UserError: a row is no object, or lacks a column.
    """
    layout: tuple[str, ...] | None = None
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: a row must be an object with named columns, not {type(row).__name__}; "
                'pass rows such as {"text": "..."}'
            )
        layout = layout or choose_layout(row, text_column, where)
        for name in (layout[0], layout[-1]):
            if name not in row:
                raise _missing(name, row, where)
        yield where, row, layout


def row_document(
    row: Mapping[str, object],
    layout: tuple[str, ...],
    where: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> str:
    """Return a row as a document, which may be empty."""
    cells = (cell_text(row, name, where, tokenizer) for name in layout)
    return "\n\n".join(cell for cell in cells if cell)


def choose_layout(names: Collection[str], text_column: str | None, where: str) -> tuple[str, ...]:
    """Choose the columns that make up a document.

    Args:
        names: the columns there are.
        text_column: the one that holds the text; None finds it.
        where: where the columns come from, for errors.

    Returns:
        The columns to join. Of three columns the second may be missing.

    Raises:
        UserError: there is no such column, or none is known to hold text.
    """
    if text_column is not None:
        if text_column not in names:
            raise _missing(text_column, names, where)
        return (text_column,)
    for layout in _LAYOUTS:
        if layout[0] in names and layout[-1] in names:
            if layout == ("content",) and "role" in names:
                raise UserError(
                    f"{where}: a chat message by itself; pass rows that hold whole chats, such as "
                    '{"messages": [{"role": "user", "content": "..."}]}, or name the column that '
                    "holds text with --text-column"
                )
            return layout
    known = {name for layout in _LAYOUTS for name in layout}
    near = [name for name in names if difflib.get_close_matches(name.lower(), known, n=1)]
    raise UserError(
        f"{where}: found no text among the columns {_listed(names)}; "
        f"name the one that holds it with --text-column{_perhaps(near)}"
    )


def _missing(name: str, names: Collection[str], where: str) -> UserError:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return UserError(
        f"{where}: no column {name!r} among the columns {_listed(names)}; "
        f"name one that every row has with --text-column{_perhaps(near)}"
    )


def _perhaps(near: list[str]) -> str:
    return f" (perhaps {near[0]!r})" if near else ""


def _listed(names: Collection[str]) -> str:
    shown = [repr(name) for name in itertools.islice(names, _SHOWN_NAMES)]
    more = ["..."] if len(names) > _SHOWN_NAMES else []
    return ", ".join([*shown, *more]) or "(none)"


def cell_text(
    row: Mapping[str, object], name: str, where: str, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    """Return a cell's text, chat messages rendered; a missing cell has none.

    Raises:
        UserError: the cell holds something else.
    """
    cell = row.get(name)
    if cell is None:
        return ""
    if isinstance(cell, list):
        place = f"{where}, column '{name}'"
        return _well_formed(render(chat_turns(cell, place), place, tokenizer))
    if isinstance(cell, str):
        return _well_formed(cell)
    raise UserError(f"{where}: column '{name}' holds {type(cell).__name__}, not text; name another")


def _well_formed(text: str) -> str:
    """Replace lone surrogates, which JSON can escape and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def chat_turns(messages: list[object], where: str) -> list[dict[str, str]]:
    """Return chat messages with nothing but their role and content.

    Raises:
        UserError: a list that is not chat messages.
    """
    turns = [
        {"role": message["role"], "content": _well_formed(message["content"])}
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
    return turns


def render(
    turns: list[dict[str, str]],
    where: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    asks: bool = False,
) -> str:
    """Return chat messages as text, by the tokenizer's template.

    Args:
        turns: from `chat_turns`.
        where: where they come from.
        tokenizer: the model's tokenizer.
        asks: whether the text ends with what comes before an answer.

    Raises:
        UserError: there is no template, or it refuses the messages.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise UserError(
            f"{where}: chat messages, but the model's tokenizer has no chat template; "
            "pass a model that has one, or a column of plain text as text column"
        )
    try:
        template = _SAME_DAY + tokenizer.get_chat_template()
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=asks
            )
        )
    except Exception as error:  # a template is a program, which may go wrong in any way
        raise UserError(
            f"{where}: the model's chat template refuses the messages ({in_one_line(error)}); "
            "mend or remove the row"
        ) from error
