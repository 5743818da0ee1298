"""Writes a run as a directory that transformers or sentence-transformers open."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import pretrained, trunks
from mtl_jax.core import locks, log_lines
from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.files import write_json
from mtl_jax.data import units
from mtl_jax.inference import card_snippets, compiled_predictor, model_card, peft_export
from mtl_jax.inference.predict import TrainedRun, is_workdir, open_run
from mtl_jax.models.trunk_output import pooling_of
from mtl_jax.pretrained import families, language_codes, saving, text_classifier
from mtl_jax.pretrained.marian_bart import fields_of
from mtl_jax.pretrained.saving import Saved
from mtl_jax.pretrained.tensor_files import read_json
from mtl_jax.tasks import CausalLM, Classification, Contrastive, Multilabel, Regression, Seq2Seq, Span, Tagging, Task
from mtl_jax.tasks.text_head import TextTask
from mtl_jax.training import text_evaluation
from mtl_jax.transfer.adapters import Adapted, merge_adapters
from mtl_jax.transfer.adapters.adapted_decoder import merge_decoder

log = logging.getLogger(__name__)

# Class names that sentence-transformers reads from a directory's files since its second version.
_MODULE = "sentence_transformers.models"
_RELU, _IDENTITY = "torch.nn.modules.activation.ReLU", "torch.nn.modules.linear.Identity"

LABEL_FIELDS = ("id2label", "label2id", "num_labels", "problem_type")  # of config.json

# Task kinds whose heads always have a class in transformers, with its kind of head.
TOKEN_HEADS: dict[Any, str] = {Tagging: "token_classification", Span: "question_answering"}
WRITTEN = (Classification, Multilabel, Regression, Contrastive, Tagging, Span)  # beside seq2seq and causal LM


def convert(
    source: str | Path,
    target: str | Path,
    task: str = "",
    overwrite: bool = False,
    peft: bool = False,
    stablehlo: bool = False,
) -> str:
    """Writes a run's trunk, with one task's head if asked, or any checkpoint, as safetensors for transformers.

    A tagging head becomes that of AutoModelForTokenClassification, a span head that of AutoModelForQuestionAnswering. The head
    of a classification, multilabel or regression task with head="family" becomes that of AutoModelForSequenceClassification:
    the directory opens in pipeline("text-classification"), with the names of the labels, and a regression's scale is a part
    of the last layer.

    Any other head of these kinds reads the mean of the token vectors, and transformers has no such class. The directory is
    then the bare model for transformers (AutoModel), and the head lies beside it in the format of sentence-transformers:
    SentenceTransformer(target).encode(texts) gives the task's outputs, which are logits in the order of labels.json for a
    classification, predicted values for a regression, and vectors of length 1 for a contrastive task. Its config.json names no
    labels, because a text class of transformers would put a random head under them. A trunk with its decoder is written as the
    family of the checkpoint that it started from, and a trunk from scratch as a Marian model (MarianMTModel), or with pre-norm
    as a Pegasus model. README.md is a model card: how to open the directory, and what was trained on which data.

    Args:
        source: A workdir, or a checkpoint: a directory, "pip:ASSET/MEMBER", or a hub id.
        target: The directory to write.
        task: The task whose head is written with a run's trunk; empty for the trunk alone.
        overwrite: Whether an existing checkpoint may be replaced.
        peft: Whether only the run's adapters are written, as a directory for PEFT, with the head of a tagging or span task, or
            of a text task with head="family". It opens on the checkpoint that the run started from, in which nothing else may
            have trained.
        stablehlo: Whether the task's predictor is written as a program of StableHLO, which jax runs without this package, also
            where transformers has no class for the trunk.

    Returns:
        A hint for opening the directory; "" where transformers opens it as usual.

    Raises:
        UserError: The source cannot be read, has no such task, or has no counterpart in other libraries; or the target is not
            free, or another process writes it.

    Examples:
        >>> hint = mtl_jax.convert("runs/tiny", "model", task="fine")
        >>> sorted(path.name for path in Path("model").glob("*.safetensors"))
        ['model.safetensors']
    """
    log_lines.show()
    hint = write(source, target, task, overwrite, peft, stablehlo)
    if hint:
        log.info("%s", hint)
    return hint


def write(
    source: str | Path, target: str | Path, task: str, overwrite: bool, peft: bool = False, stablehlo: bool = False
) -> str:
    """As convert(), without a log line."""
    if peft and stablehlo:
        raise UserError("--peft and --stablehlo are two forms; give one of them")
    with locks.target(Path(target)):
        if stablehlo:
            return compiled_predictor.write(str(source), target, task, overwrite)
        return _convert(str(source), target, task, overwrite, peft)


def _convert(source: str, target: str | Path, task: str, overwrite: bool, peft: bool) -> str:
    if not is_workdir(Path(source)):
        if peft:
            raise UserError(f"{source}: not the workdir of a run, so there are no adapters; leave --peft out")
        if task:
            raise UserError(f"{source}: not the workdir of a run, so there is no task {task!r}; leave --task out")
        pretrained.save(target, pretrained.load(source), overwrite=overwrite)
        return ""
    run = open_run(Path(source))
    head = run.task(task) if task else None
    if peft:
        return peft_export.write(run, source, target, head, overwrite)
    if run.trunk.is_users and run.trunk.raw is None:
        raise UserError(f"{source}: its trunk is a {type(run.trunk.declared).__name__}, and transformers has no class for it")
    if isinstance(head, Seq2Seq):
        _write_seq2seq(Path(source), target, run, head, overwrite)
        return ""
    if isinstance(head, CausalLM):
        _write_causal(Path(source), target, run, head, overwrite)
        return ""
    if run.trunk.raw is None:
        problem = "a class for it only with the decoder of a seq2seq task" if run.trunk.decoder else "no class for it"
        raise UserError(f"{source}: its trunk is from scratch, and transformers has {problem}")
    if head is not None and not isinstance(head, WRITTEN):
        raise UserError(
            f"task {task!r}: only heads of classification, multilabel, regression, contrastive, tagging, span, seq2seq and "
            "causal LM can be written; leave --task out"
        )
    kind = _kind(head)
    raw = _raw(run, head, kind)
    family = families.of(raw, f"{source}/trunk/config.json")
    config = family.config(raw, f"{source}/trunk/config.json")
    model = family.build(config, kind, np.float32)
    params = {"trunk": _trunk(run, task)}
    params |= run.trunk.beside if kind is None or head is None else _head(model, run, head)
    location = Path(source) / "trunk"
    checkpoint = pretrained.Checkpoint(model, params, config, raw, kind, location)

    def add_head(folder: Path) -> None:
        if head is not None and kind is None:
            _write_head(folder, run, head, config.hidden_size)
        _write_card(folder, Path(source), run, head, raw)

    saving.save(target, checkpoint, overwrite=overwrite, finish=add_head)
    return card_snippets.note(head, Path(target))


def _kind(task: Task | None) -> str | None:
    """The kind of head that transformers has for a task's; None where it has none."""
    if isinstance(task, TextTask) and task.classifier is not None:
        return text_classifier.KIND
    return TOKEN_HEADS.get(type(task))


