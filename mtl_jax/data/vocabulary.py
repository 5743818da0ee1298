"""Vocabularies learned from training texts: sub-words, shared by source and target texts, and whole words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mtl_jax.core.errors import UserError

KINDS = ("bpe", "unigram")
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MARK, APOSTROPHE = r"[^\p{L}\p{M}\p{N}\s▁'\u2019]", r"['\u2019]"  # as regular expressions
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def train(texts: Sequence[str], kind: str, size: int) -> Any:
    """A transformers fast tokenizer with sub-words learned by BPE (Sennrich et al., 2016) or a unigram model (Kudo, 2018).

    Texts are normalised to NFC. A space belongs to the word after it. A character that the training texts do not have is
    spelled in bytes. So decoding restores the text, in NFC and without spaces at its ends. A text ends with </s>.

    Args:
        texts: The texts.
        kind: bpe or unigram.
        size: Most tokens, 4 special ones and 256 bytes included.

    Raises:
        UserError: The size leaves no room for sub-words.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    first = [*SPECIAL.values(), *BYTES]
    characters = len({c for text in texts for c in text})
    if size < len(first) + characters:
        raise UserError(
            f"trunk.vocabulary is {size}; it must be at least {len(first) + characters}: special tokens, bytes, and the "
            f"{characters} characters of the training texts"
        )
    # No sub-word crosses a punctuation mark, or an apostrophe into the next word.
    spaces = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(MARK), "isolated"),
            pre_tokenizers.Split(Regex(APOSTROPHE), "merged_with_previous"),
        ]
    )
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    learner = Tokenizer(models.BPE() if kind == "bpe" else models.Unigram())
    learner.normalizer, learner.pre_tokenizer = normalizer, spaces
    trainer: Any = trainers.BpeTrainer if kind == "bpe" else trainers.UnigramTrainer
    learner.train_from_iterator(texts, trainer(vocab_size=size - len(first), show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    if kind == "bpe":
        pieces = sorted(learned["vocab"], key=learned["vocab"].get)
        numbers = {piece: number for number, piece in enumerate([*first, *pieces])}
        merges = [tuple(pair) for pair in learned["merges"]]
        model: Any = models.BPE(numbers, merges, unk_token=SPECIAL["unk_token"], byte_fallback=True)
    else:
        # Bytes score below every piece, so they are used last. The unknown token is never used.
        scored = [(piece, score) for piece, score in learned["vocab"]]
        worst = min(score for _, score in scored) - 10.0
        vocabulary = [(piece, worst) for piece in first] + scored
        model = models.Unigram(vocabulary, unk_id=first.index(SPECIAL["unk_token"]), byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, spaces
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    end = SPECIAL["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B:1 {end}:1", special_tokens=[(end, first.index(end))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)


def words(texts: Sequence[str], size: int) -> Any:
    """A tokenizer of lower-cased words and punctuation marks, most frequent first; id 0 is padding, id 1 unknown words.

    Args:
        texts: The texts.
        size: Most words, padding and unknown included.

    Raises:
        UserError: The size is below 3.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if size < 3:
        raise UserError(f"trunk.vocabulary is {size}; it must be at least 3")
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
