"""What predict() takes as an input."""

import pytest

from mtl_jax import Source
from mtl_jax.core.errors import UserError
from mtl_jax.inference.answer_rows import row_of
from mtl_jax.inference.predict import predict

ONE = Source(name="s", path="s.csv")
PAIR = Source(name="p", path="p.csv", text="a", pair="b")


@pytest.mark.parametrize("words", [["Ann", "Smith"], ("Ann", "Smith")])
def test_words_stand_for_the_text_of_a_tagged_source(words):
    assert row_of(ONE, words, 1, True).columns == row_of(ONE, {"text": words}, 1, True).columns == {"text": ["Ann", "Smith"]}


@pytest.mark.parametrize(
    ("source", "value", "as_words", "message"),
    [
        (ONE, ["Ann", "Smith"], False, "needs the text columns text; 'text' is a list, where a text is needed"),
        (ONE, ["Ann", 3], True, "'text' is a list, where a text or a list of words is needed"),
        (ONE, None, True, "'text' is null, where a text or a list of words is needed"),
        (ONE, 3, False, "'text' is a number, where a text is needed"),
        (ONE, b"x", False, "'text' is a Python bytes, where a text is needed"),
        (ONE, {"body": "x"}, False, "'text' is missing, where a text is needed"),
        (ONE, {"text": None}, False, "'text' is null, where a text is needed"),
        (PAIR, "x", False, "needs the text columns a, b; 'b' is missing"),
        (PAIR, ["x", "y"], False, "needs the text columns a, b; 'a' is a list"),
    ],
)
def test_what_is_no_text_is_named(source, value, as_words, message):
    with pytest.raises(UserError, match=f"^input 7: source '{source.name}' .*{message}"):
        row_of(source, value, 7, as_words)


@pytest.mark.parametrize(
    ("inputs", "what"), [("Ann", "a text"), ({"text": "Ann"}, "an object"), (None, "null"), (3, "a number")]
)
def test_one_input_is_a_list_of_one(inputs, what, tmp_path):
    with pytest.raises(UserError, match=f"inputs is {what}; it must be a list of texts or rows"):
        predict(tmp_path, "ner", inputs)


def test_an_iterator_is_a_list(workdir):
    texts = ["who is the man ?", "where is the city ?", "the film was good"]
    expected = predict(workdir, "coarse", texts)
    assert predict(workdir, "coarse", iter(texts)) == expected
    assert predict(workdir, "coarse", ({"text": text} for text in texts)) == expected
