"""PEFT directories in and out: adapter_config.json and adapter_model.safetensors, no pickle.

A module of transformers and a layer here are the same linear map, by the table of the checkpoint's family; so what PEFT has at
the one is an adapter at the other. A checkpoint with adapters is what add_adapters() makes.

Shapes in names: I inputs of a linear map, O its outputs, R rank, P length of a prompt or prefix, N heads, D size of a head.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from mtl_jax.core import digests, trees
from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.staging import check_replaceable, staged
from mtl_jax.models.encoder_decoder import Seq2Seq
from mtl_jax.pretrained import families
from mtl_jax.pretrained.checkpoint import Checkpoint
from mtl_jax.pretrained.family import Family
from mtl_jax.pretrained.saving import Saved, write_safetensors
from mtl_jax.pretrained.tensor_files import open_safetensors, read_json
from mtl_jax.transfer.adapters import peft_config
from mtl_jax.transfer.adapters.adapted_checkpoint import HEAD, TRUNK, without_adapters
from mtl_jax.transfer.adapters.peft_config import FILE, TENSORS, PeftConfig
from mtl_jax.transfer.adapters.peft_reading import Reading, read
from mtl_jax.transfer.adapters.peft_writing import WRITERS, Writing

BASE_HASH = "base_sha256"  # in the metadata of the tensors that are written here; PEFT does not look at it
TASK_TYPES = {
    None: "FEATURE_EXTRACTION",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "causal_lm": "CAUSAL_LM",
}
SAVED_HEADS = ("sequence_classification", "token_classification", "question_answering")
CLASSIFIER = "classifier"  # in modules_to_save of every PEFT directory for texts, whatever it names


class Names(NamedTuple):
    """The names of a checkpoint's parameters in transformers.

    Attributes:
        modules: {name of a module: our path of it}, for linear maps; further names that files have for it, too.
        tensors: {name of a tensor: our path}, for all parameters.
        written: {our path of a parameter: the name to write}.
    """

    modules: Mapping[str, str]
    tensors: Mapping[str, str]
    written: Mapping[str, str]


def load_peft(folder: str | Path, checkpoint: Checkpoint) -> Checkpoint:
    """Opens a PEFT directory on its base.

    LoRA, rsLoRA, DoRA, PiSSA, IA3, prefix tuning and prompt tuning, with rank_pattern, alpha_pattern, target_modules as list or
    expression, and modules_to_save. A LoRA at a layer outside trunk and decoder, such as BERT's pooler, is merged into it.

    Args:
        folder: The directory, with adapter_config.json and adapter_model.safetensors.
        checkpoint: The base, from pretrained.load(), with the head that the adapter was trained with.

    Returns:
        The checkpoint with the adapters, and with the stored modules in place of its own.

    Raises:
        UserError: A file is missing, damaged or a pickle; the directory is for another base; a pattern matches nothing; or a
            field asks for what is not supported. The line names it.

    Examples:
        >>> base = mtl_jax.pretrained.load("PATH-OF-BASE", head="sequence_classification", labels=3)
        >>> adapted = load_peft("PATH-OF-PEFT", base)
        >>> adapted.model.apply({"params": adapted.params}, input_ids, attention_mask).logits
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: not a directory; a PEFT directory has {FILE} and {TENSORS}")
    config = peft_config.parse(read_json(folder, FILE), f"{folder}/{FILE}")
    if not (folder / TENSORS).exists():
        pickled = " (adapter_model.bin is a pickle, which is not read: save it anew in PEFT)"
        raise UserError(f"{folder}: {TENSORS} is missing{pickled if (folder / 'adapter_model.bin').exists() else ''}")
    tensors = {name: np.asarray(tensor.read(), np.float32) for name, tensor in open_safetensors(folder / TENSORS).items()}
    _check_base(folder, checkpoint)
    names = names_of(checkpoint)
    adapter_tensors, saved = _split(config, tensors, names)
    reading = Reading(config, adapter_tensors, names.modules, checkpoint)
    return _with_saved(read(reading), saved, names, config)