def _raw(run: TrainedRun, task: Task | None, kind: str | None) -> dict[str, Any]:
    """The config.json of the trunk, with the labels of a head; a model without a head has none."""
    raw = {name: value for name, value in (run.trunk.raw or {}).items() if name not in LABEL_FIELDS}
    if kind is None or task is None:
        return raw
    names = task.shown_labels or [f"LABEL_{number}" for number in range(2 if kind == "question_answering" else task.outputs)]
    raw |= {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {name: i for i, name in enumerate(names)}}
    if isinstance(task, TextTask):
        raw["problem_type"] = task.problem_type
        padding = run.trunk.tokenizer.pad_token_id
        reads_last = task.classifier is not None and task.classifier.reads == "last"
        if reads_last and raw.get("pad_token_id") is None and padding is not None and padding < raw["vocab_size"]:
            raw["pad_token_id"] = padding  # by which transformers finds the last token of each text of a batch
    return raw


def _head(model: nn.Module, run: TrainedRun, task: Task) -> dict[str, Any]:
    """The parameters of a task's head under their names in the class of transformers."""
    if isinstance(task, TextTask):
        return dict(text_classifier.scaled(run.params["heads"][task.name], task.output_scale))
    return {"head": _token_head(model, run, task)}


def _trunk(run: TrainedRun, task: str) -> Any:
    """The trunk's parameters, with adapters merged into its kernels.

    Raises:
        UserError: An adapter cannot be merged, or each source has a separate one and no task is named.
    """
    if not isinstance(run.trunk.module, Adapted):
        return run.params["trunk"]
    return merge_adapters(run.trunk.module, run.params["trunk"], run.source_index(task) if task else None, task or None)


