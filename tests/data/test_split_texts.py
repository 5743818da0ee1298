import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.core.errors import UserError
from mtl_jax.data.split_texts import divide, first_sentence


def words(texts):
    """A word or mark is a token, and every text has one more: as tokenizers count, but easy to see."""
    return [1 + len(text.split()) for text in texts]


def letters(texts):
    return [1 + len(text) for text in texts]


def test_what_fits_is_left_alone():
    assert divide("One two. Three.", words, 4) == ["One two. Three."]


def test_as_many_whole_sentences_as_fit():
    text = "One two three. Four five! (Six seven?) Eight. Nine ten eleven."
    assert divide(text, words, 6) == ["One two three. Four five!", "(Six seven?) Eight.", "Nine ten eleven."]


def test_a_long_sentence_is_divided_at_spaces_and_a_long_word_anywhere():
    assert divide("One. Two three four five six. Seven.", words, 4) == ["One.", "Two three four", "five six.", "Seven."]
    assert divide("abcdefgh ij", letters, 5) == ["abcd", "efgh", "ij"]


def test_sentences_without_spaces():
    assert divide("今日は。元気です。はい。", letters, 7) == ["今日は。", "元気です。", "はい。"]


def test_sums_that_are_not_quite_right_end_all_the_same():
    """A tokenizer may need more tokens for two sentences than for each of them."""
    sizes = lambda texts: [len(text) + 5 * text.count(". ") for text in texts]  # noqa: E731
    assert divide("ab. cd. ef.", sizes, 8) == ["ab.", "cd.", "ef."]


def test_no_room_at_all():
    with pytest.raises(UserError, match="1 token leaves no room for the text"):
        divide("abc", letters, 1)


@given(st.text("ab. !?\n。", max_size=60), st.integers(2, 12), st.sampled_from([words, letters]))
def test_nothing_is_lost_and_everything_fits(text, limit, sizes):
    pieces = divide(text, sizes, limit)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(size <= limit for size in sizes(pieces))


def test_the_first_sentence():
    assert first_sentence(" One two! (Three.) Four") == "One two!"
    assert first_sentence('"One?" Two.') == '"One?"'
    assert first_sentence("3.5 per cent\n") == "3.5 per cent"
    assert first_sentence("\u4e00\u3002\u4e8c\u3002") == "\u4e00\u3002"
    assert first_sentence("") == ""
