"""ALBERT (Lan et al. 2020): BERT with narrow embeddings, whose layers share their parameters.

A block's parameters are trunk/layer_N, once for all the depths at which it runs: N is the number of its group times the blocks
in a group, plus its place there. The published checkpoints have one group of one block, trunk/layer_0. So rules by depth count
blocks, not depths, and an adapter at a block is shared by its depths, as the block is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from mtl_jax.core.errors import UserError
from mtl_jax.models.encoder import EncoderConfig
from mtl_jax.pretrained import bert
from mtl_jax.pretrained.family import MOST_LAYERS, Family, Fields, translate

# Fields of config.json whose defaults are not BERT's.
DEFAULTS = {"hidden_act": "gelu_new", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# Our module path to the file's; the first {} is the number of a group, the second that of a block in it.
NAMES: dict[str, str | tuple[str, ...]] = {
    "trunk/embeddings/project": "encoder.embedding_hidden_mapping_in",
    **{
        f"trunk/group_{{}}/layer_{{}}/{ours}": f"encoder.albert_layer_groups.{{}}.albert_layers.{{}}.{theirs}"
        for ours, theirs in {
            "attention/query": "attention.query",
            "attention/key": "attention.key",
            "attention/value": "attention.value",
            "attention/output": "attention.dense",
            "attention_norm": "attention.LayerNorm",
            "feed_forward_in": "ffn",
            "feed_forward_out": "ffn_output",
            "feed_forward_norm": "full_layer_layer_norm",
        }.items()
    },
    "pooler/dense": "pooler",
    "head/classifier": "classifier",
    "head/tags": "classifier",
    "head/answers": "qa_outputs",
    "head/transform": "predictions.dense",
    "head/norm": "predictions.LayerNorm",
    "head/decoder": "predictions.decoder",
}


def config(raw: Mapping[str, Any], where: str) -> EncoderConfig:
    """config.json to EncoderConfig.

    Raises:
        UserError: A field is missing, or its value has no counterpart here.
    """
    fields = Fields(raw, where)
    layers = fields.layers("num_hidden_layers")
    groups, size = fields.layers("num_hidden_groups", 1), fields.layers("inner_group_num", 1)
    if groups > layers:
        raise UserError(f"{where}: num_hidden_groups is {groups}; it must be at most num_hidden_layers, {layers}")
    if layers * size > MOST_LAYERS:
        raise UserError(f"{where}: inner_group_num is {size}; times num_hidden_layers, {layers}, it is beyond {MOST_LAYERS}")
    given = {name: value for name, value in raw.items() if value is not None}
    return bert.config(
        DEFAULTS | given,
        where,
        embedding_size=fields.integer("embedding_size", 128),
        head_dropout=fields.rate("classifier_dropout_prob", 0.1),
        layer_groups=groups,
        group_size=size,
    )


def names(path: str, cfg: EncoderConfig) -> list[str]:
    """Tensor names of a parameter."""
    if path == "head/bias":
        return bert.lm_bias(cfg, "predictions.bias", "predictions.decoder.bias")
    in_block = re.match(r"trunk/layer_(\d+)/(.*)", path)
    if in_block is not None:
        group, number = divmod(int(in_block[1]), cfg.group_size)
        path = f"trunk/group_{group}/layer_{number}/{in_block[2]}"
    return translate(path, bert.TRUNK | NAMES)


ALBERT = Family(
    model_types=("albert",),
    config=config,
    build=bert.build,
    names=names,
    heads={
        "AlbertForSequenceClassification": "sequence_classification",
        "AlbertForTokenClassification": "token_classification",
        "AlbertForQuestionAnswering": "question_answering",
        "AlbertForMaskedLM": "masked_lm",
        "AlbertForPreTraining": "masked_lm",
    },
    base="AlbertModel",
    prefix="albert.",
    untied=("predictions.decoder.weight",),
    ignored=r"(.*\.)?position_ids|predictions\.(bias|decoder\.(weight|bias))",
    extra=functools.partial(bert.untied_bias, "predictions.bias"),
)
