"""Rows that are de-identified when they are read: labels stay at what they label, and a run records types, never texts."""

import dataclasses
import json
import logging
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtl_jax
from mtl_jax import (
    CausalLM,
    Classification,
    Contrastive,
    Embedding,
    Experiment,
    MultipleChoice,
    Phase,
    Ranking,
    Seq2Seq,
    Source,
    Span,
    Tagging,
    UserError,
)
from mtl_jax.audit import Deidentify
from mtl_jax.audit.deidentification import replaced_texts
from mtl_jax.audit.deidentified_rows import edited_rows
from mtl_jax.audit.recognisers import RECOGNISERS
from mtl_jax.audit.word_labels import lines_of, moved_labels, with_labels, word_groups
from mtl_jax.core import parts
from mtl_jax.data import row_edits, splits
from mtl_jax.data.corpus import read_sources
from mtl_jax.data.formats.records import columns
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import RowEdit
from mtl_jax.tasks import bio
from mtl_jax.training.experiment_json import from_json, to_json

KINDS = ("email", "url", "user", "ip")  # those that need no other package
MASK = Deidentify(kinds=KINDS)


def edited(row, source, *tasks, **place):
    result = next(iter(row_edits.edited(row_edits.editor(source, tasks), [Row(row, "f:1", **place)], Counter())))
    if isinstance(result, UserError):
        raise result
    return result


@st.composite
def tagged(draw):
    """(words, valid tags, places in their text, replacements)"""
    words = draw(st.lists(st.sampled_from(["a", "bb", "(c)", "d.d"]), min_size=1, max_size=7))
    tags = []
    for _ in words:
        before = tags[-1] if tags else "O"
        inside = [] if before == "O" else [f"I-{before[2:]}"]
        tags.append(draw(st.sampled_from(["O", "B-X", "B-Y", *inside])))
    text = " ".join(words)
    edges = st.integers(0, len(text))
    places = [tuple(sorted(place)) for place in draw(st.lists(st.tuples(edges, edges), max_size=3))]
    return words, tags, [place for place in places if place[0] < place[1]], draw(st.sampled_from(["Z", "Z Z", "(Z) Z Z"]))


@settings(max_examples=200, deadline=None)
@given(tagged())
def test_tags_of_untouched_words_stay_and_all_tags_are_valid(case):
    words, tags, places, replacement = case
    text = " ".join(words)
    ((new, identifiers),) = replaced_texts([text], [("z", lambda text: places)], None, lambda kind, value: replacement)
    groups = word_groups(words, identifiers, new)
    new_words = [word for group in groups for word in group.words]
    assert groups == word_groups(text, identifiers, new)
    assert " ".join(new_words) == " ".join(new.split())
    new_tags = moved_labels(tags, groups)
    assert len(new_tags) == len(new_words) == len(lines_of(range(len(words)), groups))
    assert not bio.invalid_tags(new_tags)
    start = 0
    for word, tag in zip(words, tags, strict=True):
        touched = [place for place in identifiers if place.start < start + len(word) and start < place.end]
        group = next(group for group in groups if group.start <= words_before(text, start) < group.end)
        if not touched:
            at = sum(len(other.words) for other in groups if other.end <= group.start)
            assert (new_words[at], new_tags[at], group.end - group.start) == (word, tag, 1)
        start += len(word) + 1
    assert [group.start for group in groups[1:]] == [group.end for group in groups[:-1]]


def words_before(text, start):
    return text[:start].count(" ")


def test_one_word_becomes_several_and_several_one():
    words, tags = ["Ann", "met", "New", "York", "."], ["B-PER", "O", "B-LOC", "I-LOC", "O"]
    text = " ".join(words)
    places = [(0, 3, "person"), (8, 16, "place")]
    new = {"person": "Mary Ann Lee", "place": "Rome"}
    ((changed, identifiers),) = replaced_texts([text], [], lambda texts: [places], lambda kind, value: new[kind])
    groups = word_groups(words, identifiers, changed)
    assert with_labels(tags, groups) == ["B-PER", "I-PER", "I-PER", "O", "B-LOC", "O"]
    assert with_labels(" ".join(tags), groups) == "B-PER I-PER I-PER O B-LOC O"
    assert with_labels(["N", None, "N", "M", "P"], groups) == ["N", "N", "N", None, "N", "P"]
    assert with_labels([None, "O", None, None, "I-X"], groups)[-2:] == [None, "I-X"]
    assert lines_of([4, 5, 6, 7, 8], groups) == [4, 4, 4, 5, 6, 8]


