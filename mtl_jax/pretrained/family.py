"""A family of checkpoints: its modules, its tensor names, and the checked fields of its config.json.

Parameters of a loaded checkpoint are {"trunk": ...}, with "pooler" and "head" beside it where the checkpoint's class has
them. Tensors of a file become parameters under other names; leaves named "kernel" are transposed, too, because PyTorch keeps
linear weights as [out, in] and linen as [in, out].
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from mtl_jax.core.errors import UserError, unknown

# Kinds of heads, and the shapes of their logits.
KINDS = {
    "sequence_classification": "f[B, num_labels]",
    "token_classification": "f[B, T, num_labels]",
    "question_answering": "f[B, T, 2], start and end of the answer",
    "masked_lm": "f[B, T, vocab_size]",
    "replaced_token": "f[B, T], above 0 where a token was replaced (ELECTRA's discriminator)",
    "seq2seq_lm": "f[B, T, vocab_size] over the decoder's T",
    "causal_lm": "f[B, T, vocab_size], of the token that follows each",
}
LABELLED = ("sequence_classification", "token_classification", "question_answering")

# Path of every trunk's token embeddings; a tied head reads them.
TABLE = "trunk/embeddings/word/embedding"

# Our leaf name -> its names in files, the name to save under first. Older files have gamma and beta.
LEAVES = {"embedding": ("weight",), "kernel": ("weight",), "scale": ("weight", "gamma"), "bias": ("bias", "beta")}


REQUIRED: Any = object()
LARGEST = 2**31 - 1  # the largest 32-bit index
MOST_LAYERS = 1000
MOST_LABELS = 1_000_000
MOST_NUMBER = 1e12  # its square is still a float32
MOST_COMPUTED = 2**16  # rows of a computed table, whose size no tensor of the file confirms

_BRIEF = reprlib.Repr()
_BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 100, 100, 40


def _nothing(params: Any, config: Any) -> dict[str, np.ndarray]:
    return {}


def _trunk_table(config: Any) -> str:
    return TABLE


def _first_token(config: Any) -> str:
    return "first"


def _no_constants(config: Any) -> dict[str, Any]:
    return {}


class Family(NamedTuple):
    """One family of checkpoints. Model types with other class names in transformers are separate families.

    Attributes:
        model_types: Values of config.json's model_type.
        config: (raw config.json, its name for errors) -> frozen dataclass of sizes and constants; raises UserError that names
            the field. It has vocab_size, hidden_size, num_labels, tied (whether a language-model head reads the token
            table) and max_length (longest example in tokens, None for no bound). Names of its dropout rates contain "dropout".
        build: (config, head kind or None, compute dtype) -> linen module with parameters {"trunk"[, "pooler"][, "head"]} and an
            attribute `trunk`, the encoder alone (the call signature of models.encoder.Encoder).
        names: (our path, config) -> names that the tensor may have in a file, the first to save under. Paths are
            "trunk/...", "pooler/..." and "head/..."; names of the first two lack the base prefix, those of heads are whole.
        heads: transformers class name (architectures[0] of config.json) -> head kind; a kind is saved as the
            first class that has it. A class that is not listed is loaded without a head.
        base: The class that a model without a head is saved as; None where transformers has no such class.
        prefix: Prefix of the base model's tensors in a class with a head, for example "bert.".
        untied: Names of a language-model head's output weight, where it may be a separate tensor. If the file has it and it
            differs from the token table, the head is not tied, whatever config.json says.
        table: config -> our path of the table that a tied language-model head reads.
        ignored: Regular expression for names of tensors that are not needed: position_ids, tied copies, computed tables.
        defaults: Our path -> the number that fills the parameter where the file lacks it. All other parameters must be present.
        extra: (params, config) -> further tensors by name that transformers expects in the file: computed tables, copies.
        constants: config -> fields of config.json to save in addition to those that were read.
        text_vector: config -> the vector of a text that its class for sequence classification reads: first, last, or mean, of
            the text's tokens; "" where it reads each of them.
        inputs: Names of the arguments that the module needs beside input_ids; each is i32[B, T], too.
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
    text_vector: Callable[[Any], str] = _first_token
    inputs: tuple[str, ...] = ()


