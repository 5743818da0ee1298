"""Models with their tokenizers that turn texts into texts, from a checkpoint or a run.

Beside the text, translating and summarising need languages, a prefix, or options of the task. They differ by family of
checkpoints; the Setting holds them in one form.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtl_jax import decoding, pretrained
from mtl_jax.core import digests
from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.data import conversations, coverage
from mtl_jax.data.targets import decoder as decoder
from mtl_jax.inference import prompt_tokens
from mtl_jax.inference.prompt_tokens import NO_LIMIT
from mtl_jax.inference.text_kinds import GENERATE
from mtl_jax.models.causal_model import CausalModel
from mtl_jax.models.encoder_decoder import Seq2Seq
from mtl_jax.pretrained import families, language_codes, locate
from mtl_jax.pretrained.checkpoint import Checkpoint, head_kind
from mtl_jax.pretrained.family import brief
from mtl_jax.pretrained.locate import foreign
from mtl_jax.pretrained.tensor_files import Location, read_json
from mtl_jax.tasks import CausalLM
from mtl_jax.tasks import Seq2Seq as Seq2SeqTask
from mtl_jax.training.restore import TrainedRun, open_run
from mtl_jax.training.text_evaluation import generation_config
from mtl_jax.transfer.adapters import as_module


class TextModel(NamedTuple):
    """A model that turns texts into texts.

    Attributes:
        model: Encoder and decoder, or a decoder-only model.
        params: {"trunk": ..., "head": ...}.
        encode: (texts, most tokens or None) -> i32[length] token ids of each text, with special tokens; longer ones are cut.
            Raises RowError for texts with a token that the model has no row for.
        decode: Token ids -> plain text on one line, without special tokens.
        raw: The parsed config.json, which may have generation options.
        location: The directory that may hold generation_config.json; None: there is no such directory.
        max_positions: Most tokens of a source that the model can read, special tokens included; None: any number.
        max_source: Most tokens of a source by default; fewer than max_positions where the tokenizer has a lower limit.
        setting: Prefix and options of the task.
        identity: Computes a hash of everything above.
        remarks: (texts, their tokens) -> lines on tokens that the vocabulary does not know.
        private: Whether logs and errors must not show a text.
    """

    model: Seq2Seq | CausalModel
    params: Any
    encode: Callable[[Sequence[str], int | None], list[np.ndarray]]
    decode: Callable[[Sequence[int] | np.ndarray], str]
    raw: Mapping[str, Any]
    location: Location | None
    max_positions: int | None
    max_source: int | None
    setting: Setting
    identity: Callable[[], str]
    remarks: Callable[[Sequence[str], Sequence[np.ndarray]], list[str]] = lambda texts, tokens: []
    private: bool = False


class Setting(NamedTuple):
    """Everything that a task needs of a checkpoint beside the text.

    Attributes:
        prefix: A text that is put before every text.
        options: Generation options by the names of GenerationConfig; the user's options override them.
        languages: Token ids of the languages, by name, if the model must be told the target language.
    """

    prefix: str = ""
    options: Mapping[str, Any] = {}
    languages: Mapping[str, int] = {}


class TextRequest(NamedTuple):
    """A user's request: the task and its languages.

    Attributes:
        task: "translation", "summarization" or "generation".
        source: The language of the texts, or "".
        target: The language of the answers, or "".
        prefix: A text to put before every text; None: the checkpoint's.
        chat: Whether a text is a user's message in the chat template of the tokenizer; for decoder-only checkpoints.
    """

    task: str
    source: str = ""
    target: str = ""
    prefix: str | None = None
    chat: bool = False


def from_checkpoint(path: str, request: TextRequest, dtype: Any = np.float32) -> TextModel:
    """Opens a checkpoint.

    Args:
        path: A local directory, "pip:ASSET/MEMBER", or a hub id.
        request: The user's request.
        dtype: Compute dtype.

    Raises:
        UserError: It cannot be opened, has no LM head, is decoder-only and the task is not generation, has no tokenizer or chat
            template, or does not know the languages.
    """
    raw = read_json(locate.locate(path), "config.json")  # before the tensors, so that a wrong model is refused at once
    family = families.of(raw, f"{path}/config.json")
    model_types = [name for name, other in families.BY_TYPE.items() if "seq2seq_lm" in other.heads.values()]
    classes = [name for name, kind in family.heads.items() if kind == "seq2seq_lm"]
    kind = head_kind(family.heads, raw, f"{path}/config.json")
    architectures = raw.get("architectures") or [f"{raw['model_type']} without a head"]
    if kind == "causal_lm":
        if request.task != GENERATE.task:
            raise UserError(f"{path}: {brief(architectures[0])[1:-1]} answers prompts: use mtl-jax generate")
    elif kind != "seq2seq_lm":
        needed = f"one of {', '.join(classes)}" if classes else f"a checkpoint of {', '.join(model_types)}"
        raise UserError(f"{path}: {brief(architectures[0])[1:-1]} cannot generate texts; {needed} is needed")
    return of_checkpoint(pretrained.load(path, dtype=dtype), path, request)


def of_checkpoint(checkpoint: Checkpoint, where: str, request: TextRequest) -> TextModel:
    """A checkpoint that is open, with an LM head.

    Args:
        checkpoint: The checkpoint.
        where: Its name for errors.
        request: The user's request.

    Raises:
        UserError: It has no LM head, is decoder-only and the task is not generation, has no tokenizer or chat template, or does
            not know the languages.
    """
    if isinstance(checkpoint.model, CausalModel) and checkpoint.head == "causal_lm" and request.task == GENERATE.task:
        return _of_decoder(checkpoint, where, request)
    if not isinstance(checkpoint.model, Seq2Seq):
        raise UserError(f"{where}: this checkpoint cannot generate texts; an encoder-decoder with an LM head is needed")
    if request.chat:
        raise UserError(f"{where}: --chat is for decoder-only checkpoints; leave it out")
    positions, tokenizer = checkpoint.config.max_positions, checkpoint.tokenizer
    if (request.source or request.target) and language_codes.ids(tokenizer):
        tokenizer = copy.deepcopy(tokenizer)  # setting() marks it; the checkpoint's own stays as it is for other requests
    limits = [positions, tokenizer.model_max_length]
    return TextModel(
        model=checkpoint.model,
        params=checkpoint.params,
        encode=encoder(tokenizer, checkpoint.config.vocab_size),
        decode=decoder(tokenizer),
        raw=checkpoint.raw,
        location=checkpoint.location,
        max_positions=positions,
        max_source=min((limit for limit in limits if limit is not None and limit < NO_LIMIT), default=None),
        setting=setting(tokenizer, checkpoint.raw, where, request),
        identity=functools.partial(digests.of_directory, checkpoint.location),
        remarks=functools.partial(coverage.remarks_on_texts, tokenizer),
    )


def _of_decoder(checkpoint: Checkpoint, where: str, request: TextRequest) -> TextModel:
    """A decoder-only checkpoint, which answers prompts."""
    assert isinstance(checkpoint.model, CausalModel)
    tokenizer, vocabulary = checkpoint.tokenizer, checkpoint.config.vocab_size
    special = conversations.special_tokens(tokenizer, request.chat, where)
    start = {"decoder_start_token_id": 0}  # not read: a row begins with the last token of its prompt
    ends = decoding.resolve(checkpoint.raw, checkpoint.location, **start).eos_token_id
    limits = (checkpoint.config.max_length, tokenizer.model_max_length)
    return TextModel(
        model=checkpoint.model,
        params=checkpoint.params,
        encode=prompt_tokens.of_checkpoint(tokenizer, vocabulary, special, request.chat, where),
        decode=decoder(tokenizer),
        raw=checkpoint.raw,
        location=checkpoint.location,
        max_positions=None,
        max_source=min((limit for limit in limits if limit is not None and limit < NO_LIMIT), default=None),
        setting=Setting(request.prefix or "", start | {"eos_token_id": [*dict.fromkeys((*ends, special.end))]}),
        identity=lambda: digests.of_directory(checkpoint.location) + (" with its chat template" if request.chat else ""),
        remarks=functools.partial(coverage.remarks_on_texts, tokenizer),
    )


def from_run(folder: Path, request: TextRequest, name: str = "") -> TextModel:
    """Opens the best checkpoint of a run.

    Args:
        folder: Its workdir.
        request: The user's request.
        name: The task whose decoder generates; "": the only such task.

    Raises:
        UserError: The workdir has no checkpoint yet, the run has no such task, or the request names a language.
    """
    return of_run(open_run(folder), folder, request, name)


def of_run(run: TrainedRun, folder: Path, request: TextRequest, name: str = "") -> TextModel:
    """As from_run(), of a run that is open."""
    generators = {task.name: task for task in run.tasks if isinstance(task, Seq2SeqTask | CausalLM)}
    if name not in generators and (name or len(generators) != 1):
        if not generators:
            raise UserError(f"{folder}: no task of this run writes texts; its tasks are {listed(t.name for t in run.tasks)}")
        raise unknown("task that writes texts" if name else "--task", name, generators)
    if request.chat:
        raise UserError(f"{folder}: a run's task says whether prompts are in a chat template; leave out --chat")
    if request.source or request.target:
        raise UserError(f"{folder}: a run has no choice of languages; leave out --source-language and --target-language")
    task = generators[name] if name else next(iter(generators.values()))
    module, tokenizer = run.trunk.module, run.trunk.tokenizer
    model = task.generator(as_module(module, run.source_index(task.name), task.name))
    params = {"trunk": run.params["trunk"], "head": run.params["heads"][task.name]}
    positions = module.config.max_length
    options = dataclasses.asdict(generation_config(task, run.trunk, task.beams))
    return TextModel(
        model=model,
        params=params,
        encode=prompt_tokens.of_run(run, task)
        if isinstance(task, CausalLM)
        else encoder(language_codes.marked(tokenizer, *task.languages), module.config.vocab_size),
        decode=decoder(tokenizer),
        raw={},
        location=None,
        max_positions=positions,
        max_source=min(run.experiment.batch.row_length, positions or NO_LIMIT),
        setting=Setting(request.prefix or "", options),
        identity=lambda: digests.of_leaves(params) + digests.of_directory(folder / "trunk"),
        remarks=functools.partial(coverage.remarks_on_texts, tokenizer),
        private=run.experiment.private,
    )


def encoder(tokenizer: Any, vocab_size: int) -> Callable[[Sequence[str], int | None], list[np.ndarray]]:
    """The function TextModel.encode for a tokenizer of transformers, fast or slow.

    Args:
        tokenizer: The tokenizer.
        vocab_size: Rows of the model's token table. A token beyond them is a RowError, because jax would read NaN for it.
    """

    def encode(texts: Sequence[str], max_length: int | None = None) -> list[np.ndarray]:
        if not texts:
            return []
        cut = {"truncation": True, "max_length": max_length} if max_length else {}
        with foreign("the tokenizer cannot read the texts; its files are damaged or not a tokenizer's"):
            encoded = tokenizer(list(texts), return_attention_mask=False, verbose=False, **cut)["input_ids"]
            arrays = [np.array(ids, np.int32) for ids in encoded]
        return prompt_tokens.within_table(arrays, tokenizer, vocab_size)

    return encode


def setting(tokenizer: Any, raw: Mapping[str, Any], where: str, request: TextRequest) -> Setting:
    """Prefix and options of a task with a checkpoint; sets the tokenizer's languages.

    mBART, M2M100 and NLLB have tokens for languages: the tokenizer adds the source's, and decoding begins with the target's.
    Marian models of several languages read ">>fra<<" before the text. T5 reads its task before the text ("summarize: "), as
    task_specific_params of config.json spells it; there are generation options, too, also for other families.

    Args:
        tokenizer: The checkpoint's tokenizer.
        raw: The parsed config.json.
        where: The checkpoint's name, for errors.
        request: The user's request.

    Raises:
        UserError: The model does not know a language, or needs one.
    """
    tasks = raw.get("task_specific_params") or {}
    if not isinstance(tasks, dict) or not all(isinstance(options, dict) for options in tasks.values()):
        raise UserError(f"{where}: task_specific_params is {brief(tasks)}; it must be an object of tasks and their options")
    names = [f"{request.task}_{request.source}_to_{request.target}", request.task]
    pairs = [name for name in tasks if name.startswith(f"{request.task}_")]
    if len(pairs) == 1 and not (request.source or request.target):
        names += pairs
    name = next((name for name in names if name in tasks), None)
    options = {} if name is None else dict(tasks[name])
    prefix = str(options.pop("prefix", "")).lstrip()
    settings = Setting(prefix if request.prefix is None else request.prefix, options)
    codes = getattr(tokenizer, "supported_language_codes", ())
    if languages_of := language_codes.ids(tokenizer):
        settings = _marked(tokenizer, languages_of, where, request, settings)
    elif codes:
        settings = _marian(list(codes), where, request, settings)
    elif name is None and pairs and request.prefix is None:
        languages = ", ".join(pair.removeprefix(f"{request.task}_").replace("_to_", " to ") for pair in pairs)
        raise UserError(f"{where}: choose by --source-language and --target-language ({languages}), or give a --prefix")
    elif name is None:
        _check_pair(tokenizer, where, request)
    return settings


def _marked(tokenizer: Any, languages: dict[str, int], where: str, request: TextRequest, settings: Setting) -> Setting:
    for name in (request.source, request.target):
        if name and name not in languages:
            raise unknown(f"language of {where}:", name, languages)
    if request.source:
        tokenizer.src_lang = request.source
    if not request.target:
        return settings._replace(languages=languages)
    tokenizer.tgt_lang = request.target
    marks = language_codes.target_marks(tokenizer)
    assert marks is not None
    options: dict[str, Any] = {"decoder_start_token_id": marks.start}
    if marks.first is not None:
        options["forced_bos_token_id"] = marks.first
    return settings._replace(options={**settings.options, **options}, languages=languages)


def _marian(codes: list[str], where: str, request: TextRequest, settings: Setting) -> Setting:
    if not request.target:
        return settings
    names = [code.removeprefix(">>").removesuffix("<<") for code in codes]
    if request.target not in names:
        raise unknown(f"target language of {where}:", request.target, names)
    return settings._replace(prefix=f">>{request.target}<< {settings.prefix}")


def _check_pair(tokenizer: Any, where: str, request: TextRequest) -> None:
    """For models of one pair of languages: refuses another pair, if the tokenizer names its languages."""
    for flag, name, supported in (
        ("--source-language", request.source, getattr(tokenizer, "source_lang", None)),
        ("--target-language", request.target, getattr(tokenizer, "target_lang", None)),
    ):
        if name and name != supported:
            reason = f"it is {supported}" if supported else "the model has no choice of languages"
            raise UserError(f"{where}: {flag} {name}: {reason}; leave it out")
