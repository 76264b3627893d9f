"""What a smaller vocabulary saves, and what it costs on text of other kinds.

    python benchmarks/vocabulary.py --other-text FOLDER --json benchmarks/results/vocabulary.json
    python benchmarks/vocabulary.py --show benchmarks/results/vocabulary.json     # runs nothing

`nuteprune vocab` keeps the tokens that DATA needs most. All models are judged by the same
characters, in nats per character: per token, longer spellings would look easier. A text is an even
line of a jsonl file of FOLDER, each file a domain. Tokens are counted in all of them, nats in the
beginnings of a few, each read after the token that begins texts, or that ends them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from quality_runs import machine, results
from quality_text import domains_of, half
from transformers import PreTrainedTokenizerBase

from nuteprune import vocab
from nuteprune.data.specs import DEMO, iter_documents
from nuteprune.jobs.sources import load_model, load_tokenizer, pick_dtype
from nuteprune.judge.perplexity import bits_per_character

KEEPS = "32768,16384,8192"
TEXTS, CHARACTERS = 16, 400
Domains = Mapping[str, Sequence[str]]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print the table, and return the results."""
    return results(parser_of().parse_args(arguments), run, table)


def parser_of() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default=DEMO, help="hub id, checkpoint folder, or demo")
    add("--data", default=DEMO, help="text that tells which tokens stay, as `vocab` takes it")
    add("--keep", default=KEEPS, help="tokens that stay, comma separated")
    add("--other-text", type=Path, metavar="FOLDER", help="jsonl files to judge by, a domain each")
    add("--texts", type=int, default=TEXTS, help="of each domain that nats are counted in")
    add("--characters", type=int, default=CHARACTERS, help="of each of these at most")
    add("--dtype", default="bfloat16")
    add("--json", type=Path, help="file of results")
    add("--show", type=Path, help="print the table of such a file")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return a row for the full vocabulary, and one for each smaller one."""
    if args.other_text is None:
        raise SystemExit("vocabulary: pass --other-text FOLDER to judge by")
    sources, rows = iter_documents(args.data).values(), []
    for source in sources:
        deque(source, maxlen=0)  # read, it has a fingerprint
    found = domains_of(args.other_text, [x.fingerprint for x in sources])
    domains = {k: half(x, choose=False) for k, x in found.items()}
    with tempfile.TemporaryDirectory() as scratch:
        for keep in (None, *map(int, args.keep.split(","))):
            model, covered = args.model, 1.0
            if keep is not None:
                model = str(Path(scratch) / str(keep))
                record = vocab(args.model, out=model, keep=keep, data=args.data, quiet=True)
                covered = record["vocab"]["covered"]
            rows.append({"covered": covered, **judged(model, domains, args)})
            print(rows[-1], flush=True)
    about = {"data": args.data, "texts": args.texts, "characters": args.characters}
    sizes = {name: {"texts": len(x), "characters": sum(map(len, x))} for name, x in domains.items()}
    return {**about, "dtype": args.dtype, "domains": sizes, "machine": machine(), "rows": rows}


def judged(model: str, domains: Domains, args: argparse.Namespace) -> dict[str, Any]:
    """Return a model's size, and what it makes of text."""
    loaded, tokenizer = load_model(model, pick_dtype(args.dtype, "cpu")), load_tokenizer(model)
    stored = load_model(model, None).dtype.itemsize
    count = sum(p.numel() for p in loaded.parameters())
    few = {k: [x[: args.characters] for x in texts[: args.texts]] for k, texts in domains.items()}
    return {
        "vocabulary": loaded.get_input_embeddings().weight.shape[0],
        "parameters": count,
        "bytes": count * stored,
        "tokens_per_text": {k: tokens_per_text(tokenizer, x) for k, x in domains.items()},
        "nats_per_character": {
            k: math.log(2) * bits_per_character(loaded, tokenizer, x) for k, x in few.items()
        },
    }


def tokens_per_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """Return how many tokens spell a text on average."""
    return statistics.fmean(map(len, spelled(tokenizer, texts)))


def spelled(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    return ids


def table(result: dict[str, Any]) -> str:
    """Return the rows as a page shows them."""
    names = list(result["domains"])
    columns = ["tokens kept", "parameters", "weights", *names, "nats per character, mean"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in result["rows"]:
        spent = (
            f"{row['tokens_per_text'][x]:.0f}, {row['nats_per_character'][x]:.3f}" for x in names
        )
        middle = statistics.fmean(row["nats_per_character"].values())
        size = f"{row['parameters'] / 1e6:.1f}M", f"{row['bytes'] / 1e6:.0f} MB"
        cells = (f"{row['vocabulary']:,}", *size, *spent, f"{middle:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
