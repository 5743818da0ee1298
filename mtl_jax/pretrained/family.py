"""What a family of checkpoints is: its configuration, its modules and its tensor names.

Parameters of a loaded checkpoint are {"trunk": ...}, with "pooler" and "head" beside it where the checkpoint's class has
them. Between file and parameters lies a renaming and nothing else, but that leaves named "kernel" are transposed: PyTorch keeps
linear weights as [out, in], linen as [in, out].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

# Kinds of heads, and what their logits are.
KINDS = {
    "sequence_classification": "f[B, num_labels]",
    "token_classification": "f[B, T, num_labels]",
    "question_answering": "f[B, T, 2], start and end of the answer",
    "masked_lm": "f[B, T, vocab_size]",
    "replaced_token": "f[B, T], above 0 where a token was replaced (ELECTRA's discriminator)",
    "seq2seq_lm": "f[B, T, vocab_size] over the decoder's T",
}
LABELLED = ("sequence_classification", "token_classification", "question_answering")

# Where every trunk keeps its token embeddings; a tied head reads them.
TABLE = "trunk/embeddings/word/embedding"

# Our leaf name to the file's, the one that is saved first; older files say gamma and beta.
LEAVES = {"embedding": ("weight",), "kernel": ("weight",), "scale": ("weight", "gamma"), "bias": ("bias", "beta")}


def _nothing(params: Any, config: Any) -> dict[str, np.ndarray]:
    return {}


def _trunk_table(config: Any) -> str:
    return TABLE


def _no_constants(config: Any) -> dict[str, Any]:
    return {}


class Family(NamedTuple):
    """One family of checkpoints. Model types whose transformers classes have other names are families of their own.

    Attributes:
        model_types: Values of config.json's model_type.
        config: (raw config.json, its name for errors) -> frozen dataclass of sizes and constants; raises UserError that names
            the field. It has vocab_size, hidden_size, num_labels, tied (does a language-model head read the token table),
            max_length (longest example in tokens, None for no bound), and its dropout rates have "dropout" in their names.
        build: (config, head kind or None, compute dtype) -> linen module with parameters {"trunk"[, "pooler"][, "head"]} and an
            attribute `trunk`, the encoder alone (the call signature of models.encoder.Encoder).
        names: (our path, config) -> names the tensor may have, the one it is saved under first. Paths are "trunk/...",
            "pooler/..." and "head/..."; for the first two the names come without the base prefix, for heads in full.
        heads: transformers class name (architectures[0] of config.json) -> head kind; the first class of a kind is the
            one that is saved. Classes that are not here are loaded without a head.
        base: The class that is saved without a head; None where there is no such class.
        prefix: What the base model's tensors are called in a class with a head, for example "bert.".
        untied: Names of a language-model head's own output weight, where it may have one. Present and different from the token
            table means not tied, whatever config.json says.
        table: config -> our path of the table that a tied language-model head reads.
        ignored: Regular expression for names of tensors that carry nothing: position_ids, tied copies, computed tables.
        defaults: Our path -> the number that fills it where the file lacks it. Paths that are not here must be present.
        extra: (params, config) -> tensors by name that transformers wants in the file beside our parameters: computed tables,
            copies.
        constants: config -> fields of config.json that are saved beside those that were read.
        inputs: Arguments that the module needs beside input_ids, as the shape [B, T] of input_ids, by name.
    """

    model_types: tuple[str, ...]
    config: Callable[[Mapping[str, Any], str], Any]
    build: Callable[[Any, str | None, Any], nn.Module]
    names: Callable[[str, Any], list[str]]
    heads: Mapping[str, str]
    base: str | None
    prefix: str = ""
    untied: tuple[str, ...] = ()
    table: Callable[[Any], str] = _trunk_table
    ignored: str = r"(.*\.)?position_ids"
    defaults: Mapping[str, float] = {}
    extra: Callable[[Any, Any], Mapping[str, np.ndarray]] = _nothing
    constants: Callable[[Any], Mapping[str, Any]] = _no_constants
    inputs: tuple[str, ...] = ()


def translate(path: str, table: Mapping[str, str | tuple[str, ...]]) -> list[str]:
    """The names of a parameter by a table of module paths.

    Args:
        path: For example "trunk/layer_3/attention/query/kernel".
        table: Module path with "{}" for numbers -> the file's, for example {"trunk/layer_{}/attention/query":
            "encoder.layer.{}.attention.self.query"}; several where files differ, the one to save first.

    Returns:
        For example ["encoder.layer.3.attention.self.query.weight"].
    """
    module, leaf = path.rsplit("/", 1)
    numbers = re.findall(r"_(\d+)", module)
    stems = table[re.sub(r"_\d+", "_{}", module)]
    stems = (stems,) if isinstance(stems, str) else stems
    return [f"{stem.format(*numbers)}.{name}" for stem in stems for name in LEAVES[leaf]]
