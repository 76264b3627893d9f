"""Prune, quantize, or both: what each costs on other text, and how many bytes it leaves.

    python benchmarks/quantized.py --pruned '20 % cut=FOLDER' --other-text FOLDER --json FILE
    python benchmarks/quantized.py --subject gemma3-270m --time 5 --files FOLDER --json FILE
    python benchmarks/quantized_table.py     # the picture of what is committed

The dense model and its smaller ones are exported as f16. llama.cpp quantizes those files itself, by
its Python binding (`pip install llama-cpp-py-sync`) and without an importance matrix, and reads
other text with them. A file's name has llama.cpp's type; which types its matrices really have is
counted. A result that is on file is not made again, so a stopped run goes on, and another subject
is added. A model with fewer tokens spells the same text in its own way; nats are per token of the
dense one's.

`--time` judges nothing. It times the files that `--files` kept, round by round, so that all of a
round had the same machine.

Both subjects were made from files of 4 bits, so to quantize them again costs less than it would.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import subjects
import torch
from gguf import GGUFReader, LlamaFileType
from gguf_file import GgufFile, require_binding
from k_quants import quantize
from quality_runs import machine, write_json
from quality_text import Judge, Setting
from quantized_table import DENSE, PLAIN, Row
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nuteprune.cli.app import quiet_libraries
from nuteprune.data.prompts import Prompts, make_prompts
from nuteprune.data.specs import DEMO
from nuteprune.data.tokens import ends_of
from nuteprune.errors import UserError
from nuteprune.export.gguf.write import write_gguf
from nuteprune.jobs.sources import load_model, load_tokenizer
from nuteprune.judge.answers import LOOPS, TOKENS, repeated

TYPES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m")
"""Kinds of files that llama.cpp makes of a plain one."""
BLOCKS = 6
TIMED = (256, 32)
"""Tokens of a prompt, and of an answer, that speed is measured with."""
K_BLOCK = 256
"""Weights of a row that K-quants store together."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is not on file yet, and return the results."""
    args = parser_of().parse_args(arguments)
    quiet_libraries()
    require_binding()
    if args.time and not (args.json and args.files):
        raise UserError("--time: pass the --json and the --files of an earlier run")
    if not args.time and not args.other_text:
        raise UserError("pass --other-text, the folder of jsonl files to judge by")
    if args.files:
        args.files.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"prompts": {}, "rows": []}
    if args.json and args.json.is_file():
        result = json.loads(args.json.read_text(encoding="utf-8"))
    if args.time:
        time_files(args, result)
        write_json(args.json, result)
        return result
    if result.get("settings", settings(args)) != settings(args):
        raise UserError(f"{args.json} has results of other settings; name another file")
    result |= {"settings": settings(args), "machine": machine()}
    for row in rows(args, result):
        result["rows"].append(row)
        print(summary(row), flush=True)
        if args.json:
            write_json(args.json, result)
    return result


def parser_of() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--subject", default="smollm2-135m", help="dense model: of subjects.py, or a folder")
    add("--pruned", action="append", default=[], metavar="NAME=FOLDER", help="a pruned one; repeat")
    add("--types", default=",".join((PLAIN, *TYPES)), help="kinds of files, comma separated")
    where = "jsonl files to judge by, a domain each"
    add("--other-text", type=Path, metavar="FOLDER", help=where)
    add("--blocks", type=int, default=BLOCKS, help="of 256 tokens, of each domain")
    add("--tokens", type=int, default=TOKENS, help="of an answer at most; 0: no answers")
    add("--json", type=Path, help="file of results; those in it are kept")
    add("--files", type=Path, metavar="FOLDER", help="keeps the GGUF files")
    add("--time", type=int, default=0, metavar="ROUNDS", help="time the subject's files instead")
    return parser


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the results depend on."""
    from llama_cpp_py_sync import __llama_cpp_tag__

    text = {"lines": "even", "blocks": args.blocks, "length": Setting().length}
    return {"engine": f"llama.cpp {__llama_cpp_tag__}", "text": text, "tokens": args.tokens}


def rows(args: argparse.Namespace, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a result for each model and type that has none yet."""
    named = [tuple(x.split("=", 1)) for x in args.pruned]
    if any(len(x) < 2 for x in named):
        raise UserError("--pruned: pass NAME=FOLDER, the name that the table has")
    dense, subject = subjects.folder(args.subject), name_of(args)
    models = {DENSE: dense} | {name: Path(folder) for name, folder in named}
    known = {(x["subject"], x["model"], x["type"]) for x in result["rows"]}
    kinds = args.types.split(",")
    todo = {m: [k for k in kinds if (subject, m, k) not in known] for m in models}
    if not any(todo.values()):
        return
    judge = Judging(dense, args)
    result["prompts"][subject] = judge.prompts.source if judge.prompts else None
    for name, missing in todo.items():
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            plain = kept(args.files or Path(scratch), subject, name, PLAIN)
            model = load_model(str(models[name]), None)
            tokenizer = load_tokenizer(str(models[name]))
            written = write_gguf(model, tokenizer, plain, type_name=PLAIN)
            ends = ends_of(model, tokenizer)
            del model
            for kind in missing:
                file = kept(plain.parent, subject, name, kind)
                if kind != PLAIN:
                    quantize(plain, file, int(LlamaFileType[f"MOSTLY_{kind.upper()}"]))
                about = {"subject": subject, "model": name, "type": kind}
                found = stored(file) | judge(file, tokenizer, ends)
                yield about | {"parameters": written.parameters} | found
                if kind != PLAIN and not args.files:
                    file.unlink()


