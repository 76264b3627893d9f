"""How llama.cpp splits text before a byte-level BPE merges it: by names that a file states.

A wrong name gives other tokens without a word. So the name is found by comparing what it does with
what the tokenizer does, on text that is hard to split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from nuteprune.errors import UserError

PROBES = (
    "The history of bread begins about 12,000 years ago.",
    "I'll say it's 3.14159, they've 1234567 and we'd 42; DON'T, HE'LL",
    "def f(x_1, *args):\n    return {'a': [x_1 ** 2 for _ in args]}  # done\n\n\n\treturn",
    "Zażółć gęślą jaźń, l'été où naïveté coûte 5€; ÄÖÜß",
    "  two  spaces   and\ttabs \n \n  trailing   ",
    "日本語のテキスト 한국어 العربية हिन्दी ประเทศไทย",
    "🙂👩‍👩‍👧 emoji … “quotes” — dashes / slashes\\ and HTML <b>bold</b>",
    "CamelCaseWords snake_case_words kebab-case x=y+1 http://a.b/c?d=e&f=g",
)
"""Text on which tokenizers part: numbers, contractions, code, accents, spaces, scripts."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    r"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{suffix}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{suffix}"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_OTHERS_AND_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"


@dataclass(frozen=True)
class Split:
    """One of llama.cpp's splits of text before merging: regular expressions, one after another."""

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    """A piece that is a token stays whole, whatever the merges say."""


SPLITS: dict[str, Split] = {
    "gpt-2": Split((_GPT2,)),
    "smollm": Split((r"\p{N}", _GPT2)),
    "llama-bpe": Split((_WORDS + r"\p{N}{1,3}" + _OTHERS + _TAIL,), ignores_merges=True),
    "qwen2": Split((_WORDS + r"\p{N}" + _OTHERS + _TAIL,)),
    "gpt-4o": Split(
        (
            _CASED.format(upper=_UPPER, lower=_LOWER, suffix=_CONTRACTION)
            + r"|\p{N}{1,3}"
            + _OTHERS_AND_SLASH
            + _TAIL,
        )
    ),
    "tekken": Split(
        (
            _CASED.format(upper=_UPPER, lower=_LOWER, suffix="")
            + r"|\p{N}"
            + _OTHERS_AND_SLASH
            + _TAIL,
        ),
        ignores_merges=True,
    ),
    "qwen35": Split(
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
            r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _TAIL,
        )
    ),
    "deepseek-v3": Split(
        (
            r"\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
            r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _TAIL,
        )
    ),
}
"""llama.cpp's name (`tokenizer.ggml.pre`) -> what it does; in `llama-vocab.cpp`."""


def find_split(backend: Tokenizer) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer splits text before merging.

    Raises:
        UserError: if it is none of those in `SPLITS`.
    """
    given = backend.pre_tokenizer
    for name in SPLITS:
        ours = pre_tokenizer(name)
        if given is not None and all(
            _pieces(given, text) == _pieces(ours, text) for text in PROBES
        ):
            return name
    raise UserError(
        "the tokenizer splits text in a way that is none of llama.cpp's known ones "
        f"({', '.join(SPLITS)}); if you know its name there, "
        "nuteprune export takes it as --pre-tokenizer NAME"
    )


def _pieces(splits: Any, text: str) -> list[str]:
    return [piece for piece, _ in splits.pre_tokenize_str(text)]


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """Return what splits text as llama.cpp does by a name of `SPLITS`."""
    steps = [pre_tokenizers.Split(Regex(p), "isolated") for p in SPLITS[name].patterns]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, bytes_])
