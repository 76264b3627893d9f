"""Half of a small mixture's experts, or of their neurons, removed by several scores.

    python benchmarks/moe.py --json benchmarks/results/moe.json     # an hour on one core
    python benchmarks/moe.py --show benchmarks/results/moe.json     # the table alone; runs nothing

A Qwen3-MoE of 3 million parameters is trained on the training part of the embedded texts, once for
each seed, and pruned by each method to half of the experts of each layer: without training, and
with LoRA on attention and routers, distilled from the dense model. The same to half of the neurons
of each expert, without training. Perplexity is of the held-out part of the same texts. A result
that is on file already is not made again, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from quality_runs import machine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from nuteprune import prune
from nuteprune.data.demo import documents
from nuteprune.data.held_out import split
from nuteprune.data.training_text import training_blocks
from nuteprune.errors import UserError
from nuteprune.files import to_json

SEEDS = (0, 1)
EXPERTS, PER_TOKEN, LAYERS, LENGTH, BATCH = 16, 2, 4, 128, 8
TRAINED, DISTILLED = 1000, 40
"""Optimizer steps of the dense model, and after pruning."""
WIDTH = 96
VOCABULARY = 2048
RATE, BALANCE = 3e-3, 0.02
EXPERT_METHODS = ("random", "reap", "fisher", "reconstruction", "surgeon")
CASES = {
    "experts": (EXPERTS // 2, EXPERT_METHODS, (0, DISTILLED)),
    "expert_neurons": (WIDTH // 2, ("random", "fisher", "surgeon"), (0,)),
}
"""Kind of gate -> how many are kept of a layer or an expert, by which methods, and after how many
steps."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is not on file yet, print the table, and return the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file of results; those in it are kept")
    parser.add_argument("--show", type=Path, help="print the table of such a file")
    parser.add_argument("--trained", type=int, default=TRAINED, help="steps of the dense model")
    parser.add_argument("--models", type=Path, help="folder that keeps the dense models")
    args = parser.parse_args(arguments)
    path = args.show or args.json
    known = path is not None and path.is_file()
    result = json.loads(path.read_text(encoding="utf-8")) if known else {"rows": []}
    if args.show is None:
        if result.get("settings", settings(args)) != settings(args):
            raise UserError(f"{path} has results of other settings; name another file")
        result |= {"settings": settings(args), "machine": machine()}
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(Path(folder), args, result["rows"]):
                result["rows"].append(row)
                if args.json:
                    args.json.write_text(to_json(result, indent=1) + "\n", encoding="utf-8")
    print(tables(result))
    if args.json:
        print(to_json(result))
    return result


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the results depend on."""
    sizes = {"experts": EXPERTS, "per_token": PER_TOKEN, "layers": LAYERS, "length": LENGTH}
    return {**sizes, "batch": BATCH, "trained": args.trained, "distilled": DISTILLED}


def rows(folder: Path, args: argparse.Namespace, done: list[dict[str, Any]]) -> Iterator[Any]:
    """Yield a result for each seed and case that has none yet."""
    known = {(x["seed"], x["gates"], x["method"], x["steps"]) for x in done}
    for seed in SEEDS:
        todo = [case for case in cases() if (seed, *case) not in known]
        if not todo:
            continue
        dense = (args.models or folder) / f"dense-{seed}-{args.trained}"
        if not dense.is_dir():
            began = time.perf_counter()
            train(dense, seed, args.trained)
            print(f"seed {seed}: trained in {time.perf_counter() - began:.0f} s", flush=True)
        for gates, method, steps in todo:
            record = prune(
                model=str(dense),
                data="demo",
                shape={gates: CASES[gates][0]},
                out=folder / f"{seed}-{gates}-{method}-{steps}",
                method=method,
                gates=gates,
                shapes="uniform",
                steps=steps,
                batch_size=BATCH,
                length=LENGTH,
                shares=[1.0],
                eval_blocks=48,
                seed=seed,
                dtype="float32",
                quiet=True,
            )
            found = {when: record["perplexity"][when] for when in ("before", "after")}
            row = {"seed": seed, "gates": gates, "method": method, "steps": steps}
            row["params"] = record["params"]
            print({**row, **found}, flush=True)
            yield {**row, **found, "sparsity": record["sparsity"], "seconds": record["seconds"]}


def cases() -> Iterator[tuple[str, str, int]]:
    """Yield (kind of gate, method, steps)."""
    for gates, (_, methods, all_steps) in CASES.items():
        yield from ((gates, method, steps) for method in methods for steps in all_steps)


def train(folder: Path, seed: int, steps: int) -> None:
    """Train a mixture on the embedded texts, and save it with its tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            moe_intermediate_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=EXPERTS,
            num_experts_per_tok=PER_TOKEN,
            norm_topk_prob=True,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    )
    blocks = training_blocks(
        "demo", tokenizer, length=LENGTH, count=steps * BATCH, seed=seed
    ).blocks
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    shape = LambdaLR(optimizer, lambda i: min((i + 1) / 50, math.cos(1.4 * i / max(1, steps))))
    for batch in blocks.long().split(BATCH):
        output = model(input_ids=batch, labels=batch, use_cache=False, output_router_logits=True)
        own = output.loss - model.router_aux_loss_coef * output.aux_loss
        (own + BALANCE * sum(map(imbalance, output.router_logits))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shape.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def imbalance(logits_SE: torch.Tensor) -> torch.Tensor:
    """Return a layer's load-balancing loss (arXiv 2101.03961): 1 where all experts serve alike.

    transformers' own is of all layers together, which lets each of them collapse.
    """
    shares_SE = logits_SE.softmax(-1)
    chosen = shares_SE.topk(PER_TOKEN).indices.flatten()
    served_E = torch.bincount(chosen, minlength=EXPERTS) / len(chosen)
    return EXPERTS * (served_E * shares_SE.mean(0)).sum()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of the texts' training part."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (x for own in documents().values() for document in own for x in split(document)[0])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def tables(result: dict[str, Any]) -> str:
    """Return a table for each kind of gate that has results."""
    kinds = dict.fromkeys(x["gates"] for x in result["rows"])
    found = [table(kind, [x for x in result["rows"] if x["gates"] == kind]) for kind in kinds]
    return "\n\n".join(found) or "no results"


def table(kind: str, found: list[dict[str, Any]]) -> str:
    """Return the table of geometric means over the texts: the seeds' mean, and each seed's."""
    dense = {x["seed"]: geometric(x["before"]) for x in found}
    columns = sorted({x["steps"] for x in found})
    head = [f"{kind} kept by", *map(title, columns)]
    lines = [head, ["---"] * len(head)]
    lines.append(["all (dense)", *[told(dense.values())] * len(columns)])
    for method in dict.fromkeys(x["method"] for x in found):
        own = [x for x in found if x["method"] == method]
        cells = [
            told(geometric(x["after"]) for x in own if x["steps"] == column) for column in columns
        ]
        lines.append([method, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def title(steps: int) -> str:
    """Return the head of a column."""
    return f"after {steps} steps" if steps else "one-shot"


def geometric(values: dict[str, float]) -> float:
    """Return the geometric mean of perplexities."""
    return math.exp(mean(map(math.log, values.values())))


def told(values: Iterable[float]) -> str:
    """Return the mean of the seeds' values, and each of them."""
    each = list(values)
    return "-" if not each else f"{mean(each):.1f} ({', '.join(f'{value:.1f}' for value in each)})"


if __name__ == "__main__":
    main()
