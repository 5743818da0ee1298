"""EuroBERT (Boizard et al. 2025): the configuration, and tensor names, which are Llama's but for the heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from mtl_jax.core.errors import UserError
from mtl_jax.models.checkpoint_heads import EncoderModel, TokenHead
from mtl_jax.models.eurobert import POOLINGS, EuroBert, EuroBertConfig, RowHead, TokenLogits
from mtl_jax.pretrained import llama_family
from mtl_jax.pretrained.family import Family, Fields, translate

NAMES = llama_family.NAMES | {"head/dense": "dense", "head/classifier": "classifier"}


def config(raw: Mapping[str, Any], where: str) -> EuroBertConfig:
    """config.json to EuroBertConfig, in the form of transformers or that of the published files.

    Args:
        raw: The parsed file.
        where: Its name, for errors.

    Raises:
        UserError: A field is missing, or its value has no counterpart here.
    """
    fields = Fields(raw, where)
    sizes = llama_family.llama_config({"rms_norm_eps": 1e-5, "max_position_embeddings": 8192} | dict(raw), where)
    if sizes.rope.kind == "dynamic":
        raise UserError(f"{where}: rope_type is dynamic; default, linear and llama3 are supported")
    pooling = "clf_pooling" if "clf_pooling" in raw and "classifier_pooling" not in raw else "classifier_pooling"
    values = {field.name: getattr(sizes, field.name) for field in dataclasses.fields(sizes)}
    return EuroBertConfig(**values, head_pooling=fields.choice(pooling, POOLINGS, "late"))


def build(cfg: EuroBertConfig, kind: str | None, dtype: Any) -> EncoderModel:
    """EuroBERT with a head of the given kind."""
    trunk = EuroBert(cfg, dtype)
    if kind is None:
        return EncoderModel(trunk)
    if kind == "masked_lm":
        return EncoderModel(trunk, head=TokenLogits(cfg, dtype))
    if kind == "sequence_classification":
        return EncoderModel(trunk, head=RowHead(cfg, dtype))
    init = nn.initializers.normal(cfg.initializer_range)
    return EncoderModel(trunk, head=TokenHead(cfg.num_labels, dtype, init, layer="classifier"))


def text_vector(cfg: EuroBertConfig) -> str:
    """The vector of a text that its classifier reads; "" where it reads all of them, of whose logits the mean is the text's."""
    return {"bos": "first", "mean": "mean"}.get(cfg.head_pooling, "")


def names(path: str, cfg: EuroBertConfig) -> list[str]:
    """Tensor names of a parameter."""
    return ["lm_head.bias"] if path == "head/bias" else translate(path, NAMES)


EUROBERT = Family(
    model_types=("eurobert",),
    config=config,
    build=build,
    names=names,
    heads={
        "EuroBertForSequenceClassification": "sequence_classification",
        "EuroBertForTokenClassification": "token_classification",
        "EuroBertForMaskedLM": "masked_lm",
    },
    base="EuroBertModel",
    prefix="model.",
    untied=("lm_head.weight",),
    ignored=r"(.*\.)?rotary_emb\..*|lm_head\.weight",
    constants=lambda cfg: {"classifier_pooling": cfg.head_pooling},
    text_vector=text_vector,
)