def save_peft(
    folder: str | Path, checkpoint: Checkpoint, *, base: str = "", head: bool | None = None, overwrite: bool = False
) -> None:
    """Writes the adapters of a checkpoint as a PEFT directory.

    Args:
        folder: The directory to write.
        checkpoint: The checkpoint with adapters of one kind. PiSSA is written as a difference, of twice the rank.
        base: base_model_name_or_path: where PEFT finds the base; empty: the directory that the checkpoint was loaded from.
        head: Whether its head is stored, too, as modules_to_save; None: for heads that a task trains, those with labels.
        overwrite: Whether a PEFT directory may be replaced.

    Raises:
        UserError: PEFT has no form for an adapter or for several kinds at once, or the folder is not free.
    """
    folder = Path(folder)
    check_replaceable(folder, FILE, "an adapter", overwrite)
    names = names_of(checkpoint)
    whole = checkpoint.head in SAVED_HEADS if head is None else head
    if whole and checkpoint.head is None:
        raise UserError("the checkpoint has no head that could be stored")
    kernels = {path: name for path, name in names.written.items() if path.endswith("/kernel")}
    modules = {path.removesuffix("/kernel"): name.removesuffix(".weight") for path, name in kernels.items()}
    writing = Writing(checkpoint, modules)
    fields, tensors = _written(writing)
    stored = {
        path: name
        for path, name in names.written.items()
        if (whole and path.startswith("head/")) or path.rpartition("/")[0] in checkpoint.merged
    }
    if stored:
        prefix = "base_model." if fields["peft_type"] in (peft_config.PREFIX, peft_config.PROMPT) else "base_model.model."
        flat = trees.flat(checkpoint.params)
        tensors |= {prefix + name: Saved(flat[path], path.endswith("/kernel")) for path, name in stored.items()}
        fields["modules_to_save"] = sorted({_stored_module(name) for name in stored.values()})
    fields |= {
        "base_model_name_or_path": base or str(checkpoint.location),
        "task_type": TASK_TYPES.get(checkpoint.head),
        "inference_mode": True,
    }
    with staged(folder) as staging:
        (staging / FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        metadata = {BASE_HASH: base_hash(checkpoint)}
        write_safetensors(staging / TENSORS, dict(sorted(tensors.items())), metadata)


def _stored_module(tensor: str) -> str:
    """The module that PEFT keeps a copy of, for a tensor of a head; a classifier of several layers is one, as PEFT adds it."""
    module = tensor.rpartition(".")[0]
    return CLASSIFIER if module.startswith(f"{CLASSIFIER}.") else module


def base_hash(checkpoint: Checkpoint) -> str:
    """A SHA-256 of the trunk's own parameters, and of the decoder's where it has one."""
    base = without_adapters(checkpoint)
    parts = (TRUNK, HEAD) if isinstance(base.model, Seq2Seq) and HEAD in base.params else (TRUNK,)
    digest = hashlib.sha256()
    for path, leaf in sorted(trees.flat({part: base.params[part] for part in parts}).items()):
        digest.update(f"{path} {digests.of_array(leaf)}\n".encode())
    return digest.hexdigest()


def names_of(checkpoint: Checkpoint) -> Names:
    """The names of a checkpoint's parameters in transformers, by the table of its family."""
    family: Family = families.of(checkpoint.raw, "config.json")
    prefix = "" if checkpoint.head is None else family.prefix
    modules: dict[str, str] = {}
    tensors: dict[str, str] = {}
    written: dict[str, str] = {}
    for path in trees.flat(without_adapters(checkpoint).params):
        for name in family.names(path, checkpoint.config):
            name = name if path.startswith("head/") else prefix + name
            written.setdefault(path, name)
            tensors.setdefault(name, path)
            if path.endswith("/kernel"):
                modules.setdefault(name.removesuffix(".weight"), path.removesuffix("/kernel"))
    return Names(modules, tensors, written)


def _check_base(folder: Path, checkpoint: Checkpoint) -> None:
    with safetensors.safe_open(folder / TENSORS, "np") as opened:
        expected = (opened.metadata() or {}).get(BASE_HASH)
    if expected and expected != base_hash(checkpoint):
        raise UserError(
            f"{folder}: for another base: the parameters of {checkpoint.location} have another SHA-256 than those that it was "
            "trained on"
        )


def _split(
    config: PeftConfig, tensors: Mapping[str, np.ndarray], names: Names
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tensors of adapters by their names without PEFT's prefix, and stored parameters by our paths."""
    adapters: dict[str, np.ndarray] = {}
    saved: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        names_in_base = [key.removeprefix(prefix) for prefix in ("base_model.model.", "base_model.")]
        name = next((name for name in names_in_base if name in names.tensors), None)
        if name is None:
            adapters[names_in_base[0]] = tensor
        else:
            saved[names.tensors[name]] = tensor
    for path in saved:
        module = next(name for name, ours in names.tensors.items() if ours == path).rpartition(".")[0]
        # PEFT goes by the end of the name: "classifier" is "pre_classifier", too.
        if not any(re.search(rf"{re.escape(stored)}($|\.)", module) for stored in config.modules_to_save):
            raise UserError(f"{config.where}: the tensors have the module {module}, which modules_to_save does not name")
    return adapters, saved


def _with_saved(checkpoint: Checkpoint, saved: Mapping[str, np.ndarray], names: Names, config: PeftConfig) -> Checkpoint:
    """The checkpoint with stored modules in place of its own."""
    flat = trees.flat(checkpoint.params)
    for path, tensor in saved.items():
        array = tensor.T if path.endswith("/kernel") else tensor
        if array.shape != flat[path].shape:
            raise UserError(
                f"{config.where}: for another base: {names.written[path]} has shape {tensor.shape}, and that of the base is "
                f"{Saved(flat[path], path.endswith('/kernel')).shape}; load it with as many labels"
            )
        flat[path] = np.ascontiguousarray(array)
    return dataclasses.replace(checkpoint, params=trees.nested(flat))


def _written(writing: Writing) -> tuple[dict[str, Any], dict[str, Saved]]:
    """The fields of adapter_config.json that are the kind's, and its tensors.

    Raises:
        UserError: PEFT has no form for an adapter, or for these together.
    """
    present = list(writing.adapters())
    if not present:
        raise UserError("the checkpoint has no adapters to write; add_adapters() or load_peft() makes one that has")
    writers = {writer: [adapter.name for _, adapter in present if isinstance(adapter, kinds)] for kinds, writer in WRITERS}
    writers = {writer: adapters for writer, adapters in writers.items() if adapters}
    covered = {name for adapters in writers.values() for name in adapters}
    for _, adapter in present:
        if adapter.name not in covered:
            raise UserError(f"adapter {adapter.name!r}: PEFT has no form for a {type(adapter).__name__}")
    if len(writers) > 1:
        together = listed([name for adapters in writers.values() for name in adapters])
        raise UserError(f"adapters {together}: a PEFT directory has adapters of one kind; write them one by one")
    (writer,) = writers
    return writer(writing)
