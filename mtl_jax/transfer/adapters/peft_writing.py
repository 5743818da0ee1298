"""From adapters to the fields and tensors of a PEFT directory, kind by kind: LoRA and its relatives, IA3, prefixes, prompts.

Shapes in names: I inputs of a linear map, O its outputs, R rank, P length of a prompt or prefix, N heads, D size of a head.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.models.encoder_decoder import Seq2Seq
from mtl_jax.pretrained.checkpoint import Checkpoint
from mtl_jax.pretrained.saving import Saved
from mtl_jax.transfer.adapters import peft_config
from mtl_jax.transfer.adapters.adapted_checkpoint import TRUNK, adapters_of, layers, params_of
from mtl_jax.transfer.adapters.base import Adapter, Layer
from mtl_jax.transfer.adapters.ia3 import IA3, scale_of
from mtl_jax.transfer.adapters.lora import Lora
from mtl_jax.transfer.adapters.low_rank import Dora, Pissa, RsLora
from mtl_jax.transfer.adapters.peft_reading import check_prefix, check_prompt, first_entry, self_attentions
from mtl_jax.transfer.adapters.prefix import Prefix
from mtl_jax.transfer.adapters.prompt_tuning import PromptTuning

PREFIX_KEY = "base_model.model."


class Writing(NamedTuple):
    """A checkpoint with adapters.

    Attributes:
        checkpoint: The checkpoint.
        modules: {our path of a linear map: its module in transformers}.
    """

    checkpoint: Checkpoint
    modules: Mapping[str, str]

    def adapters(self) -> Iterator[tuple[str, Adapter]]:
        """(part, adapter) of trunk and decoder."""
        for part, adapters in adapters_of(self.checkpoint).items():
            yield from ((part, adapter) for adapter in adapters)


class LoraEntry(NamedTuple):
    """A LoRA at one linear map.

    Attributes:
        a: f32[I, R].
        b: f32[R, O].
        alpha: The change is alpha / R times A B, or with rsLoRA alpha / sqrt(R).
        magnitude: f32[O] of DoRA, or None.
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float
    magnitude: np.ndarray | None

    @property
    def rank(self) -> int:
        return self.b.shape[0]


def _lora_entries(writing: Writing) -> tuple[dict[str, LoraEntry], bool]:
    """{our path: entry}, and whether the factor is alpha / sqrt(rank) in all of them."""
    adapters = [(part, adapter) for part, adapter in writing.adapters() if isinstance(adapter, Lora)]
    rslora = all(isinstance(adapter, RsLora) for _, adapter in adapters)
    kinds = {isinstance(adapter, Dora) for _, adapter in adapters}
    if len(kinds) > 1:
        raise UserError(
            "adapters with and without DoRA: use_dora of a PEFT directory is for all layers alike; write them one by one"
        )
    entries: dict[str, LoraEntry] = {}
    for part, adapter in adapters:
        for inside, params in params_of(writing.checkpoint, part, adapter).items():
            p = {name: np.asarray(leaf, np.float32) for name, leaf in params.items()}
            a, b, scale = p["a"], p["b"], adapter.scale
            if isinstance(adapter, Pissa):
                a, b = np.concatenate([a, p["fixed_a"]], 1), np.concatenate([b, -p["fixed_b"]], 0)
            alpha = adapter.alpha if rslora else scale * b.shape[0]
            entry, path = LoraEntry(a, b, alpha, p.get("magnitude")), f"{part}/{inside}"
            if path in entries:
                entry = _stacked(entries[path], entry, rslora)
            entries[path] = entry
    return entries, rslora


def _stacked(first: LoraEntry, second: LoraEntry, rslora: bool) -> LoraEntry:
    """Two LoRAs at one layer as one of the sum of their ranks, whose factor is 1."""
    power = 0.5 if rslora else 1.0
    a = np.concatenate([first.a, second.a], 1)
    b = np.concatenate([np.float32(entry.alpha / entry.rank**power) * entry.b for entry in (first, second)], 0)
    return LoraEntry(a, b, float(b.shape[0] ** power), None)


def _write_lora(writing: Writing) -> tuple[dict[str, Any], dict[str, Saved]]:
    entries, rslora = _lora_entries(writing)
    modules = {path: writing.modules[path] for path in entries}
    rank = collections.Counter(entry.rank for entry in entries.values()).most_common(1)[0][0]
    alpha = collections.Counter(entry.alpha for entry in entries.values()).most_common(1)[0][0]
    tensors: dict[str, Saved] = {}
    for path, entry in entries.items():
        key = PREFIX_KEY + modules[path]
        tensors |= {f"{key}.lora_A.weight": Saved(entry.a, True), f"{key}.lora_B.weight": Saved(entry.b, True)}
        if entry.magnitude is not None:
            tensors[f"{key}.lora_magnitude_vector"] = Saved(entry.magnitude, False)
    fields = {
        **{"peft_type": peft_config.LORA, "r": rank, "lora_alpha": alpha, "use_rslora": rslora, "bias": "none"},
        "lora_dropout": max(adapter.dropout for _, adapter in writing.adapters() if isinstance(adapter, Lora)),
        "use_dora": any(entry.magnitude is not None for entry in entries.values()),
        "target_modules": sorted(modules.values()),
        "rank_pattern": {modules[path]: entry.rank for path, entry in entries.items() if entry.rank != rank},
        "alpha_pattern": {modules[path]: entry.alpha for path, entry in entries.items() if entry.alpha != alpha},
        **{"fan_in_fan_out": False, "init_lora_weights": True},
    }
    return fields, tensors


