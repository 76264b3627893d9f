"""How llama.cpp splits text before byte-level BPE merges, by the name in the file.

A wrong name gives other tokens without a word. So the name is found by comparing what it does with
what the tokenizer does, on text that is hard to split.
"""

from __future__ import annotations

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
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"  # a word
_WORDS = _CONTRACTION + "|" + _BEFORE + r"\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_OTHERS_AND_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LOWER_CASE, _UPPER_CASE = f"{_BEFORE}{_UPPER}*{_LOWER}+", f"{_BEFORE}{_UPPER}+{_LOWER}*"
_GPT4O = f"{_LOWER_CASE}{_CONTRACTION}?|{_UPPER_CASE}{_CONTRACTION}?" + r"|\p{N}{1,3}"
_TEKKEN = f"{_LOWER_CASE}|{_UPPER_CASE}" + r"|\p{N}"
_QWEN35 = (
    _CONTRACTION + "|" + _BEFORE + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _TAIL
)
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _TAIL
)


SPLITS = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_WORDS + r"\p{N}{1,3}" + _OTHERS,),
    "qwen2": (_WORDS + r"\p{N}" + _OTHERS,),
    "gpt-4o": (_GPT4O + _OTHERS_AND_SLASH,),
    "tekken": (_TEKKEN + _OTHERS_AND_SLASH,),
    "qwen35": (_QWEN35,),
    "deepseek-v3": (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK),
}
"""llama.cpp's name (`tokenizer.ggml.pre`) -> how it splits text before merging: by regular
expressions, one after another; in `llama-vocab.cpp`."""
IGNORE_MERGES = ("llama-bpe", "tekken")
"""Those by which a piece that is a token stays whole, whatever the merges say."""


def find_split(backend: Tokenizer) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer splits text before merging.

    Raises:
        UserError: if it is none of those in `SPLITS`.
    """
    given = backend.pre_tokenizer
    for name in SPLITS if given is not None else ():
        if _pieces(pre_tokenizer(name)) == _pieces(given):
            return name
    raise UserError(
        "the tokenizer splits text in a way that is none of llama.cpp's known ones "
        f"({', '.join(SPLITS)}); if you know its name there, "
        "nuteprune export takes it as --pre-tokenizer NAME"
    )


def _pieces(splits: Any) -> list[list[str]]:
    return [[piece for piece, _ in splits.pre_tokenize_str(text)] for text in PROBES]


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """Return the splitter that llama.cpp uses for a name of `SPLITS`."""
    steps = [pre_tokenizers.Split(Regex(p), "isolated") for p in SPLITS[name]]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, bytes_])