def _write_seq2seq(source: Path, target: str | Path, run: TrainedRun, task: Seq2Seq, overwrite: bool) -> None:
    """Writes trunk and decoder as the checkpoint that they started from, or as a Marian or Pegasus model.

    Raises:
        UserError: transformers has no class for this trunk with this decoder.
    """
    config, tokenizer = task.decoder, run.trunk.tokenizer
    assert config is not None
    generation = text_evaluation.generation_config(task, run.trunk, task.beams)
    ids = {
        "decoder_start_token_id": task.start,
        "eos_token_id": task.end,
        "pad_token_id": generation.padding,
        "bos_token_id": tokenizer.bos_token_id,
        "forced_eos_token_id": None,
    }
    if task.from_checkpoint:
        raw = dict(run.trunk.raw or {})
        if task.target_language:
            raw["decoder_start_token_id"] = task.start
    elif run.trunk.raw is not None:
        raise UserError(
            f"task {task.name!r}: transformers has no class for an encoder checkpoint with a decoder from scratch; "
            "leave --task out"
        )
    else:
        fields = fields_of(config)
        if fields is None:
            raise UserError(
                f"task {task.name!r}: with pre-norm transformers has a class (Pegasus) only where trunk and decoder "
                'share their token table (table "trunk")'
            )
        raw = fields | ids
    model = families.of(raw, f"{source}/trunk/config.json").build(config, trunks.DECODER, np.float32)
    params = {"trunk": _trunk(run, task.name), "head": merge_decoder(task.module(), run.params["heads"][task.name])}
    checkpoint = pretrained.Checkpoint(model, params, config, raw, trunks.DECODER, source / "trunk")

    def add_generation(folder: Path) -> None:
        if not task.from_checkpoint:
            search = {"num_beams": generation.num_beams, "length_penalty": generation.length_penalty}
            _write_json(folder / "generation_config.json", ids | search | {"max_length": generation.length})
        elif any(task.languages):
            first = {"decoder_start_token_id": task.start, "forced_bos_token_id": generation.forced_bos_token_id}
            file = folder / "generation_config.json"
            _write_json(file, (read_json(folder, file.name) if file.exists() else {}) | first)
            language_codes.marked(tokenizer, *task.languages).save_pretrained(folder)
        _write_card(folder, source, run, task, raw)

    saving.save(target, checkpoint, overwrite=overwrite, finish=add_generation)


