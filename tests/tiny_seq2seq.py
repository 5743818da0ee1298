"""Marian, T5, mBART and M2M100 of a few thousand random parameters, with real sentencepiece vocabularies of a few dozen pieces.

As a script it writes one, for tests that need a directory from outside: python tests/tiny_seq2seq.py marian FOLDER
"""

import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece

from mtl_jax import pretrained
from mtl_jax.pretrained import families, language_codes

ENGLISH = ["the", "a", "film", "song", "was", "is", "who", "where", "city", "man", "good", "bad", "hello", "how", "are", "you"]
FRENCH = ["le", "la", "film", "chanson", "est", "qui", "ville", "homme", "bon", "bonjour", "comment", "allez", "vous", "grand"]
POSITIONS = 24

SIZES: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": POSITIONS,
}


def sentences(words: list[str], count: int, seed: int = 0) -> list[str]:
    """Random sentences of two to nine words."""
    rng = random.Random(seed)
    return [" ".join(rng.choice(words) for _ in range(rng.randint(2, 9))) + f" {rng.choice('.?!')}" for _ in range(count)]


def vocabulary(words: list[str], **options: Any) -> bytes:
    """A sentencepiece model of the words."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(words, 400)),
        model_writer=model,
        vocab_size=80,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def pieces(model: bytes) -> list[str]:
    """The pieces of a sentencepiece model, without its control symbols."""
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=model)
    found = [vocabulary.id_to_piece(i) for i in range(vocabulary.get_piece_size())]
    return [piece for i, piece in enumerate(found) if not (vocabulary.is_control(i) or vocabulary.is_unknown(i))]


def write_marian(folder: Path, codes: tuple[str, ...] = (), **fields: Any) -> Path:
    """A Marian model as opus-mt models lie on the hub: two sentencepiece models and a vocab.json.

    Args:
        folder: Where to.
        codes: Target languages of a model of several.
        fields: Of config.json.
    """
    folder.mkdir(parents=True)
    source, target = vocabulary(ENGLISH, model_type="bpe"), vocabulary(FRENCH, model_type="bpe")
    (folder / "source.spm").write_bytes(source)
    (folder / "target.spm").write_bytes(target)
    known = ["</s>", "<unk>", *(f">>{code}<<" for code in codes), *dict.fromkeys(pieces(source) + pieces(target)), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(known)}), encoding="utf-8")
    languages = {"source_lang": "en", "target_lang": "fr"}
    _write(folder, "tokenizer_config.json", {"tokenizer_class": "MarianTokenizer", "model_max_length": 512, **languages})
    pad = len(known) - 1
    ids = {"pad_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": 0, "forced_eos_token_id": 0}
    search = {"num_beams": 2, "max_length": POSITIONS, "bad_words_ids": [[pad]]}
    _write(folder, "generation_config.json", {**search, **ids})
    options = {"vocab_size": len(known), "scale_embedding": True, "activation_function": "swish"}
    return _model(folder, "marian", "MarianMTModel", {**SIZES, **ids, **options, **fields})


def write_t5(folder: Path, **fields: Any) -> Path:
    """A T5 with spiece.model, and the task_specific_params of its published ones."""
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(vocabulary([*ENGLISH, "summarize:"], pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
    _write(folder, "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 40})
    size = len(pretrained.load_tokenizer(folder))
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    ids = {"vocab_size": size, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    tasks = {
        "summarization": {"prefix": "summarize: ", "num_beams": 4, "max_length": 12, "min_length": 3, "early_stopping": True},
        "translation_en_to_de": {"prefix": "translate English to German: ", "num_beams": 3, "max_length": 9},
        "translation_en_to_fr": {"prefix": "translate English to French: ", "num_beams": 2, "max_length": 9},
    }
    return _model(folder, "t5", "T5ForConditionalGeneration", {**sizes, **ids, "task_specific_params": tasks, **fields})


def write_mbart(folder: Path, cls: str, **fields: Any) -> Path:
    """An mBART or mBART-50, by the class of its tokenizer."""
    folder.mkdir(parents=True)
    (folder / "sentencepiece.bpe.model").write_bytes(vocabulary(ENGLISH))
    _write(folder, "tokenizer_config.json", {"tokenizer_class": cls})
    size = len(pretrained.load_tokenizer(folder)) + 1
    ids = {"vocab_size": size, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, "max_length": 12}
    return _model(folder, "mbart", "MBartForConditionalGeneration", {**SIZES, **ids, "scale_embedding": True, **fields})


def write_m2m(folder: Path, cls: str, **fields: Any) -> Path:
    """An M2M100, or an NLLB, by the class of its tokenizer."""
    folder.mkdir(parents=True)
    model = vocabulary(ENGLISH)
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    known = ["<s>", "<pad>", "</s>", "<unk>", *pieces(model)]
    if cls == "M2M100Tokenizer":
        (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(known)}), encoding="utf-8")
    codes = {"additional_special_tokens": ["deu_Latn", "eng_Latn", "fra_Latn"]} if cls == "NllbTokenizer" else {}
    _write(folder, "tokenizer_config.json", {"tokenizer_class": cls, **codes})
    tokenizer = pretrained.load_tokenizer(folder)
    size = max(len(tokenizer), *language_codes.ids(tokenizer).values()) + 1
    ids = {"vocab_size": size, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, "decoder_start_token_id": 2}
    options = {"max_length": 12, "scale_embedding": True, "activation_function": "relu"}
    return _model(folder, "m2m_100", "M2M100ForConditionalGeneration", {**SIZES, **ids, **options, **fields})


def _model(folder: Path, model_type: str, architecture: str, fields: dict[str, Any]) -> Path:
    """Random parameters, saved into the folder where the tokenizer is."""
    raw = {"model_type": model_type, "architectures": [architecture], **fields}
    family = families.of(raw, "config.json")
    config = family.config(raw, "config.json")
    model = family.build(config, "seq2seq_lm", jnp.float32)
    ids = jnp.ones((1, 4), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids, ids, ids)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(leaf.ndim == 1, 0.6, leaf.shape).astype(np.float32), shapes)
    _write(folder, "config.json", raw)
    loaded = pretrained.Checkpoint(model, params, config, raw, "seq2seq_lm", folder)
    pretrained.save(folder.with_name(f"{folder.name}-saved"), loaded)
    for file in folder.with_name(f"{folder.name}-saved").iterdir():
        file.replace(folder / file.name)
    folder.with_name(f"{folder.name}-saved").rmdir()
    return folder


def _write(folder: Path, name: str, value: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


if __name__ == "__main__":
    {"marian": write_marian, "t5": write_t5}[sys.argv[1]](Path(sys.argv[2]))
