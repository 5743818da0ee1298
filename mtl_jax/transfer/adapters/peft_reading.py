"""From the tensors of a PEFT directory to adapters, kind by kind: LoRA and its relatives, IA3, prefixes, prompts.

Shapes in names: I inputs of a linear map, O its outputs, R rank, P length of a prompt or prefix, N heads, D size of a head.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.models.causal_model import CausalModel
from mtl_jax.models.encoder_decoder import Seq2Seq
from mtl_jax.models.modernbert import MeanPooler
from mtl_jax.pretrained.checkpoint import Checkpoint
from mtl_jax.transfer.adapters import peft_config
from mtl_jax.transfer.adapters.adapted import ADAPTERS
from mtl_jax.transfer.adapters.adapted_checkpoint import HEAD, TRUNK, add_adapters, layers, with_params
from mtl_jax.transfer.adapters.base import Adapter, Layer
from mtl_jax.transfer.adapters.ia3 import IA3
from mtl_jax.transfer.adapters.lora import Lora
from mtl_jax.transfer.adapters.low_rank import Dora, Pissa, RsLora
from mtl_jax.transfer.adapters.peft_config import PeftConfig
from mtl_jax.transfer.adapters.prefix import Prefix
from mtl_jax.transfer.adapters.prompt_tuning import WORDS, PromptTuning

NAME = "default"  # of adapters that are read, as PEFT calls them
NO_LAYER = "(?!)"  # an expression that matches nothing
SELF_ATTENTION = r"layer_\d+/attention"


class Reading(NamedTuple):
    """A PEFT directory and its base.

    Attributes:
        config: Its fields.
        tensors: {name without PEFT's prefix: tensor}, those of adapters.
        modules: {module of transformers: our path of a linear map}.
        checkpoint: The base.
    """

    config: PeftConfig
    tensors: Mapping[str, np.ndarray]
    modules: Mapping[str, str]
    checkpoint: Checkpoint


def read(reading: Reading) -> Checkpoint:
    """The base with the adapters of a PEFT directory.

    Raises:
        UserError: A tensor does not fit the base, or a field does not fit the tensors.
    """
    return READERS[reading.config.kind](reading)


def _read_lora(reading: Reading) -> Checkpoint:
    config, checkpoint = reading.config, reading.checkpoint
    leaves = _by_module(reading, r"lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?")
    dora, rslora = config.fields.flag("use_dora", False), config.fields.flag("use_rslora", False)
    pissa = config.fields.raw.get("init_lora_weights", True) == "pissa"
    if pissa and (dora or rslora):
        raise UserError(
            f"{config.where}: init_lora_weights is pissa together with use_dora or use_rslora; that is not read here"
        )
    groups: dict[tuple[str, int, float], dict[str, dict[str, np.ndarray]]] = {}
    for module, found in leaves.items():
        path = reading.modules[module]
        kernel = trees.flat(checkpoint.params)[f"{path}/kernel"]
        rank, alpha = config.rank(module), config.alpha(module)
        for name, shape in (("lora_A", (rank, kernel.shape[0])), ("lora_B", (kernel.shape[1], rank))):
            _check_shape(config, found, f"{module}.{name}.weight", shape)
        params = {"a": found["lora_A"].T, "b": found["lora_B"].T}
        if dora:
            _check_shape(config, found, f"{module}.lora_magnitude_vector", (kernel.shape[1],))
            params["magnitude"] = found["lora_magnitude_vector"]
        elif "lora_magnitude_vector" in found:
            raise UserError(f"{config.where}: use_dora is false, but {module} has a lora_magnitude_vector")
        part, _, inside = path.partition("/")
        groups.setdefault((part, rank, alpha), {})[inside] = params
    dropout = config.fields.rate("lora_dropout", 0.0)

    def adapter(name: str, paths: Sequence[str], rank: int, alpha: float) -> Lora:
        kind = Pissa if pissa else Dora if dora else RsLora if rslora else Lora
        if dora and rslora:
            alpha *= math.sqrt(rank)
        return kind(name=name, rank=rank, alpha=alpha, dropout=dropout, target=_either(paths))

    makers = [
        (part, paths, lambda name, paths, rank=rank, alpha=alpha: adapter(name, paths, rank, alpha))
        for (part, rank, alpha), paths in groups.items()
    ]
    return _with(checkpoint, makers)


def _read_ia3(reading: Reading) -> Checkpoint:
    config = reading.config
    feed_forward = config.fields.raw.get("feedforward_modules") or []
    leaves = _by_module(reading, "ia3_l")
    parts: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    on_input: set[str] = set()
    for module, found in leaves.items():
        path = reading.modules[module]
        inputs, outputs = trees.flat(reading.checkpoint.params)[f"{path}/kernel"].shape
        is_input = peft_config.named(feed_forward, module)
        _check_shape(config, found, f"{module}.ia3_l", (1, inputs) if is_input else (outputs, 1))
        part, _, inside = path.partition("/")
        on_input |= {inside} if is_input else set()
        parts.setdefault(part, {})[inside] = {"scale": found["ia3_l"].reshape(-1)}

    def adapter(name: str, paths: Sequence[str]) -> IA3:
        inputs = [path for path in paths if path in on_input]
        return IA3(name=name, target=_either(paths), inputs=_either(inputs) if inputs else NO_LAYER)

    return _with(reading.checkpoint, [(part, paths, adapter) for part, paths in parts.items()])


def _read_prefix(reading: Reading) -> Checkpoint:
    config, checkpoint = reading.config, reading.checkpoint
    decoder = isinstance(checkpoint.model, Seq2Seq)
    part = HEAD if decoder else TRUNK
    check_prefix(checkpoint, config.where)
    attentions = self_attentions(checkpoint, part)
    N, D = attentions[0].heads, attentions[0].head_size
    length = config.fields.integer("num_virtual_tokens")
    _check_shape(config, reading.tensors, "prompt_embeddings", (length, 2 * len(attentions) * N * D))
    entries_PxLxNxD = reading.tensors["prompt_embeddings"].reshape(length, -1, N, D)
    prefix = Prefix(name=NAME, length=length, shift=True, target=SELF_ATTENTION if decoder else ".*")
    adapted = add_adapters(checkpoint, *(((), [prefix]) if decoder else ([prefix], ())))
    values = {}
    for number, layer in enumerate(attentions):
        first = first_entry(number, len(attentions), decoder)
        for offset, name in enumerate(("key", "value")):
            values[f"{part}/{ADAPTERS}/{NAME}/{layer.path}/{name}"] = entries_PxLxNxD[:, first + offset]
    return with_params(adapted, values)


def check_prefix(checkpoint: Checkpoint, where: str) -> None:
    """Raises UserError if a prefix means another thing in PEFT."""
    if "relative" in getattr(checkpoint.config, "positions", ""):
        raise UserError(
            f"{where}: a prefix has a bias of relative positions in PEFT and none here; of T5 it is not read or written"
        )


def first_entry(layer: int, count: int, decoder: bool) -> int:
    """The place of a layer's keys in PEFT's table, its values are next.

    For encoder-decoders PEFT gives a layer four entries, of which cross-attention's two are then dropped, out of a table that
    it repeats; so layers of the two halves share theirs.
    """
    return 4 * layer % (2 * count) if decoder else 2 * layer


def _read_prompt(reading: Reading) -> Checkpoint:
    config, checkpoint = reading.config, reading.checkpoint
    check_prompt(checkpoint, config.where)
    words = next(layer for layer in layers(checkpoint)[TRUNK].values() if layer.kind == WORDS)
    length = config.fields.integer("num_virtual_tokens")
    _check_shape(config, reading.tensors, "prompt_embeddings", (length, words.outputs))
    adapted = add_adapters(checkpoint, [PromptTuning(name=NAME, length=length, keep=True)])
    return with_params(adapted, {f"{TRUNK}/{ADAPTERS}/{NAME}/{words.path}/prompt": reading.tensors["prompt_embeddings"]})


def check_prompt(checkpoint: Checkpoint, where: str) -> None:
    model: Any = checkpoint.model
    if isinstance(model, Seq2Seq):
        raise UserError(f"{where}: prompt tuning of an encoder-decoder, whose decoder reads the prompt; only encoders are read")
    if isinstance(model, CausalModel):
        raise UserError(f"{where}: prompt tuning of a decoder-only model; only encoders are read")
    if isinstance(model.pooler, MeanPooler):
        raise UserError(f"{where}: prompt tuning of a model whose head reads the mean of all tokens, the prompt's among them")


READERS: dict[str, Callable[[Reading], Checkpoint]] = {
    peft_config.LORA: _read_lora,
    peft_config.IA3: _read_ia3,
    peft_config.PREFIX: _read_prefix,
    peft_config.PROMPT: _read_prompt,
}


def _by_module(reading: Reading, leaves: str) -> dict[str, dict[str, np.ndarray]]:
    """{module: {leaf: tensor}}, checked against the modules that target_modules names."""
    config = reading.config
    by_module: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in reading.tensors.items():
        match = re.fullmatch(rf"(.+)\.({leaves})", name)
        if match is None:
            raise UserError(
                f"{config.where}: the tensor {name} is of no linear map with such an adapter and of no module of the base; "
                "load the base with the head that it was trained with"
            )
        if match[1] not in reading.modules:
            near = next(iter(reading.modules), "none")
            raise UserError(
                f"{config.where}: for another base: {match[1]} is no linear map of it, which has {near} and others; load the "
                "base with the head that the adapter was trained with"
            )
        by_module.setdefault(match[1], {})[match[2].removesuffix(".weight")] = tensor
    if not by_module:
        raise UserError(f"{config.where}: there are no tensors of adapters beside it")
    paths = {reading.modules[module] for module in by_module}
    partial = config.target == peft_config.ALL_LINEAR or config.fields.raw.get("layers_to_transform") is not None
    for module, path in reading.modules.items():
        if module in by_module and not config.targets(module):
            raise UserError(f"{config.where}: {module} has tensors, but target_modules does not name it")
        if not partial and path not in paths and config.targets(module):
            raise UserError(f"{config.where}: target_modules names {module}, which has no tensors")
    peft_config.check_patterns(config, by_module)
    return by_module


def _check_shape(config: PeftConfig, tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> None:
    leaf = name if name in tensors else name.removesuffix(".weight").rpartition(".")[2]
    if leaf not in tensors:
        raise UserError(f"{config.where}: the tensor {name} is missing")
    if tensors[leaf].shape != shape:
        raise UserError(
            f"{config.where}: for another base, or rank_pattern is wrong: {name} has shape {tensors[leaf].shape}, and {shape} "
            "is needed"
        )


Maker = Callable[[str, Sequence[str]], Adapter]


def _with(checkpoint: Checkpoint, makers: Sequence[tuple[str, Mapping[str, Mapping[str, Any]], Maker]]) -> Checkpoint:
    """The checkpoint with adapters.

    Args:
        checkpoint: The base.
        makers: (part, {path inside it: parameters}, (name, paths) -> adapter).
    """
    known = layers(checkpoint)
    adapters: dict[str, list[Adapter]] = {TRUNK: [], HEAD: []}
    values: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    flat = trees.flat(checkpoint.params)
    for number, (part, paths, maker) in enumerate(makers):
        name = NAME if number == 0 else f"{NAME}_{number + 1}"
        inside = [path for path in paths if path in known.get(part, {})]
        if inside:
            adapters[part].append(maker(name, inside))
        for path, params in paths.items():
            if path in inside:
                values |= {f"{part}/{ADAPTERS}/{name}/{path}/{leaf}": array for leaf, array in params.items()}
                continue
            # A head or a pooler: its kernel takes the adapter up.
            kernel = {leaf: flat[f"{part}/{path}/{leaf}"] for leaf in ("kernel", "bias") if f"{part}/{path}/{leaf}" in flat}
            layer, adapter = Layer(path, "dense", *kernel["kernel"].shape), maker(name, [path])
            whole = {**adapter.start(jax.random.key(0), layer, kernel), **params}
            merged |= {f"{part}/{path}/{leaf}": array for leaf, array in adapter.merged(whole, kernel, layer).items()}
    taken_up = tuple(sorted({path.rpartition("/")[0] for path in merged}))
    base = dataclasses.replace(with_params(checkpoint, merged), merged=taken_up)
    adapted = add_adapters(base, adapters[TRUNK], adapters[HEAD])
    return with_params(adapted, {path: np.ascontiguousarray(array) for path, array in values.items()})


def _either(paths: Sequence[str]) -> str:
    return "|".join(re.escape(path).replace(r"\-", "-") for path in paths)


def self_attentions(checkpoint: Checkpoint, part: str) -> list[Layer]:
    """The self-attentions of a trunk or decoder, lowest layer first.

    Raises:
        UserError: It has none that a prefix can be in.
    """
    found = [layer for layer in layers(checkpoint)[part].values() if re.fullmatch(SELF_ATTENTION, layer.path)]
    if not found or any(layer.rotated for layer in found):
        raise UserError("prefix tuning: PEFT has no form for a prefix in a model with rotary positions, or without attention")
    return sorted(found, key=lambda layer: int(re.findall(r"\d+", layer.path)[0]))
