"""Tokenizers of a few dozen sub-words that work as those of BERT and RoBERTa do."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
LETTERS = "abcdef"  # what words are made of


def bert_like() -> PreTrainedTokenizerFast:
    """As BERT does it: lower case, no accents, a word's letters as sub-words, token types in pairs."""
    pieces = [*SPECIAL.values(), *LETTERS, *(f"##{letter}" for letter in LETTERS), "ab", "##cd", "?", "😀"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=INPUTS, model_max_length=512, **SPECIAL)


def roberta_like() -> PreTrainedTokenizerFast:
    """As RoBERTa does it: bytes, the space belongs to the word after it, no token types."""
    pieces = ["<s>", "<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "ab"]
    merges = [("Ġ", "a"), ("a", "b")]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **names)
