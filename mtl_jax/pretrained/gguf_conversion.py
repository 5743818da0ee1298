"""GGUF files as directories that transformers opens: config.json, float32 safetensors and the tokenizer.

An architecture of llama.cpp is an entry of ARCHITECTURES: a function from the file's fields to config.json, one to the
tokenizer, and what llama.cpp did to the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core.errors import UserError, count, listed
from mtl_jax.core.files import reason
from mtl_jax.pretrained import families, placing
from mtl_jax.pretrained.family import Fields
from mtl_jax.pretrained.gguf_files import GgufFile, open_gguf
from mtl_jax.pretrained.lazy_tensor import LazyTensor
from mtl_jax.pretrained.tensor_writing import write_safetensors

CONTROL, ADDED = 3, 4  # types of tokens: special ones, and further ones that are never divided
LARGEST_GEMMA3 = 62  # blocks of the 27B model, whose attention has another scale; the file does not state it


class Architecture(NamedTuple):
    """What llama.cpp's files of one architecture mean.

    Attributes:
        name: Its name in the gguf package's tables of tensor names.
        config: (the file's fields, rows of the token table) -> config.json.
        tokenizer: (the file's fields) -> a tokenizer of transformers.
        norm_offset: What llama.cpp adds to the scales of norms.
    """

    name: str
    config: Callable[[Fields, int], dict[str, Any]]
    tokenizer: Callable[[Fields], Any]
    norm_offset: float = 0.0


class _Restored(NamedTuple):
    """A tensor to write, which is read when it is written."""

    tensor: LazyTensor
    offset: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def size(self) -> int:
        return 4 * int(np.prod(self.shape))

    def data(self) -> np.ndarray:
        values = self.tensor.read()
        return values - np.float32(self.offset) if self.offset else values


def convert(file: Path, folder: Path) -> None:
    """Writes a GGUF file as a checkpoint of transformers into an existing directory.

    Args:
        file: The GGUF file.
        folder: The directory.

    Raises:
        UserError: The gguf package is missing, the file is damaged, its architecture is unknown, or a tensor is missing or
            unknown.
    """
    opened = open_gguf(file)
    fields = Fields(opened.fields, str(file))
    kind = fields.choice("general.architecture", ARCHITECTURES)
    architecture = ARCHITECTURES[kind]
    if "token_embd.weight" not in opened.tensors:
        raise UserError(f"{file}: the tensor token_embd.weight is missing")
    raw = architecture.config(fields, opened.tensors["token_embd.weight"].shape[0])
    tensors = _renamed(opened, raw, architecture, file)
    try:
        architecture.tokenizer(fields).save_pretrained(folder)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"{file}: transformers cannot make a tokenizer of its fields ({reason(error)})") from error
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_safetensors(folder / "model.safetensors", tensors)


def _renamed(opened: GgufFile, raw: Mapping[str, Any], architecture: Architecture, file: Path) -> dict[str, _Restored]:
    """The file's tensors by the names of transformers, in their order.

    Raises:
        UserError: A tensor is missing, or has no place in the model.
    """
    import gguf

    family = families.of(raw, str(file))
    config = family.config(raw, str(file))
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(number, raw["num_hidden_layers"])
    tensors, unread = {}, dict(opened.tensors)
    for path in placing.shapes(family, family.build(config, family.heads[raw["architectures"][0]], np.float32)):
        name = family.names(path, config)[0]
        name = name if path.startswith("head/") else family.prefix + name
        theirs = f"{names.get_name(name.removesuffix('.weight'))}.weight"
        if theirs not in unread:
            raise UserError(f"{file}: the tensor {theirs} is missing")
        tensors[name] = _Restored(unread.pop(theirs), architecture.norm_offset if path.endswith("/scale") else 0.0)
    if unread:
        raise UserError(f"{file}: {listed(unread)} has no place in a {raw['model_type']} model")
    return dict(sorted(tensors.items()))


def gemma3_config(fields: Fields, vocabulary: int) -> dict[str, Any]:
    """config.json of a Gemma 3 text model.

    Three numbers are constants of the family that the files do not state: every sixth layer is global, local layers rotate
    with base 10,000, and scores are divided by the root of the head's size, but for the 27B model.

    Raises:
        UserError: A field is missing or has a value without a counterpart.
    """

    def key(name: str) -> str:
        return f"gemma3.{name}"

    hidden, layers = fields.integer(key("embedding_length")), fields.layers(key("block_count"))
    heads, head_size = fields.integer(key("attention.head_count")), fields.integer(key("attention.key_length"), 256)
    if fields.integer(key("attention.value_length"), head_size) != head_size:
        raise UserError(f"{fields.where}: {key('attention.value_length')} differs from key_length, which is not supported")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": fields.number(key("rope.freq_base"), 1e6)}
    if fields.choice(key("rope.scaling.type"), ("none", "linear"), "none") == "linear":
        rope |= {"rope_type": "linear", "factor": fields.number(key("rope.scaling.factor"))}
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": fields.integer(key("feed_forward_length")),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer(key("attention.head_count_kv")),
        "head_dim": head_size,
        "query_pre_attn_scalar": hidden // heads if layers == LARGEST_GEMMA3 else head_size,
        "rms_norm_eps": fields.number(key("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": fields.integer(key("context_length")),
        "sliding_window": fields.integer(key("attention.sliding_window")),
        "layer_types": [("sliding" if (number + 1) % 6 else "full") + "_attention" for number in range(layers)],
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "tie_word_embeddings": True,
        "dtype": "float32",
        **{name: fields.integer(f"tokenizer.ggml.{ours}", minimum=0) for name, ours in _SPECIAL_IDS.items()},
    }


_SPECIAL_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}


def gemma_tokenizer(fields: Fields) -> Any:
    """Gemma's tokenizer: byte pairs over a SentencePiece vocabulary, whose merges follow from it.

    Raises:
        UserError: The fields of the tokenizer are missing or of another kind.
    """
    from transformers import AddedToken, GemmaTokenizer

    fields.choice("tokenizer.ggml.model", ("llama",))
    spelled = _list(fields, "tokenizer.ggml.tokens", str)
    # Runs of spaces stand in the file as they are, all other spaces as "▁".
    tokens = [token if token.strip() else token.replace(" ", "▁") for token in spelled]
    kinds = _list(fields, "tokenizer.ggml.token_type", int)
    if len(kinds) != len(tokens):
        raise UserError(
            f"{fields.where}: tokenizer.ggml.token_type has {len(kinds)} entries, for {count(len(tokens), 'token')}"
        )
    ids = (fields.integer(f"tokenizer.ggml.{name}_token_id", minimum=0) for name in ("bos", "eos", "unknown", "padding"))
    bos, eos, unknown_token, padding = (tokens[number] for number in ids)
    tokenizer = GemmaTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges(tokens),  # type: ignore[arg-type]  # pairs are taken, too
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown_token,
        pad_token=padding,
        add_bos_token=fields.flag("tokenizer.ggml.add_bos_token", True),
        add_eos_token=fields.flag("tokenizer.ggml.add_eos_token", False),
        model_max_length=fields.integer("gemma3.context_length"),
    )
    for wanted in (CONTROL, ADDED):
        texts = [
            token
            for token, respelled, kind in zip(spelled, tokens, kinds, strict=True)
            if kind == wanted and token == respelled
        ]
        added = [AddedToken(text, normalized=False, special=wanted == CONTROL) for text in texts]
        tokenizer.add_tokens(added, special_tokens=wanted == CONTROL)
    tokenizer.chat_template = fields.get("tokenizer.chat_template", None)
    return tokenizer


def merges(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of tokens that make up another: in the order of what they make, of one token the longer first half first."""
    vocabulary = frozenset(tokens)
    pairs: list[tuple[str, str]] = []
    for token in tokens:
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        cuts = [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
        pairs += cuts[::-1]
    return pairs


def _list(fields: Fields, name: str, kind: type) -> list[Any]:
    values = fields.get(name)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise UserError(f"{fields.where}: {name} must be a list of {'texts' if kind is str else 'numbers'}")
    return values


ARCHITECTURES: dict[str, Architecture] = {
    "gemma3": Architecture("gemma3", gemma3_config, gemma_tokenizer, norm_offset=1.0),
}
