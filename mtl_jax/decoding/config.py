"""Generation options with the names, meanings and defaults of transformers 5, from a call and a checkpoint's files."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.pretrained.family import LARGEST, brief, finite
from mtl_jax.pretrained.tensor_files import read_json

FILE = "generation_config.json"

# Upper bounds of options: a search allocates a cache for all beams and all tokens.
MOST_BEAMS, MOST_LENGTH = 1000, 100_000
MOST = {
    **dict.fromkeys(("num_beams", "num_return_sequences"), MOST_BEAMS),
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size"), MOST_LENGTH),
}
MOST_TOKENS = 10_000  # in eos_token_id and bad_words_ids together

# Options of transformers that are not supported, with the values that change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": (None, []),
    "constraints": (None, []),
    "diversity_penalty": (None, 0.0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "guidance_scale": (None, 1.0),
    "max_time": (None,),
    "min_p": (None,),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0.0),
    "sequence_bias": (None,),
    "stop_strings": (None, []),
    "suppress_tokens": (None, []),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "watermarking_config": (None,),
}
# Unsupported options that only matter with do_sample.
SAMPLING_ONLY = ("epsilon_cutoff", "eta_cutoff", "min_p", "top_h", "typical_p")
# Options that are one token.
TOKENS = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "pad_token_id")
_INT, _FLOAT, _BOOL = (int,), (int, float), (bool,)
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens"), _INT),
    **dict.fromkeys(("num_beams", "num_return_sequences", "top_k", "no_repeat_ngram_size"), _INT),
    **dict.fromkeys(TOKENS, _INT),
    **dict.fromkeys(("length_penalty", "temperature", "top_p", "repetition_penalty"), _FLOAT),
    **dict.fromkeys(("do_sample", "renormalize_logits"), _BOOL),
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig(Configuration):
    """Generation options, named as in transformers 5.

    Attributes:
        max_length: Most tokens, the start token included.
        max_new_tokens: Most tokens after the start token; wins over max_length.
        min_length: Fewest tokens before an end token, the start token included.
        min_new_tokens: Fewest tokens between start and end token; wins over min_length.
        do_sample: Whether tokens are drawn; else the likeliest are taken.
        num_beams: K, beams of each row; 1 is greedy search, or sampling without beams.
        num_return_sequences: Sequences returned for each row.
        early_stopping: Beam search is done with a row when it has num_beams finished sequences (True), or when its best running
            beam is worse than all of them at its present length (False) or at any length that it can reach ("never").
        length_penalty: A sequence's score is its log-probability over (tokens after the start) ** length_penalty.
        temperature: Scores are divided by it before drawing.
        top_k: Number of likeliest tokens to draw from; 0: all.
        top_p: Tokens are drawn from the fewest whose probabilities sum to top_p.
        repetition_penalty: A value above 1 makes tokens that occur already less likely (Keskar et al. 2019).
        no_repeat_ngram_size: n-grams of this length may not occur twice; 0: they may.
        bad_words_ids: Token sequences that must not occur.
        renormalize_logits: Whether scores are normalised again after all changes.
        forced_bos_token_id: The first token after the start token.
        forced_eos_token_id: The token at max_length of a sequence that has not ended before.
        decoder_start_token_id: The token that the decoder reads first.
        eos_token_id: Tokens that end a sequence.
        pad_token_id: The token after the end.
    """

    max_length: int = 20
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    do_sample: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    early_stopping: bool | str = False
    length_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    renormalize_logits: bool = False
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def length(self) -> int:
        """Most tokens, the start token included."""
        return self.max_length if self.max_new_tokens is None else 1 + self.max_new_tokens

    @property
    def minimum_length(self) -> int:
        """Fewest tokens before an end, the start token included."""
        return self.min_length if self.min_new_tokens is None else 1 + self.min_new_tokens

    @property
    def start(self) -> int:
        """The start token."""
        assert self.decoder_start_token_id is not None
        return self.decoder_start_token_id

    @property
    def padding(self) -> int:
        """The token that greedy search and sampling write after the end."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_id[0] if self.eos_token_id else 0

    @property
    def beam_padding(self) -> int:
        """The token that beam search writes after the end: an end token where the padding token is 0, as in transformers."""
        if not self.eos_token_id:
            return -1
        return self.pad_token_id or self.eos_token_id[0]

    def check(self) -> None:
        """Raises UserError for a value that is out of range or contradicts another."""
        for name, least in (
            ("num_beams", 1),
            ("num_return_sequences", 1),
            ("min_length", 0),
            ("min_new_tokens", 0),
            ("no_repeat_ngram_size", 0),
            ("top_k", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}; it must be at least {least}")
        for name, most in MOST.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise UserError(f"{name} is {value}; it must be at most {most}")
        for name in ("length_penalty", "temperature", "repetition_penalty"):
            if not finite(getattr(self, name)):
                raise UserError(f"{name} is {brief(getattr(self, name))}; it must be a finite number")
        if self.length < 2:
            name = "max_length" if self.max_new_tokens is None else "max_new_tokens"
            raise UserError(f"{name} is {getattr(self, name)}, which leaves no room for a token after the start token")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise UserError(f'early_stopping is {brief(self.early_stopping)}; it must be True, False or "never"')
        if not np.float32(self.temperature) > 0:
            raise UserError(f"temperature is {self.temperature}; it must be above 0 (do_sample=False takes the likeliest)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not np.float32(self.repetition_penalty) > 0:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0")
        if self.num_return_sequences > self.num_beams and (self.num_beams > 1 or not self.do_sample):
            alternative = "" if self.do_sample else ", or for do_sample"
            raise UserError(
                f"num_return_sequences is {self.num_return_sequences}, more than num_beams, {self.num_beams}: "
                f"ask for more beams{alternative}"
            )
        if self.decoder_start_token_id is None:
            raise UserError("decoder_start_token_id is not known: neither the call nor the checkpoint's files set it")
        if any(not word for word in self.bad_words_ids):
            raise UserError("bad_words_ids has an empty sequence")


class TracedOptions(NamedTuple):
    """Options that a compiled program takes as arguments: other values need no other program.

    Attributes:
        length_penalty: f32[], as in GenerationConfig; so are the next three.
        temperature: f32[].
        top_p: f32[].
        repetition_penalty: f32[].
        early_always: bool[], whether early_stopping is True.
        early_never: bool[], whether early_stopping is "never".
    """

    length_penalty: Any
    temperature: Any
    top_p: Any
    repetition_penalty: Any
    early_always: Any
    early_never: Any


def split_options(config: GenerationConfig) -> tuple[GenerationConfig, TracedOptions]:
    """Splits options into static ones, which shape the program, and traced ones, its arguments.

    Of a traced option the static ones keep whether it has an effect.
    """
    traced = TracedOptions(
        length_penalty=np.float32(config.length_penalty),
        temperature=np.float32(config.temperature),
        top_p=np.float32(config.top_p),
        repetition_penalty=np.float32(config.repetition_penalty),
        early_always=np.bool_(config.early_stopping is True),
        early_never=np.bool_(config.early_stopping == "never"),
    )
    static = dataclasses.replace(
        config,
        length_penalty=1.0,
        temperature=1.0,
        top_p=1.0 if config.top_p == 1 else 0.5,
        repetition_penalty=1.0 if config.repetition_penalty == 1 else 2.0,
        early_stopping=False,
    )
    return static, traced


FIELDS = {field.name: field for field in dataclasses.fields(GenerationConfig)}


def resolve(raw: Mapping[str, Any], location: Path | zipfile.Path | None, /, **call: Any) -> GenerationConfig:
    """The options of a call to a checkpoint: call, then generation_config.json, then config.json, then the defaults.

    Args:
        raw: The parsed config.json.
        location: The checkpoint's directory, which may hold generation_config.json; None: without that file. A null in it
            cancels the value in config.json.
        call: Options of the call; None means not given. max_length replaces a max_new_tokens of the files. The
            default length is 20 new tokens.

    Raises:
        UserError: An option is unknown or out of range, or a file is damaged or sets an option that is not supported.
    """
    for name in call:
        if name not in FIELDS:
            raise unknown("generation option", name, FIELDS)
    given = {name: value for name, value in call.items() if value is not None}
    files: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, where in ((raw, "config.json"), (_read(location), FILE)):
        options = {name: source[name] for name in (*FIELDS, *UNSUPPORTED, "bos_token_id") if name in source}
        files |= options
        origin |= dict.fromkeys(options, f"{where}: ")
    draws = given.get("do_sample", files.get("do_sample"))
    for name, harmless in UNSUPPORTED.items():
        value = files.pop(name, None)
        if value is not None and value not in harmless and (draws or name not in SAMPLING_ONLY):
            raise UserError(f"{origin[name]}{name} is {brief(value)}, which is not supported here; set it to {harmless[0]!r}")
    values = {name: value for name, value in files.items() if value is not None}
    first = values.pop("bos_token_id", None)
    if first is not None:
        values.setdefault("decoder_start_token_id", first)
    if "max_length" in given and "max_new_tokens" not in given:
        values.pop("max_new_tokens", None)
    if "min_length" in given and "min_new_tokens" not in given:
        values.pop("min_new_tokens", None)
    values |= given
    if "max_length" not in values and "max_new_tokens" not in values:
        values["max_new_tokens"] = GenerationConfig.max_length  # as transformers: the default length counts new tokens
    for name, kinds in _KINDS.items():
        if name in values:
            values[name] = _checked(name, values[name], kinds, "" if name in given else origin.get(name, ""))
    ends = values.get("eos_token_id", ())
    values["eos_token_id"] = _tokens("eos_token_id", ends if isinstance(ends, list | tuple | np.ndarray) else [ends])
    words = values.get("bad_words_ids", ())
    if not isinstance(words, list | tuple):
        raise UserError(f"bad_words_ids is {brief(words)}; it must be a list of lists of token ids")
    words = [_tokens("bad_words_ids", word) for word in words]
    if len(values["eos_token_id"]) + sum(map(len, words)) > MOST_TOKENS:
        raise UserError(f"eos_token_id and bad_words_ids hold more than {MOST_TOKENS} tokens")
    values["bad_words_ids"] = tuple(word for word in words if word not in {(end,) for end in values["eos_token_id"]})
    config = GenerationConfig(**values)
    config.check()
    return config


def _checked(name: str, value: Any, kinds: tuple[type, ...], where: str) -> Any:
    if isinstance(value, kinds) and (kinds is _BOOL or not isinstance(value, bool)):
        if kinds is _INT and not -LARGEST <= value <= LARGEST:  # type: ignore[operator]  # it is a whole number
            raise UserError(f"{where}{name} is {brief(value)}; it must be below 2^31")
        return value
    if isinstance(value, list | tuple) and len(value) == 1 and name == "forced_eos_token_id":
        return _checked(name, value[0], kinds, where)
    raise UserError(f"{where}{name} is {brief(value)}; it must be of type {kinds[-1].__name__}")


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    """Token ids from a file or a call; NumPy integers become ints."""
    if isinstance(value, list | tuple | np.ndarray):
        tokens = [token.item() if isinstance(token, np.integer) else token for token in value]
        if all(isinstance(token, int) and not isinstance(token, bool) and abs(token) <= LARGEST for token in tokens):
            return tuple(tokens)
    raise UserError(f"{name} holds {brief(value)}; token ids are needed, which are whole numbers")


def _read(location: Path | zipfile.Path | None) -> Mapping[str, Any]:
    return {} if location is None or not (location / FILE).exists() else read_json(location, FILE)
