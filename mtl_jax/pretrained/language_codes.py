"""Tokenizers that mark texts by their language: mBART, mBART-50, M2M100, NLLB.

Such a tokenizer has a token for each language. It adds that of the source to source texts and that of the target to target
texts. tokenizer_config.json may name the two (src_lang, tgt_lang). A task that names others gets a copy of the tokenizer.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple


def ids(tokenizer: Any) -> dict[str, int]:
    """The token of each language, by its code; {} for a tokenizer that does not mark languages.

    Args:
        tokenizer: A transformers tokenizer.
    """
    if not hasattr(tokenizer, "tgt_lang"):
        return {}
    tokens = getattr(tokenizer, "lang_code_to_id", None)
    if not tokens:
        codes = [str(code) for code in getattr(tokenizer, "extra_special_tokens", None) or ()]
        tokens = dict(zip(codes, tokenizer.convert_tokens_to_ids(codes), strict=True))
    other = {getattr(tokenizer, f"{name}_token_id", None) for name in ("unk", "bos", "eos", "pad", "cls", "sep", "mask")}
    return {str(code): int(token) for code, token in tokens.items() if token not in other}


@functools.lru_cache(maxsize=16)
def marked(tokenizer: Any, source: str, target: str) -> Any:
    """A copy of the tokenizer that marks source and target texts with these languages.

    Args:
        tokenizer: A transformers tokenizer; it does not change.
        source: A key of ids(), or "" for the tokenizer's own source language.
        target: The same for targets. Where both are "" the result is the tokenizer itself.
    """
    if not (source or target):
        return tokenizer
    result = copy.deepcopy(tokenizer)
    for field, code in (("src_lang", source), ("tgt_lang", target)):
        if code:
            setattr(result, field, code)
            result.init_kwargs[field] = code  # what save_pretrained writes
    return result


class TargetMarks(NamedTuple):
    """How the texts of a decoder begin.

    Attributes:
        start: The token that the decoder reads first, which is the last one of a target text.
        first: The language's token, if each text begins with it (mBART-50, M2M100, NLLB): it is forced as the first token that
            is generated. None where the decoder reads the language first (mBART).
    """

    start: int
    first: int | None


def target_marks(tokenizer: Any) -> TargetMarks | None:
    """How target texts begin, by a tokenizer that has its languages; None for one that does not mark languages.

    Args:
        tokenizer: A transformers tokenizer.
    """
    languages = ids(tokenizer)
    if not languages:
        return None
    first, *_, last = tokenizer(text_target="")["input_ids"]
    return TargetMarks(last, first if first in languages.values() else None)