def name_of(args: argparse.Namespace) -> str:
    """Return what rows call the subject: its name, or that of its folder."""
    return Path(args.subject).name


def kept(folder: Path, subject: str, model: str, kind: str) -> Path:
    """Return where a GGUF file is."""
    return folder / f"{subject}, {model}, {kind}.gguf"


def time_files(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Add the tokens a second of prompts and answers to the rows of a subject, round by round."""
    rows = [x for x in result["rows"] if x["subject"] == name_of(args)]
    for row in rows:
        row["threads"], row["prefill"], row["decode"] = torch.get_num_threads(), [], []
    for _ in range(args.time):
        for row in rows:
            file = GgufFile(kept(args.files, row["subject"], row["model"], row["type"]))
            prefill, decode = file.rates(*TIMED)
            file.close()
            row["prefill"].append(round(prefill, 1))
            row["decode"].append(round(decode, 2))


def stored(file: Path) -> dict[str, Any]:
    """Return a file's size, the types of its tensors, and how many matrices fit no K-quant."""
    tensors = GGUFReader(file).tensors
    matrices = [x for x in tensors if len(x.shape) > 1]
    weights, size = sum(int(x.n_elements) for x in matrices), sum(int(x.n_bytes) for x in matrices)
    counts = (
        Counter(x.tensor_type.name for x in group).most_common() for group in (tensors, matrices)
    )
    return {
        "bytes": file.stat().st_size,
        "bits_per_weight": round(8 * size / weights, 4),
        **dict(zip(("tensors", "matrices"), map(dict, counts), strict=True)),
        "torn": sum(int(x.shape[0]) % K_BLOCK != 0 for x in matrices),
    }


class Judging:
    """What all files of a subject are judged by.

    Args:
        dense: folder of the dense model.
        args: of the command line.
    """

    def __init__(self, dense: Path, args: argparse.Namespace) -> None:
        self._tokenizer = tokenizer = load_tokenizer(str(dense))
        judge = Judge(Setting(model=str(dense)), tokenizer, [DEMO], args.other_text)
        self.text: dict[str, Tensor] = {k: x[: args.blocks] for k, x in judge.other.items()}
        self.prompts: Prompts | None = None
        self._tokens = args.tokens
        if args.tokens:
            model = load_model(str(dense), torch.bfloat16)
            self.prompts = make_prompts(model, tokenizer, judge.held_out)

    def __call__(
        self, path: Path, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]
    ) -> dict[str, Any]:
        """Return nats of each block of other text, per token of the dense model, and what loops.

        Args:
            path: of the file.
            tokenizer: its own.
            ends: its tokens that end an answer.
        """

        def spelled(ids: Sequence[int]) -> list[int]:
            if len(tokenizer) == len(self._tokenizer):
                return list(ids)
            text = self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        def nats(block: Tensor) -> float:
            ids = spelled(block.tolist())
            [mean] = file.nats(torch.tensor([ids]))
            return round(mean * (len(ids) - 1) / (len(block) - 1), 5)

        file = GgufFile(path)
        found: dict[str, Any] = {
            "nats": {name: [nats(x) for x in blocks] for name, blocks in self.text.items()}
        }
        if self.prompts:
            prompts = [spelled(x) for x in self.prompts.ids]
            answers = file.answers(prompts, ends, self._tokens)
            looping = sum(repeated(x) > LOOPS for x in answers)
            found |= {"answers": len(answers), "looping": looping}
        file.close()
        return found


def summary(row: Row) -> str:
    """Return a line about a row, as it is made."""
    means = {k: round(math.exp(statistics.fmean(x)), 2) for k, x in row["nats"].items()}
    looping = f"{row['looping']} of {row['answers']} loop" if "answers" in row else ""
    name = f"{row['subject']} {row['model']} {row['type']}"
    return f"{name}: {row['bytes'] / 1e6:.0f} MB {row['matrices']} {means} {looping}"


if __name__ == "__main__":
    sys.exit(main() is None)
