"""The job of `eval`: models judged alike, dense or pruned."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.console import Bars, Output, dtype_name
from nuteprune.data.fingerprint import Fingerprint, kind_of, learned_from
from nuteprune.data.prompts import read_prompts
from nuteprune.data.specs import DEMO, check_distinct
from nuteprune.data.tokens import check_ids, check_positions
from nuteprune.errors import RunFailed, UserError
from nuteprune.files import at_home
from nuteprune.jobs import sources
from nuteprune.jobs.options import Evaluation
from nuteprune.jobs.verdicts import Verdicts
from nuteprune.judge import published, published_blocks
from nuteprune.judge.answers import TOKENS
from nuteprune.judge.context import SEED, copying
from nuteprune.judge.perplexity import perplexity
from nuteprune.judge.tasks import Tasks
from nuteprune.model.anatomy import Anatomy
from nuteprune.stages.judge import judge_beside

BLOCKS = 96
"""Blocks of text at most that the use of context is measured on."""


def run(asked: Evaluation, output: Output) -> dict[str, Any]:
    """Judge the models, print what was found, and return it.

    Raises:
        UserError: for anything that cannot work.
        RunFailed: if a perplexity is no finite number.
    """
    sources.use_family(asked.family, asked.against or asked.model)
    _check(asked)
    names = [name for name in (asked.model, asked.against) if name is not None]
    questions = None
    if asked.tasks is not None:
        tasks = [x.strip() for x in asked.tasks.split(",") if x.strip()]
        include = None if asked.include_path is None else at_home(asked.include_path)
        questions = Tasks(tasks, include, asked.limit, asked.fewshot)
    kind = sources.pick_device(asked.device)
    computed = sources.pick_dtype(asked.dtype, kind)
    tokenizers = [sources.load_tokenizer(name, asked.trust_remote_code) for name in names]
    tokenizer = tokenizers[0]
    cut: dict[str, published_blocks.Blocks] = {}
    if asked.data or asked.protocol or questions is None:
        cut = _blocks(asked, tokenizer, _learned(names))
    prompts = None if asked.prompts is None else read_prompts(asked.prompts, tokenizer)
    beside = asked.against is not None and bool(cut or prompts)
    if beside and tokenizers[1].get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--against {asked.against} has another tokenizer, so perplexities do not compare; "
            "pass the model that was pruned"
        )
    verdicts = Verdicts(cut, questions)
    held: list[PreTrainedModel] = []
    with output.bars() as bars:
        for i, (name, own) in enumerate(zip(names, tokenizers, strict=True)):
            bars.update("models", i, len(names), name)
            loaded = sources.load_model(name, computed).to(kind)  # type: ignore[arg-type]
            if cut:
                verdicts.perplexity[name] = _measure(name, loaded, cut, asked.batch_size, bars)
            seed = SEED if asked.copying_seed is None else asked.copying_seed
            if copied := copying(loaded, own, seed=seed, batch_size=asked.batch_size):
                verdicts.copying[name] = copied
            if questions is not None:
                verdicts.tasks[name] = questions.ask(loaded, own, asked.batch_size)
            if beside:
                held.append(loaded)
            del loaded
            gc.collect()
        bars.update("models", len(names), len(names))
        if beside:
            bars.update("answers and context", 0, 1)
            text = {name: blocks.tokens_NT for name, blocks in cut.items()}
            pruned, dense = held
            verdicts.beside = judge_beside(
                dense,
                pruned,
                tokenizer,
                text,
                prompts=prompts,
                tokens=asked.answer_tokens or TOKENS,
                blocks=BLOCKS,
                batch_size=asked.batch_size,
            )
            bars.update("answers and context", 1, 1)
    if asked.against is not None:
        verdicts.compare(asked.model, asked.against)
    verdicts.print(output)
    stated = {"device": kind, "dtype": dtype_name(computed)}
    return {"model": asked.model, "against": asked.against, **stated, **verdicts.to_dict()}


def _check(asked: Evaluation) -> None:
    smallest = {"batch_size": 1, "answer_tokens": 1, "copying_seed": 0, "fewshot": 0}
    for name, least in smallest.items():
        value = getattr(asked, name)
        if value is not None and not least <= value < 2**31:
            raise UserError(f"{_option(name)} {value}: pass a number from {least} to {2**31 - 1}")
    for name in ("prompts", "answer_tokens"):
        if getattr(asked, name) is not None and asked.against is None:
            raise UserError(
                f"{_option(name)} is for answers beside the dense model's; name that as --against"
            )
    for name in ("include_path", "limit", "fewshot"):
        if getattr(asked, name) is not None and asked.tasks is None:
            raise UserError(f"{_option(name)} is for tasks; name some with --tasks")
    no_text = asked.tasks is not None and not (asked.data or asked.protocol)
    answers = () if asked.prompts else ("answer_tokens",)  # else beginnings of the text
    for name in (*asked.changes, "whole", "text_column", *answers):
        if getattr(asked, name) not in (None, False) and no_text:
            raise UserError(
                f"{_option(name)} is for text, and with --tasks none is read unless --data is"
            )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _learned(models: Sequence[str]) -> list[Fingerprint | None]:
    """Return what records say of the text that models were made with; empty if they say nothing."""
    return [text for x in models for text in learned_from(sources.record_of(x) or {})]


def _blocks(
    asked: Evaluation,
    tokenizer: PreTrainedTokenizerBase,
    learned: Sequence[Fingerprint | None],
) -> dict[str, published_blocks.Blocks]:
    """Cut each text by the protocol that was asked for, or by the one that suits it."""
    protocol, whole = asked.protocol, asked.whole
    named = published.protocol_named(protocol) if protocol else None
    specs = asked.data or (list(named.texts) if named else [DEMO])
    cut: dict[str, published_blocks.Blocks] = {}
    for spec in specs:
        is_published = spec.partition("=")[0] in published.TEXTS
        name = protocol or ("nuteprune" if is_published else published.HELD_OUT)
        how = published.changed(published.protocol_named(name), **asked.changes)
        found = published_blocks.rows_of(
            spec, whole=whole, text_column=asked.text_column, tokenizer=tokenizer
        )
        for source, rows in found.items():
            check_distinct(source, cut)
            made = published_blocks.make_blocks(source, rows.read(), tokenizer, how)
            kind = kind_of(rows.fingerprint, learned) if learned else None
            part = "all" if whole or is_published else "held-out"
            described = {"kind": kind, "protocol": name, "part": part, **made.described}
            cut[source] = dataclasses.replace(made, described=described)
    return cut


def _measure(
    name: str, loaded: Any, cut: Mapping[str, published_blocks.Blocks], batch_size: int, bars: Bars
) -> dict[str, float]:
    """Return the perplexity on each text."""
    vocabulary = Anatomy(loaded).embedding.weight.shape[0]
    found = {}
    for i, (source, blocks) in enumerate(cut.items()):
        bars.update(f"perplexity, {name}", i, len(cut), source)
        check_ids(blocks.tokens_NT, vocabulary)
        check_positions(blocks.tokens_NT.shape[1], loaded.config)
        found[source] = perplexity(
            loaded, blocks.tokens_NT, batch_size=batch_size, context=blocks.context_N
        )
    bars.update(f"perplexity, {name}", len(cut), len(cut))
    if not all(map(math.isfinite, found.values())):
        raise RunFailed(
            f"the perplexity of {name} is not finite ({found}): try --dtype float32; if that "
            "does not help, the checkpoint is damaged"
        )
    return found
