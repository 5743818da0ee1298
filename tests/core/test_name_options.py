"""The one grammar of names with options: what is written is read back, and no text gives anything but parts or a UserError."""

import keyword
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.core import name_options
from mtl_jax.core.errors import UserError
from mtl_jax.core.name_options import NameOptions

identifiers = st.from_regex("[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(str.isidentifier)
names = identifiers.filter(lambda name: not keyword.iskeyword(name))
scalars = st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none(), st.text(max_size=12))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.integers(), st.text(max_size=3)), inner, max_size=3),
    ),
    max_leaves=4,
)
parts = st.builds(NameOptions, names, st.lists(values, max_size=3).map(tuple), st.dictionaries(names, values, max_size=3))
texts = st.one_of(
    st.text(),
    st.text(alphabet="ab1.:=,()[]{}'\"\\/ -+e#\n\0", max_size=30),
    st.builds("{}{}{}".format, names, st.sampled_from([":", "("]), st.text(alphabet="ab1.:=,()[]{}'\"\\/ -+e", max_size=20)),
)


@given(parts)
def test_what_is_written_is_read_back(parts):
    assert name_options.parse(str(parts), "field", arguments=True) == parts


@given(texts, st.booleans())
def test_any_text_gives_parts_or_one_line(text, arguments):
    try:
        parsed = name_options.parse(text, "some.field", arguments=arguments)
    except UserError as error:
        assert re.fullmatch("some.field is .*; write .*", str(error))  # noqa: PT017
    else:
        assert isinstance(parsed, NameOptions)
        assert arguments or not parsed.arguments


@given(st.text())
def test_any_text_is_a_value(text):
    value = name_options.value(text)
    assert isinstance(value, (int, float, str, tuple, list, dict)) or value is None


@given(st.lists(values, min_size=1, max_size=5), st.sampled_from(",/"))
def test_lists_are_split_outside_quotes_and_parentheses(values, separator):
    written = [str(NameOptions("f", (value,), {})) for value in values]
    assert name_options.split(f" {separator} ".join(written), separator) == written


@pytest.mark.parametrize(
    ("text", "name", "arguments", "options"),
    [
        ("equal", "equal", (), {}),
        ("every:", "every", (), {}),
        ("cagrad:c=0.4", "cagrad", (), {"c": 0.4}),
        (" subset : s = 3 , temperature=2,", "subset", (), {"s": 3, "temperature": 2}),
        ("nash:max_norm=inf", "nash", (), {"max_norm": math.inf}),
        ("rlw:distribution=normal,on=TRUE,off=None", "rlw", (), {"distribution": "normal", "on": True, "off": None}),
        ("a:b='x,y:z=(',c=(1, 2)", "a", (), {"b": "x,y:z=(", "c": (1, 2)}),
        ("a:b=it's,c=x=y", "a", (), {"b": "it's", "c": "x=y"}),
        ("loggrid:1e-6:1e-3:08", "loggrid", (1e-6, 1e-3, 8.0), {}),
        ("linear_schedule(1.0, 0, transition_steps=1_000)", "linear_schedule", (1.0, 0), {"transition_steps": 1000}),
        ("(linear_schedule)(1,)", "linear_schedule", (1,), {}),
        ("steps(1.0, {100: 0.5, 200: [0.1]})", "steps", (1.0, {100: 0.5, 200: [0.1]}), {}),
    ],
)
def test_the_forms_of_the_grammar(text, name, arguments, options):
    assert name_options.parse(text, "field", arguments=True) == (name, arguments, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cagrda:c=1", "unknown field 'cagrda' (did you mean 'cagrad'?); choices: cagrad, ema"),
        ("cagrad:0.4", "field is 'cagrad:0.4'; write cagrad:OPTION=VALUE"),
        ("cagrad:c=0.4,d", "field is 'cagrad:c=0.4,d': 'd' is not OPTION=VALUE; write cagrad:OPTION=VALUE"),
        ("cagrad:c=", "'c=' is not OPTION=VALUE"),
        ("cagrad:c=1,c=2", "field is 'cagrad:c=1,c=2': c is given twice; write cagrad:OPTION=VALUE"),
        ("ema:n=3,0.9", "write ema:decay=D"),
        ("ema(open('x'))", "write ema:decay=D"),
        ("ema(decay=0.5, **{'n': 1})", "write ema:decay=D"),
        ("ema(decay=1, decay=2)", "write ema:decay=D"),
        ("ema(" + "9" * 400 + ")", "write ema:decay=D"),
        ("ema(" * 10_000, "write ema:decay=D"),
    ],
)
def test_other_texts_are_refused_with_field_and_remedy(text, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        name_options.parse(text, "field", ["cagrad", "ema"], form={"ema": "ema:decay=D"})
    assert len(str(error.value)) < 700


def test_numbers_that_are_none():
    assert math.isnan(name_options.number(True))
    assert math.isnan(name_options.number("1"))
    assert name_options.number(name_options.value("1e-3")) == 1e-3
    assert name_options.value("1" * 400) == "1" * 400
    assert name_options.value("1j") == "1j"
