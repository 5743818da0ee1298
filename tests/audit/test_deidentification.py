"""What names a person is found and replaced, everything else stays, and offsets lead from one text to the other."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax import UserError, audit
from mtl_jax.audit import recognisers
from mtl_jax.core.parts import Registry

for package in ("faker", "phonenumbers", "stdnum"):
    pytest.importorskip(package)

PLACES = {
    "email": ["jo.doe+x@corp.co.uk", "A_B@x-y.org"],
    "url": ["https://a.b.com/x_(y)?q=1", "www.foo.org/bar", "ftp://files.net"],
    "iban": ["DE89 3704 0044 0532 0130 00", "gb82west12345698765432"],
    "card": ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005"],
    "ip": ["192.168.1.20", "2001:db8::1", "::1"],
    "date": [
        "1st May 1984",
        "May 2, 1990",
        "12/31/1999",
        "31/12/1999",
        "2020-02-29",
        "3 Sep. 2001",
        "1.2.2003",
    ],
    "telephone": ["+44 20 7946 0958", "(650) 253-0000", "+49 30 901820"],
    "user": ["@jack_b", "@Jo.Smith"],
    "id": ["AB123456", "123-45-6789", "550e8400-e29b-41d4-a716-446655440000"],
}
NOT_PLACES = [
    "4111 1111 1111 1112",  # the Luhn digit is wrong
    "0000 0000 0000 0000",
    "DE89 3704 0044 0532 0130 02",
    "2020-02-30",
    "13/13/1999",
    "999.1.1.1",
    "10:30:20",
    "std::vector",
    "a@b",
    "@user",
    "covid-19",
    "2nd of 100",
    "3.11.7",
    "1600 people",
]


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in PLACES.items() for value in values])
def test_what_names_or_reaches_a_person_is_found_whole(kind, value):
    text = f"So ({value}), it says."
    new, places = audit.deidentify(text, mode="mask")
    assert new == f"So ([{kind.upper()}]), it says."
    assert [tuple(place) for place in places] == [(kind, 4, 4 + len(value), 4, 6 + len(kind))]


@pytest.mark.parametrize("value", NOT_PLACES)
def test_what_only_looks_like_it_stays(value):
    assert audit.deidentify(f"so {value} it says") == (f"so {value} it says", ())


def test_a_number_behind_a_word_such_as_account_is_an_id_and_the_word_stays():
    assert audit.deidentify("account 1234567, order #99887 of 1234567", mode="mask")[0] == (
        "account [ID], order #[ID] of 1234567"
    )


VALUES = st.sampled_from([value for values in PLACES.values() for value in values])
TEXTS = st.lists(st.one_of(VALUES, st.text(max_size=12)), max_size=6).map(" ".join)


@settings(max_examples=80, deadline=None)
@given(TEXTS, st.sampled_from(["mask", "hash", "surrogate"]))
def test_offsets_map_back_and_nothing_else_of_the_text_changes(text, mode):
    new, places = audit.deidentify(text, mode=mode, key="secret")
    old_end = new_end = 0
    for place in places:
        assert text[old_end : place.start] == new[new_end : place.new_start]
        assert place.start < place.end
        old_end, new_end = place.end, place.new_end
        assert audit.moved(places, place.start, place.end) == (place.new_start, place.new_end)
    assert text[old_end:] == new[new_end:]
    for position in range(len(text)):
        if not any(place.start <= position < place.end for place in places):
            start, end = audit.moved(places, position, position + 1)
            assert new[start:end] == text[position]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["Ann Lee", "Bo", "Çan Öz"]), min_size=1, max_size=5), st.integers(0, 2**32))
def test_the_same_name_has_the_same_surrogate_in_all_rows(names, seed):
    def people(texts):
        return [[(3, len(text) - 1, "person")] for text in texts]

    rows = audit.deidentify_texts([f"Hi {name}!" for name in names], people=people, seed=seed)
    surrogates = {}
    for name, (new, (place,)) in zip(names, rows, strict=True):
        surrogate = new[place.new_start : place.new_end]
        assert surrogates.setdefault(name, surrogate) == surrogate != name
        assert audit.deidentify(f"Hi {name.upper()}!", people=people, seed=seed)[0] == new


def test_a_surrogate_is_of_the_same_type_and_another_seed_gives_another():
    for kind in ("email", "url", "iban", "card", "ip", "date", "user", "id"):
        for value in PLACES[kind]:
            new, (place,) = audit.deidentify(f"so {value} it says")
            surrogate = new[place.new_start : place.new_end]
            assert surrogate != value
            (again,) = audit.deidentify(f"so {surrogate} it says")[1]
            assert again.type == kind
    assert audit.deidentify("a@b.com", seed=1) != audit.deidentify("a@b.com", seed=2)


def test_surrogates_of_another_language():
    def people(texts):
        return [[(0, len(text), "place")] for text in texts]

    assert audit.deidentify("Paris", people=people, language="de_DE") != audit.deidentify("Paris", people=people)


def test_a_hash_depends_on_the_key_and_not_on_case():
    first = audit.deidentify("A@b.com", mode="hash", key="one")[0]
    assert first == audit.deidentify("a@B.com", mode="hash", key=b"one")[0]
    assert first != audit.deidentify("a@b.com", mode="hash", key="two")[0]
    assert len(first) == len("EMAIL_") + 12


def test_of_places_that_overlap_the_longest_counts():
    def people(texts):
        return [[(0, 2, "person"), (0, 7, "person"), (3, 7, "place")] for _ in texts]

    assert audit.deidentify("Jo Bath is in", mode="mask", people=people)[0] == "[PERSON] is in"


def test_moved_takes_the_whole_place_where_a_label_covers_a_part():
    text, places = audit.deidentify("mail jo@corp.com today", mode="mask")
    start, end = audit.moved(places, 8, 22)
    assert text[start:end] == "[EMAIL] today"


@pytest.fixture
def registry(monkeypatch):
    """The recognisers, with those that a test registers removed after it."""
    copy = Registry("recogniser", dict(recognisers.RECOGNISERS))
    monkeypatch.setattr("mtl_jax.audit.deidentification.RECOGNISERS", copy)
    return copy


def test_a_recogniser_of_a_script_is_one_more(registry):
    @registry.register("badge")
    def badge(text):
        return [(text.index("B-"), text.index("B-") + 4)] if "B-" in text else []

    assert audit.deidentify("see B-12 now", mode="mask")[0] == "see [BADGE] now"
    new = audit.deidentify("see B-12 now", recognisers=["badge"])[0]
    assert new != "see B-12 now"
    assert (new[5], new[6:8].isdigit(), new[4].isupper()) == ("-", True, True)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"mode": "rot13"}, "unknown mode 'rot13'; choices: surrogate, mask, hash"),
        ({"mode": "hash"}, "mode hash needs a key"),
        ({"language": "xx_YY"}, "language 'xx_YY': Faker has no such language"),
        ({"recognisers": ["emial"]}, r"unknown recogniser 'emial' \(did you mean 'email'\?\)"),
        ({"recognisers": "email"}, "recognisers is the text 'email'; it must be a list of names"),
        ({"seed": "a"}, "seed is 'a'; it must be a whole number"),
        ({"people": lambda texts: []}, "people gave the names of 0 texts for 1 text"),
        ({"people": lambda texts: [[(0, 99, "person")]]}, "person at 0 to 99 is not within a text of 1 character"),
    ],
)
def test_bad_input_is_one_line(options, line):
    with pytest.raises(UserError, match=line):
        audit.deidentify("a", **options)


def test_lists_and_single_texts_are_not_confused():
    with pytest.raises(UserError, match="text is a list; it must be a text, for a list use deidentify_texts"):
        audit.deidentify(["a"])
    with pytest.raises(UserError, match="texts is a text; it must be a list of texts, for one use deidentify"):
        audit.deidentify_texts("a")


@pytest.mark.parametrize(
    ("package", "options", "line"),
    [
        ("faker", {}, "surrogates need the package Faker, which is not installed; pip install 'mtl_jax"),
        ("phonenumbers", {"mode": "mask"}, "telephone numbers need the package phonenumbers"),
        ("stdnum.luhn", {"mode": "mask", "recognisers": ["card"]}, "card numbers need the package python-stdnum"),
    ],
)
def test_without_the_extra_a_line_names_the_package(package, options, line, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("mtl_jax.audit.surrogates._faker", recognisers_faker)
    with pytest.raises(UserError, match=line):
        audit.deidentify("4111 1111 1111 1111", **options)


def recognisers_faker(language):
    """surrogates._faker without its cache."""
    from mtl_jax.audit import surrogates

    return surrogates.need("faker", "surrogates", "Faker").Faker(language)


def test_an_iterator_of_texts_is_a_list():
    texts = ["mail jo@corp.com", "nothing"]
    expected = audit.deidentify_texts(texts, mode="mask")
    assert [text for text, _ in expected] == ["mail [EMAIL]", "nothing"]
    assert audit.deidentify_texts(iter(texts), mode="mask") == expected
