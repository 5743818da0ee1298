"""Tokenizers as the encoders have them on the hub: a sentencepiece model or words, without tokenizer.json."""

import json

import pytest
import tiny_seq2seq

from mtl_jax.data.tokenize import encode
from mtl_jax.pretrained import load_tokenizer
from mtl_jax.pretrained.locate import FILES, copy_files

TEXT = "the man sees a film ."
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", *TEXT.split(), "<mask>"]
DEBERTA = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
DEBERTA |= {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
ALBERT = {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "control_symbols": ["[CLS]", "[SEP]", "[MASK]"]}
# Class of the tokenizer -> its file, what sentencepiece is asked for, first and last token of a text.
CLASSES = {
    "DebertaV2Tokenizer": ("spm.model", DEBERTA, ("[CLS]", "[SEP]")),
    "AlbertTokenizer": ("spiece.model", ALBERT, ("[CLS]", "[SEP]")),
    "CamembertTokenizer": ("sentencepiece.bpe.model", {}, ("<s>", "</s>")),
    "MPNetTokenizer": ("vocab.txt", None, ("<s>", "</s>")),
}


@pytest.mark.parametrize("cls", CLASSES)
def test_a_published_form_is_read_and_goes_where_the_checkpoint_goes(cls, tmp_path):
    file, options, ends = CLASSES[cls]
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    words = "\n".join(WORDS).encode()
    (source / file).write_bytes(words if options is None else tiny_seq2seq.vocabulary(tiny_seq2seq.ENGLISH, **options))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": cls}), encoding="utf-8")
    tokenizer = load_tokenizer(source)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(TEXT)["input_ids"])
    assert (tokens[0], tokens[-1]) == ends
    assert tokenizer.unk_token not in tokens
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True).replace(" .", ".") == "the man sees a film."
    encoded = encode(tokenizer, [TEXT], max_length=32)
    assert list(encoded.tokens[0]) == tokenizer(TEXT)["input_ids"]
    target.mkdir()
    copy_files(source, target, FILES)
    assert (target / file).read_bytes() == (source / file).read_bytes()
    tokenizer.save_pretrained(tmp_path / "workdir")
    assert load_tokenizer(tmp_path / "workdir")(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