def _write_causal(source: Path, target: str | Path, run: TrainedRun, task: CausalLM, overwrite: bool) -> None:
    """Writes a decoder-only trunk with its LM head as the checkpoint that they started from."""
    raw = dict(run.trunk.raw or {})
    family = families.of(raw, f"{source}/trunk/config.json")
    config = dataclasses.replace(family.config(raw, f"{source}/trunk/config.json"), tied=task.tied)
    model = family.build(config, trunks.CAUSAL, np.float32)
    params = {"trunk": _trunk(run, task.name), "head": run.params["heads"][task.name]}
    checkpoint = pretrained.Checkpoint(model, params, config, raw, trunks.CAUSAL, source / "trunk")
    ids = {"eos_token_id": task.end, "pad_token_id": task.padding, "bos_token_id": run.trunk.tokenizer.bos_token_id}

    def add_generation(folder: Path) -> None:
        _write_json(folder / "generation_config.json", ids | {"max_new_tokens": task.max_new_tokens or task.target_length})
        _write_card(folder, source, run, task, raw)

    saving.save(target, checkpoint, overwrite=overwrite, finish=add_generation)


def _token_head(model: nn.Module, run: TrainedRun, task: Task) -> dict[str, Any]:
    """The layer of a task's head under its name in the class of transformers.

    Raises:
        UserError: The layers of the class differ from those of the task's head.
    """
    layers = run.params["heads"][task.name]
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"].get("head", {})
    names = list(expected)
    if set(layers) != {"output"} or len(names) != 1 or expected[names[0]].keys() != layers["output"].keys():
        raise UserError(
            f"task {task.name!r}: its head is not a single linear layer like that of the class of transformers, which "
            f"has {listed(names)}; leave --task out"
        )
    return {names[0]: layers["output"]}


def _write_head(folder: Path, run: TrainedRun, task: Task, width: int) -> None:
    """Writes modules.json and its modules: trunk, mean over tokens, the linear layers of the head, and length 1 for vectors."""
    params = run.params["heads"][task.name]
    layers = [params[name] for name in ("hidden", "output") if name in params]
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    # The longest text in training, as rows of several texts are cut.
    length = run.experiment.batch.row_length // units.size(run.tasks_of_same_source(task.name))
    last = pooling_of(run.trunk.module.base if isinstance(run.trunk.module, Adapted) else run.trunk.module) == "last"
    pooling = {"pooling_mode_mean_tokens": not last} | ({"pooling_mode_lasttoken": True} if last else {})
    _write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **pooling})
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    for number, layer in enumerate(layers, start=2):
        is_last = number == len(layers) + 1
        scale = task.scale if is_last and isinstance(task, Regression) else 1.0
        _write_dense(folder / f"{number}_Dense", layer, _IDENTITY if is_last else _RELU, scale)
        modules.append((f"{number}_Dense", "Dense"))
    if isinstance(task, Contrastive):
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
        (folder / modules[-1][0]).mkdir()  # sentence-transformers opens it, and reads nothing there
        _write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine", "prompts": {}})
    entries = [{"idx": i, "name": str(i), "path": path, "type": f"{_MODULE}.{name}"} for i, (path, name) in enumerate(modules)]
    _write_json(folder / "modules.json", entries)
    if task.shown_labels:
        _write_json(folder / card_snippets.LABELS, list(task.shown_labels))


def _write_dense(folder: Path, layer: Mapping[str, Any], activation: str, scale: float) -> None:
    kernel, bias = np.asarray(layer["kernel"]) * np.float32(scale), np.asarray(layer["bias"]) * np.float32(scale)
    config = {"in_features": kernel.shape[0], "out_features": kernel.shape[1], "bias": True, "activation_function": activation}
    _write_json(folder / "config.json", config)
    tensors = {"linear.bias": Saved(bias, False), "linear.weight": Saved(kernel, True)}
    saving.write_safetensors(folder / "model.safetensors", tensors)


def _write_card(folder: Path, workdir: Path, run: TrainedRun, task: Task | None, raw: Mapping[str, Any]) -> None:
    (folder / "README.md").write_text(model_card.card(workdir, run, task, raw), encoding="utf-8")


def _write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    write_json(file, value)
