"""The registry of checkpoint families, by model_type of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtl_jax.core.errors import unknown
from mtl_jax.pretrained import (
    albert,
    bert,
    deberta_v2,
    distilbert,
    electra,
    eurobert_family,
    llama_family,
    marian_bart,
    modernbert_family,
    mpnet,
    nomic_gte,
    roberta,
    t5,
)
from mtl_jax.pretrained.family import Family

FAMILIES: tuple[Family, ...] = (
    bert.BERT,
    roberta.ROBERTA,
    roberta.XLM_ROBERTA,
    distilbert.DISTILBERT,
    electra.ELECTRA,
    modernbert_family.MODERNBERT,
    roberta.CAMEMBERT,
    mpnet.MPNET,
    albert.ALBERT,
    deberta_v2.DEBERTA_V2,
    nomic_gte.NOMIC_BERT,
    nomic_gte.GTE,
    eurobert_family.EUROBERT,
    marian_bart.MARIAN,
    marian_bart.BART,
    marian_bart.MBART,
    marian_bart.PEGASUS,
    marian_bart.M2M,
    t5.T5,
    t5.MT5,
    t5.UMT5,
    *(llama_family.LLAMA, llama_family.QWEN2, llama_family.QWEN3, llama_family.GEMMA3),
)

BY_TYPE: dict[str, Family] = {model_type: family for family in FAMILIES for model_type in family.model_types}


def of(raw: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json belongs to.

    Args:
        raw: The parsed file.
        where: Its name, for errors.

    Raises:
        UserError: No family has its model_type; the message lists those that do.
    """
    model_type = str(raw.get("model_type"))
    if model_type not in BY_TYPE:
        raise unknown(f"model_type in {where}:", model_type, BY_TYPE)
    return BY_TYPE[model_type]
