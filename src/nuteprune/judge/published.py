"""Published texts and protocols (ways to cut text into blocks), as data.

Published perplexities differ in the text's split, in what joins its rows, in the block length and
in whether blocks overlap. Each of these is a field here, and stated with every result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from nuteprune.data.specs import DEMO
from nuteprune.errors import UserError

END_OF_TEXT = "end-of-text"
JOININGS: Final[Mapping[str, str]] = {
    END_OF_TEXT: "",  # a token, not characters: rows are tokenized one by one
    "blank-line": "\n\n",
    "line": "\n",
    "space": " ",
    "nothing": "",
}
"""What stands between two rows: name -> characters."""

_PARQUET = "refs/convert/parquet"  # where the hub keeps parquet copies of what needed a script


@dataclass(frozen=True)
class Text:
    """A published text on the hub, as one file that no script has to read.

    Args:
        repo: the dataset's id.
        file: the file in it.
        column: the column that holds the text.
        revision: the branch.
        rows: how many of the first rows are in use; None: all.
    """

    repo: str
    file: str
    column: str = "text"
    revision: str = "main"
    rows: int | None = None


_PTB = "ptb-text-only/ptb_text_only"
TEXTS: Final[Mapping[str, Text]] = {
    "wikitext2": Text("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
    "ptb": Text(_PTB, "penn_treebank/validation/0000.parquet", "sentence", _PARQUET),
    "ptb-test": Text(_PTB, "penn_treebank/test/0000.parquet", "sentence", _PARQUET),
    "c4": Text("allenai/c4", "en/c4-validation.00000-of-00008.json.gz", rows=1100),
}


@dataclass(frozen=True)
class Protocol:
    """A way to make blocks of a text.

    Args:
        length: tokens per block.
        stride: tokens from one block's start to the next one's; None: the length, no overlap.
        joining: what stands between rows, a key of `JOININGS`.
        joinings: exceptions, text -> joining.
        special_tokens: whether the tokenizer adds its own (a bos at the very start, mostly).
        blocks: most blocks per text; None: all there are.
        texts: the texts it is used with.
    """

    length: int
    joining: str
    texts: tuple[str, ...]
    stride: int | None = None
    joinings: Mapping[str, str] = field(default_factory=dict)
    special_tokens: bool = True
    blocks: int | None = None


HELD_OUT = "held-out"
PROTOCOLS: Final[Mapping[str, Protocol]] = {
    # This project's own, used by `prune` and `demo`.
    HELD_OUT: Protocol(256, END_OF_TEXT, (DEMO,), special_tokens=False, blocks=24),
    # The NutePrune authors' eval_ppl.py.
    "nuteprune": Protocol(2048, "blank-line", ("wikitext2", "ptb")),
    # LLM-Pruner's PPLMetric, the tables of its line.
    "llm-pruner": Protocol(128, "blank-line", ("wikitext2", "ptb")),
    # GPTQ's datautils.py, also SparseGPT's and Wanda's.
    "gptq": Protocol(
        2048,
        "blank-line",
        ("wikitext2", "ptb-test", "c4"),
        joinings={"ptb-test": "space", "c4": "space"},
        blocks=256,
    ),
}


def protocol_named(name: str) -> Protocol:
    """Return a published protocol.

    Raises:
        UserError: if there is none of that name.
    """
    if name not in PROTOCOLS:
        raise UserError(f"protocol {name!r} is unknown; pass one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def changed(protocol: Protocol, **changes: object) -> Protocol:
    """Return a protocol with those fields changed that are not None; the result is checked.

    Args:
        protocol: what to start from.
        **changes: `length`, `stride`, `joining`, `blocks` (0: all there are).

    Raises:
        UserError: for values that give no blocks.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if "joining" in given:
        given["joinings"] = {}
    if given.get("blocks") == 0:
        given["blocks"] = None
    made = replace(protocol, **given)  # type: ignore[arg-type]
    if made.joining not in JOININGS:
        raise UserError(f"joining {made.joining!r} is unknown; pass one of {', '.join(JOININGS)}")
    stride = made.length if made.stride is None else made.stride
    if made.length < 2 or not 1 <= stride <= made.length:
        raise UserError(
            f"blocks of {made.length} tokens, one every {stride}: pass a length of at least 2 and "
            "a stride between 1 and the length"
        )
    if made.blocks is not None and made.blocks < 1:
        raise UserError(f"{made.blocks} blocks: pass at least 1, or 0 for all there are")
    return made