def translate(path: str, table: Mapping[str, str | tuple[str, ...]]) -> list[str]:
    """The names that a parameter may have in a file, by a table of module paths.

    Args:
        path: For example "trunk/layer_3/attention/query/kernel".
        table: Module path with "{}" for numbers -> the module's name in files, for example {"trunk/layer_{}/attention/query":
            "encoder.layer.{}.attention.self.query"}. Several names where files differ, the name to save under first.

    Returns:
        For example ["encoder.layer.3.attention.self.query.weight"].
    """
    module, leaf = path.rsplit("/", 1)
    numbers = re.findall(r"_(\d+)", module)
    stems = table[re.sub(r"_\d+", "_{}", module)]
    stems = (stems,) if isinstance(stems, str) else stems
    return [f"{stem.format(*numbers)}.{name}" for stem in stems for name in LEAVES[leaf]]


def brief(value: Any) -> str:
    """A value from a file as error lines print it: on one line, shortened where it is long."""
    return _BRIEF.repr(value)


def finite(value: Any) -> bool:
    """Whether a value is a number that a float32 can represent."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and abs(value) < 3.4e38 if isinstance(value, float) else abs(value) < 10**38


class Fields(NamedTuple):
    """A parsed config.json. Each method takes a field's name and a default, and raises a UserError that names the field.

    null counts as absent: transformers writes it for fields that are not set.

    Attributes:
        raw: The parsed file.
        where: Its name, for errors.
    """

    raw: Mapping[str, Any]
    where: str

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise UserError(f"{self.where}: the field {name!r} is missing")
        return default

    def integer(self, name: str, default: Any = REQUIRED, minimum: int = 1, maximum: int = LARGEST) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise UserError(f"{self.where}: {name} is {brief(value)}; it must be a whole number of at least {minimum}")
        if value > maximum:
            raise UserError(f"{self.where}: {name} is {brief(value)}; it must be at most {maximum}")
        return value

    def layers(self, name: str, default: Any = REQUIRED) -> int:
        return self.integer(name, default, maximum=MOST_LAYERS)

    def number(self, name: str, default: Any = REQUIRED) -> float:
        value = self.get(name, default)
        if not finite(value) or value < 0:
            raise UserError(f"{self.where}: {name} is {brief(value)}; it must be a number of at least 0")
        if value > MOST_NUMBER:
            raise UserError(f"{self.where}: {name} is {brief(value)}; it must be at most {MOST_NUMBER:g}")
        return float(value)

    def rate(self, name: str, default: Any = REQUIRED) -> float:
        value = self.number(name, default)
        if value >= 1:
            raise UserError(f"{self.where}: {name} is {value!r}; a dropout rate is below 1")
        return value

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {name} is {brief(value)}; it must be true or false")
        return value

    def choice(self, name: str, choices: Any, default: Any = REQUIRED) -> str:
        value = self.get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise unknown(f"{name} in {self.where}:", value if isinstance(value, str) else brief(value), choices)
        return value

    def num_labels(self, default: int = 2) -> int:
        """The number of labels: transformers writes id2label, or num_labels, or neither for the family's default."""
        labels, number = self.get("id2label", None), self.integer("num_labels", default, maximum=MOST_LABELS)
        if labels is None:
            return number
        if not isinstance(labels, Mapping) or not 0 < len(labels) <= MOST_LABELS:
            raise UserError(f"{self.where}: id2label is {brief(labels)}; it must be an object of numbers and names")
        return len(labels)

    def heads_divide(self, hidden: int, heads: int) -> None:
        if hidden % heads:
            raise UserError(f"{self.where}: the hidden size {hidden} is not a multiple of the {heads} attention heads")