def test_words_tags_and_lines_of_a_conll_row():
    source = Source("said", "x.conll", format="conll", columns=("text", "tags", "pos"), deidentify=MASK)
    row = {"text": ["by", "jo@x.com", "(@jack)"], "tags": ["O", "B-X", "I-X"], "pos": ["P", "N", "N"]}
    result = edited(row, source, Tagging(name="t", source="said"), words=("f", [3, 4, 5]))
    assert result.columns == {**row, "text": ["by", "[EMAIL]", "([USER])"]}
    assert result.words == ("f", [3, 4, 5])
    with pytest.raises(UserError, match="f:1: column 'tags': 3 words and 2 labels; there must be one for each word"):
        edited({**row, "tags": ["O", "O"]}, source, Tagging(name="t", source="said"))


@pytest.mark.parametrize(
    ("text", "tags", "expected"),
    [
        ("mail jo@x.com now", "", ""),
        ("mail jo@x.com now", " _", " _"),
        ("mail jo@x.com now", "not said", "not said"),
        ("mail jo@x.com now", None, None),
        (["mail", "jo@x.com"], ["O", "_"], ["O", "_"]),
        (["jo", "by", "jo@x.com", "(", "now"], ["O", "_", "B-Y", "_", "I-X"], ["O", "_", "B-Y", "_", "I-X"]),
    ],
)
def test_values_that_mean_no_label_stay(text, tags, expected):
    said = Source("said", rows=[], deidentify=MASK)
    task = Tagging(name="t", source="said", unlabelled=("", "_", "not said"))
    columns = edited({"text": text, "tags": tags}, said, task, Classification(name="c", source="said")).columns
    assert columns["tags"] == expected
    assert "jo@x.com" not in columns["text"]
    with pytest.raises(UserError, match="column 'tags': 3 words and 2 labels"):
        edited({"text": "mail jo@x.com now", "tags": "not said"}, said, Tagging(name="t", source="said"))


def test_words_without_labels_leave_no_invalid_tag():
    """As after None: after a word without label every tag is valid, and this one only there."""
    words, places = ["a", "b", "c"], [(0, 3, "z")]
    ((new, identifiers),) = replaced_texts([" ".join(words)], [], lambda texts: [places], lambda kind, value: "Z Z")
    groups = word_groups(words, identifiers, new)
    for none in (None, "_"):
        assert with_labels(["B-Y", none, "I-X"], groups, ("", "_")) == ["B-Y", none, "I-X"]
    assert with_labels("B-Y _ I-X", groups, ("", "_")) == "B-Y _ I-X"


def test_answers_stay_at_their_text():
    source = Source("asked", rows=[], text="question", pair="context", deidentify=MASK)
    context = "jo@x.com wrote to ann@y.org and then to all"
    answers = [{"text": "ann@y.org", "start": 18}, {"text": "to all", "start": 37}, {"text": "@y.org and", "start": 21}]
    row = {"question": "whom did jo@x.com write?", "context": context, "answers": answers}
    columns = edited(row, source, Span(name="s", source="asked")).columns
    assert columns["question"] == "whom did [EMAIL] write?"
    assert columns["context"] == "[EMAIL] wrote to [EMAIL] and then to all"
    assert [answer["text"] for answer in columns["answers"]] == ["[EMAIL]", "to all", "[EMAIL] and"]
    for answer in columns["answers"]:
        assert columns["context"][answer["start"] :].startswith(answer["text"])
    with pytest.raises(UserError, match=r"f:1: the answer \(not shown: private\) is not in the context at 0"):
        edited({**row, "answers": [{"text": "bob", "start": 0}]}, source)


def test_targets_are_texts_and_other_columns_stay():
    source = Source("mails", rows=[], deidentify=MASK)
    task = Seq2Seq(name="subject", source="mails", column="subject")
    row = {"text": "to jo@x.com", "subject": ["for jo@x.com", "a subject"], "label": "jo@x.com", "title": None}
    assert edited(row, source, task).columns == {**row, "text": "to [EMAIL]", "subject": ["for [EMAIL]", "a subject"]}
    assert edited({"text": None, "subject": None}, source, task).columns == {"text": None, "subject": None}


