"""A model that turns a text into another one: an encoder-decoder with its tokenizer, from a checkpoint or a run.

What translating or summarising asks of it beside the text (languages, a prefix, options of the task) differs by family, and is
settled here once, in the Setting.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtl_jax import pretrained
from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.data import coverage
from mtl_jax.data.targets import decoder as decoder
from mtl_jax.data.tokenize import RowError
from mtl_jax.inference.resumable_output import digest_of_arrays, digest_of_directory
from mtl_jax.models.encoder_decoder import Seq2Seq
from mtl_jax.pretrained import families, locate
from mtl_jax.pretrained.checkpoint import own_head
from mtl_jax.pretrained.family import brief
from mtl_jax.pretrained.locate import foreign
from mtl_jax.pretrained.tensor_files import Location, read_json
from mtl_jax.tasks import Seq2Seq as Seq2SeqTask
from mtl_jax.training.text_evaluation import config_of
from mtl_jax.transfer.adapters import as_module

NO_LIMIT = 10**9  # tokenizers without a limit of their own say 10**30


class TextModel(NamedTuple):
    """What turning texts into texts needs.

    Attributes:
        model: Encoder and decoder.
        params: {"trunk": ..., "head": ...}.
        encode: (texts, most tokens or None) -> i32[length] token ids of each text, with special tokens; longer ones are cut.
            Raises RowError for texts with a token that the model has no row for.
        decode: Token ids -> plain text on one line, without special tokens.
        raw: config.json, from which decoding reads options of generation.
        location: Where generation_config.json may lie; None: nowhere.
        max_positions: Most tokens of a source that the model can take, special tokens included; None: any number.
        max_source: Most tokens of a source unless the user says otherwise: fewer where the tokenizer says so.
        setting: Prefix and options of the task.
        identity: Computes a hash of everything above.
        remarks: (texts, their tokens) -> lines on what the vocabulary does not know of them.
    """

    model: Seq2Seq
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


class Setting(NamedTuple):
    """What a task asks of a checkpoint beside the text.

    Attributes:
        prefix: What stands before every text.
        options: Options of generation, by the names of GenerationConfig; what the user says goes before them.
        languages: Where the model must be told the target language: its tokens of languages, by name.
    """

    prefix: str = ""
    options: Mapping[str, Any] = {}
    languages: Mapping[str, int] = {}


class Asked(NamedTuple):
    """What the user said about the task.

    Attributes:
        task: "translation" or "summarization".
        source: The language of the texts, or "".
        target: The language of the answers, or "".
        prefix: What stands before every text; None: what the checkpoint says.
    """

    task: str
    source: str = ""
    target: str = ""
    prefix: str | None = None


def from_checkpoint(path: str, asked: Asked, dtype: Any = np.float32) -> TextModel:
    """Opens a checkpoint.

    Args:
        path: A local directory, "pip:ASSET/MEMBER", or a hub id.
        asked: What the user said about the task.
        dtype: Compute dtype.

    Raises:
        UserError: It cannot be opened, is no encoder-decoder with a vocabulary on top, has no tokenizer, or does not know the
            languages.
    """
    raw = read_json(locate.locate(path), "config.json")  # before the tensors: a wrong model is found out at once
    family = families.of(raw, f"{path}/config.json")
    able = [name for name, other in families.BY_TYPE.items() if "seq2seq_lm" in other.heads.values()]
    classes = [name for name, kind in family.heads.items() if kind == "seq2seq_lm"]
    kind = own_head(family.heads, raw, f"{path}/config.json")
    named = raw.get("architectures") or [f"{raw['model_type']} without a head"]
    if kind != "seq2seq_lm":
        needed = f"one of {', '.join(classes)}" if classes else f"a checkpoint of {', '.join(able)}"
        raise UserError(f"{path}: a {brief(named[0])[1:-1]}, which cannot write texts; {needed} is needed")
    checkpoint = pretrained.load(path, dtype=dtype)
    positions = checkpoint.config.max_positions
    limits = [positions, checkpoint.tokenizer.model_max_length]
    return TextModel(
        model=checkpoint.model,  # type: ignore[arg-type]  # seq2seq_lm heads are on Seq2Seq modules
        params=checkpoint.params,
        encode=encoder(checkpoint.tokenizer, checkpoint.config.vocab_size),
        decode=decoder(checkpoint.tokenizer),
        raw=raw,
        location=checkpoint.location,
        max_positions=positions,
        max_source=min((limit for limit in limits if limit is not None and limit < NO_LIMIT), default=None),
        setting=setting(checkpoint.tokenizer, raw, path, asked),
        identity=functools.partial(digest_of_directory, checkpoint.location),
        remarks=functools.partial(coverage.remarks_on_texts, checkpoint.tokenizer),
    )


def from_run(folder: Path, asked: Asked, name: str = "") -> TextModel:
    """Opens the best checkpoint of a run.

    Args:
        folder: Its workdir.
        asked: What the user said.
        name: The task whose decoder writes; "": the only one.

    Raises:
        UserError: The workdir has no checkpoint yet, there is no such task, or the user asked for a language.
    """
    from mtl_jax.inference.predict import open_run  # imported late: it is everything

    run = open_run(folder)
    able = {task.name: task for task in run.tasks if isinstance(task, Seq2SeqTask)}
    if name not in able and (name or len(able) != 1):
        if not able:
            raise UserError(f"{folder}: no task of this run writes texts; its tasks are {listed(t.name for t in run.tasks)}")
        raise unknown("task that writes texts" if name else "--task", name, able)
    if asked.source or asked.target:
        raise UserError(f"{folder}: a run has no choice of languages; leave out --source-language and --target-language")
    task = able[name] if name else next(iter(able.values()))
    module, tokenizer = run.trunk.module, run.trunk.tokenizer
    model = Seq2Seq(as_module(module, run.place(task.name)), task.module(module.dtype))
    params = {"trunk": run.params["trunk"], "head": run.params["heads"][task.name]}
    positions = module.config.max_length
    options = dataclasses.asdict(config_of(task, run.trunk, task.beams))
    return TextModel(
        model=model,
        params=params,
        encode=encoder(tokenizer, module.config.vocab_size),
        decode=decoder(tokenizer),
        raw={},
        location=None,
        max_positions=positions,
        max_source=min(run.experiment.batch.row_length, positions or NO_LIMIT),
        setting=Setting(asked.prefix or "", options),
        identity=lambda: digest_of_arrays(params) + digest_of_directory(folder / "trunk"),
        remarks=functools.partial(coverage.remarks_on_texts, tokenizer),
    )


def encoder(tokenizer: Any, vocab_size: int) -> Callable[[Sequence[str], int | None], list[np.ndarray]]:
    """TextModel.encode of a tokenizer of transformers, fast or slow.

    Args:
        tokenizer: The tokenizer.
        vocab_size: Rows of the model's token table; a token beyond them is a RowError: jax would read NaN in its place.
    """

    def encode(texts: Sequence[str], max_length: int | None = None) -> list[np.ndarray]:
        if not texts:
            return []
        cut = {"truncation": True, "max_length": max_length} if max_length else {}
        with foreign("the tokenizer cannot read the texts; its files are damaged or not a tokenizer's"):
            encoded = tokenizer(list(texts), return_attention_mask=False, verbose=False, **cut)["input_ids"]
            found = [np.array(ids, np.int32) for ids in encoded]
        if refused := coverage.out_of_range(found, vocab_size):
            token = next(iter(refused.values()))
            raise RowError([*refused], coverage.missing_row_reason(tokenizer, token, vocab_size, "the model's token table"))
        return found

    return encode


def setting(tokenizer: Any, raw: Mapping[str, Any], where: str, asked: Asked) -> Setting:
    """Prefix and options of a task with a checkpoint; sets the tokenizer's languages.

    mBART is told the languages by tokens of their own: the source's by the tokenizer, the target's where decoding begins.
    Marian models of several languages read ">>fra<<" in front of the text. T5 reads its task there ("summarize: "), which
    task_specific_params of config.json spells, together with options for the search that other families have there too.

    Args:
        tokenizer: The checkpoint's.
        raw: config.json.
        where: The checkpoint, for errors.
        asked: What the user said.

    Raises:
        UserError: The model does not know a language, or must be told one.
    """
    tasks = raw.get("task_specific_params") or {}
    if not isinstance(tasks, dict) or not all(isinstance(options, dict) for options in tasks.values()):
        raise UserError(f"{where}: task_specific_params is {brief(tasks)}; it must be an object of tasks and their options")
    names = [f"{asked.task}_{asked.source}_to_{asked.target}", asked.task]
    pairs = [name for name in tasks if name.startswith(f"{asked.task}_")]
    if len(pairs) == 1 and not (asked.source or asked.target):
        names += pairs
    name = next((name for name in names if name in tasks), None)
    options = {} if name is None else dict(tasks[name])
    prefix = str(options.pop("prefix", "")).lstrip()
    found = Setting(prefix if asked.prefix is None else asked.prefix, options)
    codes = getattr(tokenizer, "supported_language_codes", ())
    if hasattr(tokenizer, "lang_code_to_id"):
        found = _mbart(tokenizer, where, asked, found)
    elif codes:
        found = _marian(list(codes), where, asked, found)
    elif name is None and pairs and asked.prefix is None:
        spoken = ", ".join(pair.removeprefix(f"{asked.task}_").replace("_to_", " to ") for pair in pairs)
        raise UserError(f"{where}: choose by --source-language and --target-language ({spoken}), or give a --prefix")
    elif name is None:
        _check_pair(tokenizer, where, asked)
    return found


def _mbart(tokenizer: Any, where: str, asked: Asked, found: Setting) -> Setting:
    known = {name: int(number) for name, number in tokenizer.lang_code_to_id.items() if number != tokenizer.unk_token_id}
    for name in (asked.source, asked.target):
        if name and name not in known:
            raise unknown(f"language of {where}:", name, known)
    if asked.source:
        tokenizer.src_lang = asked.source
    if not asked.target:
        return found._replace(languages=known)
    # How the training targets look says how decoding begins: their last token is what the decoder reads first, and the language
    # in front, if it is there, what it must write first (mBART-50). In mBART it reads the language (the last token).
    tokenizer.tgt_lang = asked.target
    first, *_, last = tokenizer(text_target="")["input_ids"]
    options: dict[str, Any] = {"decoder_start_token_id": last}
    if first == known[asked.target]:
        options["forced_bos_token_id"] = first
    return found._replace(options={**found.options, **options}, languages=known)


def _marian(codes: list[str], where: str, asked: Asked, found: Setting) -> Setting:
    if not asked.target:
        return found
    names = [code.removeprefix(">>").removesuffix("<<") for code in codes]
    if asked.target not in names:
        raise unknown(f"target language of {where}:", asked.target, names)
    return found._replace(prefix=f">>{asked.target}<< {found.prefix}")


def _check_pair(tokenizer: Any, where: str, asked: Asked) -> None:
    """For models of one pair of languages: what was asked for is what they do, if they say what they do."""
    for flag, name, own in (
        ("--source-language", asked.source, getattr(tokenizer, "source_lang", None)),
        ("--target-language", asked.target, getattr(tokenizer, "target_lang", None)),
    ):
        if name and name != own:
            does = f"it is {own}" if own else "the model has no choice of languages"
            raise UserError(f"{where}: {flag} {name}: {does}; leave it out")
