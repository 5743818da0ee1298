import gzip
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.core.errors import UserError
from mtl_jax.data import vocabulary

TEXTS = ["Two dogs run.", "Deux chiens courent.", "L'homme est là, près du café!", "a dog's life", "été"] * 5


@pytest.fixture(scope="module", params=vocabulary.KINDS)
def tokenizer(request):
    return vocabulary.train(TEXTS, request.param, 340)


def test_special_tokens_have_ids_of_their_own(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<s>", "</s>", "<unk>"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2, 3)
    assert tokenizer("a dog")["input_ids"][-1] == 2
    assert tokenizer("")["input_ids"] == [2]
    assert 280 < len(tokenizer) <= 340


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="▁"), max_size=30)


@given(text=ANY_TEXT.filter(lambda text: not any(special in text for special in ("<pad>", "<s>", "</s>", "<unk>"))))
def test_any_text_comes_back(tokenizer, text):
    """In NFC and without spaces at its ends; also characters that no training text has."""
    back = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
    assert back == unicodedata.normalize("NFC", text).strip()


def test_no_piece_reaches_over_a_mark(tokenizer):
    for text in TEXTS:
        for token in tokenizer.tokenize(text):
            letters = token.lstrip("▁")
            assert not (set(letters) & set(".,!")) or len(letters) == 1
            assert "'" not in letters[:-1]


def test_a_vocabulary_without_room():
    with pytest.raises(UserError, match=r"trunk.vocabulary is 270; it must be at least 2\d\d: special tokens, bytes, and"):
        vocabulary.train(TEXTS, "bpe", 270)


@pytest.mark.parametrize("kind", vocabulary.KINDS)
def test_multi30k_comes_back(shared_data, kind):
    texts = []
    for language in ("en", "fr", "de"):
        with gzip.open(shared_data / "multi30k" / f"val.{language}.gz", "rt", encoding="utf-8") as file:
            texts += [line.rstrip("\n") for line in file]
    tokenizer = vocabulary.train(texts[:1500], kind, 2000)
    back = tokenizer.batch_decode(tokenizer(texts)["input_ids"], skip_special_tokens=True)
    assert back == [unicodedata.normalize("NFC", text).strip() for text in texts]