def _write_ia3(writing: Writing) -> tuple[dict[str, Any], dict[str, Saved]]:
    scales: dict[str, np.ndarray] = {}
    on_input: dict[str, bool] = {}
    for part, adapter in writing.adapters():
        assert isinstance(adapter, IA3)
        for inside, params in params_of(writing.checkpoint, part, adapter).items():
            path, is_input = f"{part}/{inside}", adapter.on_input(Layer(inside, "dense"))
            if on_input.setdefault(path, is_input) != is_input:
                raise UserError(
                    f"adapter {adapter.name!r}: another one scales the other side of {path}; PEFT has one for each layer"
                )
            scales[path] = np.asarray(scale_of(params)) * scales.get(path, np.float32(1))
    tensors = {
        f"{PREFIX_KEY}{writing.modules[path]}.ia3_l": Saved(scale[None] if on_input[path] else scale[:, None], False)
        for path, scale in scales.items()
    }
    fields = {
        "peft_type": peft_config.IA3,
        "target_modules": sorted(writing.modules[path] for path in scales),
        "feedforward_modules": sorted(writing.modules[path] for path in scales if on_input[path]),
        **{"fan_in_fan_out": False, "init_ia3_weights": True},
    }
    return fields, tensors


def _write_prefix(writing: Writing) -> tuple[dict[str, Any], dict[str, Saved]]:
    checkpoint = writing.checkpoint
    ((part, adapter),) = list(writing.adapters())
    assert isinstance(adapter, Prefix)
    check_prefix(checkpoint, f"adapter {adapter.name!r}")
    decoder = isinstance(checkpoint.model, Seq2Seq)
    if decoder and part == TRUNK:
        raise UserError(
            f"adapter {adapter.name!r}: PEFT has the prefix of an encoder-decoder in the decoder, not in the encoder"
        )
    attentions = self_attentions(checkpoint, part)
    if not adapter.shift:
        raise UserError(
            f"adapter {adapter.name!r}: in PEFT the positions of a text begin after the prefix: train it with shift=True to "
            "take it there"
        )
    N, D, params = attentions[0].heads, attentions[0].head_size, params_of(checkpoint, part, adapter)
    table_PxLxNxD = np.zeros((adapter.length, 2 * len(attentions), N, D), np.float32)
    taken: set[int] = set()
    for number, layer in enumerate(attentions):
        first = first_entry(number, len(attentions), decoder)
        entry = np.stack([np.asarray(params[layer.path][name], np.float32) for name in ("key", "value")], 1)
        if first in taken and not np.array_equal(table_PxLxNxD[:, first : first + 2], entry):
            raise UserError(
                f"adapter {adapter.name!r}: in an encoder-decoder PEFT gives {layer.path} the prefix of a lower layer, so it "
                "has no form for a prefix whose layers differ"
            )
        table_PxLxNxD[:, first : first + 2] = entry
        taken.add(first)
    fields = _prompt_fields(peft_config.PREFIX, adapter.length, attentions, N * D, 2 if decoder else 1)
    fields |= {"prefix_projection": False, "encoder_hidden_size": N * D}
    return fields, {"prompt_embeddings": Saved(table_PxLxNxD.reshape(adapter.length, -1), False)}


def _write_prompt(writing: Writing) -> tuple[dict[str, Any], dict[str, Saved]]:
    checkpoint = writing.checkpoint
    ((_, adapter),) = list(writing.adapters())
    assert isinstance(adapter, PromptTuning)
    check_prompt(checkpoint, f"adapter {adapter.name!r}")
    if checkpoint.head == "sequence_classification" and not adapter.keep:
        raise UserError(
            f"adapter {adapter.name!r}: in PEFT the head of a text reads the prompt's first vector; here it does not"
        )
    attentions = [layer for layer in layers(checkpoint)[TRUNK].values() if layer.kind in ("attention", "rotary")]
    ((_, params),) = params_of(checkpoint, TRUNK, adapter).items()
    fields = _prompt_fields(peft_config.PROMPT, adapter.length, attentions, params["prompt"].shape[1], 1)
    return fields | {"prompt_tuning_init": "RANDOM"}, {"prompt_embeddings": Saved(params["prompt"], False)}


def _prompt_fields(kind: str, length: int, attentions: Sequence[Layer], width: int, submodules: int) -> dict[str, Any]:
    return {
        **{"peft_type": kind, "num_virtual_tokens": length, "token_dim": width, "num_layers": len(attentions)},
        **{"num_attention_heads": attentions[0].heads, "num_transformer_submodules": submodules},
    }


Written = tuple[dict[str, Any], dict[str, Saved]]
# (classes of adapters, the function that writes them)
WRITERS: tuple[tuple[type[Adapter], Callable[[Writing], Written]], ...] = (
    (Lora, _write_lora),
    (IA3, _write_ia3),
    (Prefix, _write_prefix),
    (PromptTuning, _write_prompt),
)
