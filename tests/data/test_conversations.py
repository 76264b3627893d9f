from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from nuteprune.data.examples import Stretch, encode
from nuteprune.distill.losses import IGNORED


def test_stretches_go_on_where_the_text_before_them_ends(
    sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Tokenized apart, each stretch would begin with the space that such tokenizers put first."""
    parts = [Stretch("the student [/INST]", False), Stretch(" learns a teacher", True)]
    parts += [Stretch(" [INST] the", False), Stretch(" than", True)]
    found = encode(parts, sentencepiece_tokenizer, 99)
    assert found is not None
    ids, labels = (x.tolist() for x in found)
    whole = "".join(part.text for part in parts)
    assert ids == sentencepiece_tokenizer(whole, add_special_tokens=False).input_ids
    answered = [x for x in labels if x != IGNORED]
    assert sentencepiece_tokenizer.decode(answered).split() == ["learns", "a", "teacher", "than"]
