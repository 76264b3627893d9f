"""tables.md, made from benchmarks/results: `python docs/all_tables.py > docs/tables.md`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import default_table
import plan_tables
import quantized_table

_INTRO = """\
# Tables

This page is generated from benchmarks/results (`python docs/all_tables.py > docs/tables.md`).
[Quality](quality.md) and [memory and time](cost.md) say what follows from it.

## What a setting changes

Compare these rows with each other only. Columns are those
of [quality](quality.md#the-default-on-other-text).

| row | what else is older in it |
|---|---|
| longer texts | self-written texts are as long as a block; gradients are clipped to 1. So run, \
the default has 2.63, 1.85 and 43 % at 50 % and 400 steps |
| clipped to 1 | gradients are clipped to a norm of 1, not 0.5; 27 % chats |
"""
_QUANTIZED = """\
## Pruned, quantized, or both

GGUF files in llama.cpp (`benchmarks/quantized.py`,
[quantized.json](../benchmarks/results/quantized.json)); [what
follows](faq.md#should-i-prune-at-all).

- *Other text* is perplexity ÷ that of the dense model's F16 file, on 6 blocks of 256 of its
  tokens of each kind of [other text](quality.md#the-default-on-other-text); ± is the standard
  error over blocks. A model of fewer tokens spells the same blocks in more tokens; all its nats
  count.
- *Answers that loop*: of 24, greedy, of at most 64 tokens. SmolLM2 answers questions that it wrote
  itself; Gemma, a base model, continues beginnings of text, and goes round in circles by itself.
- *Prefill* (256 tokens) and *decode* (32 tokens, one sequence) are tokens a second ÷ those of the
  dense model's F16 file in the same round; medians of three rounds, two threads on two cores.
  Rounds differ by some 10 %: F16 cuts of SmolLM2 by 10 and 20 % decode faster than their bytes
  allow (1.08 and 1.19), which is noise.
- Pruned by default, seed 0: SmolLM2 in free shapes and 160 steps, Gemma in uniform shapes and 80,
  since llama.cpp has no free shapes for it. The 50 % model of SmolLM2 went on from step 120 of an
  older run, to read own answers. Both dense models come from files of 4 bits.

"""
_PLANS = """\
## Plans of large models

Nothing here is measured (`benchmarks/plan_tables.py`,
[plan-large.json](../benchmarks/results/plan-large.json)). Shapes are those of the published
configs: 512 tokens a block, batches of 4 x 4 blocks, 20 % removed in 80 steps, in bfloat16.

- *Batch of 1* and *and checkpointing* add up. Each later column adds one setting to these two, by
  formula.
- `judge` holds the smaller model beside the dense one. Models in few bits are judged in main
  memory; they and sharded ones are sliced there.
- `score` may be too high: it still cuts all attention unit by unit. PFLOP is the work of all
  products as asked.
- *Sent*: what each device sends to others for all of a stage, by the stages' own sums and by the
  weights that they gather, its weights whole or sharded. Devices share the same text.
"""


def tables_page() -> str:
    """Return the text of docs/tables.md."""
    runs = json.loads(default_table.RESULTS.read_text(encoding="utf-8"))
    plans = json.loads(plan_tables.RESULTS.read_text(encoding="utf-8"))
    quantized = json.loads(quantized_table.RESULTS.read_text(encoding="utf-8"))
    variants = default_table.tables(runs)[default_table.VARIANTS]
    return "\n".join(
        [
            _INTRO,
            variants,
            "",
            _QUANTIZED + quantized_table.table(quantized),
            "",
            _PLANS,
            *(f"{plan_tables.table(x)}\n\n{plan_tables.traffic(x)}\n" for x in plans),
        ]
    )


if __name__ == "__main__":
    print(tables_page(), end="")