@pytest.mark.parametrize(
    ("task", "source", "read"),
    [
        (
            CausalLM(name="t", source="mails", column="reply", prompt="Subject: {subject}\n{text}\n{meta.by!s:>9}{to[0]}"),
            {},
            {"subject": "of {}", "meta.by": "{}", "to": ["ann", "{}"], "reply": ["dear {}", "{}"]},
        ),
        (CausalLM(name="t", source="mails", column="reply", prompt="{reply}"), {}, {"reply": ["to {} now", "no"]}),
        (Seq2Seq(name="t", source="mails", column="subject"), {}, {"subject": "for {}"}),
        (MultipleChoice(name="t", source="mails", choices=("a", "b")), {}, {"a": "by {}", "b": "no"}),
        (MultipleChoice(name="t", source="mails", choices=("a",), most=3), {}, {"a": ["by {}", "no", "{}"]}),
        (Contrastive(name="t", source="mails", negatives=("no",)), {"pair": "yes"}, {"yes": "is {}", "no": "not {}"}),
        (Span(name="t", source="mails", context="about"), {"pair": "about"}, {"about": "on {}"}),
        (Ranking(name="t", source="mails", group="query"), {"pair": "query"}, {"query": "of {}"}),
    ],
)
def test_all_columns_that_the_model_reads_change(task, source, read):
    """Whatever kind reads them: further texts, columns of a prompt, choices, negatives, target texts."""

    def row(address):
        columns = {
            name: [text.format(address) for text in value] if isinstance(value, list) else value.format(address)
            for name, value in {"text": "to {}", **read}.items()
        }
        return {**columns, "other": "jo@x.com"}

    mails = Source("mails", rows=[], deidentify=MASK, **source)
    assert edited(row("jo@x.com"), mails, task).columns == row("[EMAIL]")


@pytest.mark.parametrize("content", ["{}", "Regards,\n{}", "by\t{}", 'of "{}"\\', "to {}\nand\r\n{} now", "é\u2028{}"])
def test_conversations_stay_conversations(content):
    """They are JSON texts, in which a new line is written as two characters."""
    chats = Source("chats", rows=[], text="messages", deidentify=MASK)
    task = CausalLM(name="a", source="chats", messages="messages")

    def row(address):
        turns = [{"role": "user", "content": content.replace("{}", address)}, {"role": "assistant", "content": f"to {address}"}]
        return columns({"messages": turns})

    for address, mask in (("jo@x.com", "[EMAIL]"), ("@jack", "[USER]")):
        assert edited(row(address), chats, task).columns == row(mask)
    text = row("jo@x.com")["messages"]
    ((result, places),) = edited_rows(
        [Row({"messages": text}, "f:1")],
        row_edits.text_columns(chats, [task]),
        lambda texts: replaced_texts(texts, [("email", RECOGNISERS["email"])], None, lambda kind, value: 'a\n"b"'),
    )
    assert result.columns == row('a\n"b"')
    for column, place in places:
        assert text[place.start : place.end] == "jo@x.com"
        assert result.columns[column][place.new_start : place.new_end] == 'a\\n\\"b\\"'


MAILS = [
    {
        "text": f"mail {number} to jo@corp.com and {'Jo@corp.com' if number % 2 else f'a{number}@x.org'}",
        "label": "ab"[number % 2],
    }
    for number in range(40)
]


def mails(name, edit=MASK, rows=MAILS):
    return Source(name, rows=rows, deidentify=edit)


def experiment(*sources):
    tasks = tuple(Classification(name=f"{source.name}_task", source=source.name) for source in sources)
    return Experiment(name="mails", trunk=Embedding(), sources=sources, tasks=tasks, phases=(Phase("all", 2),))


def test_the_same_value_is_the_same_in_all_rows_splits_and_sources(tmp_path):
    (tmp_path / "key").write_text("secret\n")
    edit = Deidentify("hash", kinds=KINDS, key_file=str(tmp_path / "key"))
    words = set()
    for name in ("one", "two"):
        for rows in splits.read(mails(name, edit)).rows.values():
            words |= {row.columns["text"].split()[3] for row in rows}
    assert len(words) == 1
    assert words.pop().startswith("EMAIL_")


