"""The model card: README.md of a pruned checkpoint, made from its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [nuteprune, pruned, structured-pruning]
base_model: {base_model}
---

# {name}, {sparsity:.1%} of its decoder pruned

{base_model} with {sparsity:.1%} of the parameters of its decoder layers' projections physically
removed ({total:.1%} of all parameters) by structured pruning with numerous teachers
([arXiv 2402.09773](https://arxiv.org/abs/2402.09773)). Licence: that of {base_model}.

| | before | after |
|---|---|---|
| parameters | {before:,} | {after:,} |
{perplexity}
Perplexity is on held-out text: {protocol}

## How to load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder{remote})
model = AutoModelForCausalLM.from_pretrained(folder{remote})
```

{how}
"""

_FREE = """\
Its layers differ in size, so a short modeling file travels with the weights (`modeling_pruned.py`:
it builds the stock layers at the sizes that `config.json` states). Without remote code:
`from nuteprune import load_pruned; model = load_pruned(folder)`."""

_STOCK = (
    "All layers have the same size: it is a model of the stock class, and no extra code is needed."
)


def model_card(record: Mapping[str, Any], *, remote_code: bool) -> str:
    """Return the card's text.

    Args:
        record: as `record.make_record` gives it.
        remote_code: whether the checkpoint brings its modeling file.
    """
    ppl, base_model = record.get("perplexity", {}), record.get("base_model", "the intact model")
    before, after = ppl.get("before", {}), ppl.get("after", {})
    rows = "".join(
        f"| perplexity, {source} | {before[source]:.2f} | {after[source]:.2f} |\n"
        for source in before
    )
    return _CARD.format(
        base_model=base_model,
        name=base_model.rstrip("/").rpartition("/")[2],
        sparsity=record["sparsity"],
        total=record["total_sparsity"],
        before=record["params"]["before"],
        after=record["params"]["after"],
        perplexity=rows,
        protocol=ppl.get("protocol", {}).get("measure", "not measured."),
        remote=", trust_remote_code=True" if remote_code else "",
        how=_FREE if remote_code else _STOCK,
    )