def test_texts_that_differ_in_names_only_are_repeated_texts():
    rows = [*MAILS, {"text": "mail 0 to x@y.org and z@y.org", "label": "a"}]
    assert splits.read(mails("m", None, rows)).repeated == 0
    parts = splits.read(mails("m", MASK, rows))
    assert (parts.repeated, parts.replaced) == (1, {"email": 82})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run on de-identified rows, and its log."""
    workdir, lines = tmp_path_factory.mktemp("mails") / "run", []
    handler, log = logging.Handler(), logging.getLogger("mtl_jax")
    handler.emit = lambda record: lines.append(record.getMessage())
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    mtl_jax.train(experiment(mails("m")), workdir)
    log.removeHandler(handler)
    log.setLevel(level)
    return workdir, "\n".join(lines)


def test_a_run_records_counts_by_type_and_no_text(run):
    workdir, lines = run
    assert "source m: 80 places de-identified (80 email)" in lines
    data = json.loads((workdir / "data.json").read_text())
    assert data["deidentified"] == {"m": {"email": 80}}
    config = json.loads((workdir / "config.json").read_text())
    assert config["sources"][0]["deidentify"]["kinds"] == list(KINDS)
    assert from_json(config).sources[0].deidentify == MASK
    assert "corp.com" not in lines + json.dumps(data) + json.dumps(config)


def test_resuming_notices_a_change(run):
    workdir, _ = run
    with pytest.raises(UserError, match=r"was begun with another configuration: sources.0.deidentify.kinds"):
        mtl_jax.train(experiment(mails("m", Deidentify(kinds=("url",)))), workdir)
    raw = experiment(mails("m", dataclasses.replace(MASK, kinds=("url",))))
    (workdir / "results.json").unlink()
    (workdir / "config.json").write_text(json.dumps(to_json(raw)))
    with pytest.raises(UserError, match=r"was begun with other data: deidentified.m.email, .*sources.m.dev.sha256"):
        mtl_jax.train(raw, workdir)
    (workdir / "config.json").write_text(json.dumps(to_json(experiment(mails("m")))))


def test_predictions_read_texts_as_they_are_unless_asked(run):
    model = mtl_jax.load_model(run[0])
    raw, changed = "mail 3 to jo@corp.com and b@c.com", "mail 3 to [EMAIL] and [EMAIL]"
    assert model.predict("m_task", [raw], deidentify=True) == model.predict("m_task", [changed])
    assert model.predict("m_task", [raw]) != model.predict("m_task", [changed])
    rows = [{"text": raw, "label": "a"}]
    asked = model.evaluate("m_task", rows, deidentify=True)
    assert asked == model.evaluate("m_task", [{**rows[0], "text": changed}]) != model.evaluate("m_task", rows)
    plain = model._replace(run=model.run._replace(experiment=experiment(mails("m", None))))
    with pytest.raises(UserError, match="source 'm' of this run does not de-identify its rows; leave deidentify out"):
        plain.predict("m_task", [raw], deidentify=True)


def test_config_json_has_the_field_only_where_it_is_set():
    assert "deidentify" not in to_json(experiment(mails("m", None)))["sources"][0]


def test_a_wrong_field_is_found_before_any_row_is_read():
    first = mails("first", None, rows=lambda: pytest.fail("read"))
    with pytest.raises(UserError, match="source 'second': deidentify: unknown mode"):
        read_sources((first, mails("second", Deidentify("none"))), experiment(first, mails("second")).tasks)


def test_a_change_of_a_script_is_a_part_of_its_own():
    with parts.forgotten():

        @dataclasses.dataclass(frozen=True)
        class Shout(RowEdit):
            mark: str = "!"

            def editor(self, columns):
                def edit(rows):
                    texts = [row.columns[columns.text].upper() + self.mark for row in rows]
                    changed = [{**row.columns, columns.text: text} for row, text in zip(rows, texts, strict=True)]
                    return [(row._replace(columns=new), {"shout": 1}) for row, new in zip(rows, changed, strict=True)]

                return edit

        shouted = experiment(mails("m", Shout("?")))
        assert splits.read(shouted.sources[0]).rows["train"][0].columns["text"].endswith("?")
        config = to_json(shouted)
        assert config["parts"]["Shout"]["door"] == "row edit"
        assert from_json(config).sources[0].deidentify == Shout("?")
    with pytest.raises(UserError, match=r"the row edit Shout is a class of .*, which is not imported"):
        from_json(config)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"mode": "rot13"}, "source 'm': deidentify: unknown mode 'rot13'; choices: surrogate, mask, hash"),
        ({"mode": "hash"}, "source 'm': deidentify: mode hash needs key_file, a file with a text that nobody knows"),
        ({"key_file": "none"}, "none: cannot be read"),
        ({"kinds": ("emial",)}, r"unknown kind of source 'm': deidentify: 'emial' \(did you mean 'email'\?\)"),
        ({"kinds": "email"}, "kinds is the text 'email'; it must be a tuple of names"),
        ({"kinds": ("person",)}, "kinds has person, but names is empty; name the tagging run that finds names"),
        ({"names": "nowhere"}, "names is 'nowhere', which is neither the workdir of a tagging run nor a registered"),
    ],
)
def test_a_wrong_field_is_one_line(fields, line):
    edit = Deidentify(**{"kinds": KINDS, **fields})
    with pytest.raises(UserError, match=line):
        splits.read(mails("m", edit))
