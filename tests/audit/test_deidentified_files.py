"""Files that are de-identified: the same format, labels and answers at their text, whole or not at all."""

import gzip
import json

import pytest

import mtl_jax
from mtl_jax import UserError
from mtl_jax.cli import main

KINDS = ("email", "url", "user", "ip")


def written(tmp_path, name, content, **options):
    """(the new file's text, what the function returned)"""
    (tmp_path / name).write_text(content, encoding="utf-8")
    result = mtl_jax.deidentify(tmp_path / name, tmp_path / f"new_{name}", **{"kinds": KINDS, **options})
    return (tmp_path / f"new_{name}").read_text(encoding="utf-8"), result


def test_objects_keep_their_form_and_answers_their_place(tmp_path):
    context = "jo@x.com met ann@y.org."
    rows = [
        {
            "text": "to jo@x.com",
            "n": 1.5,
            "meta": {"by": "@jack", "ok": True},
            "turns": [{"a": "ann@y.org", "b": 2}, {"a": "by\n@jack"}],
        },
        {"question": "who?", "context": context, "answers": {"text": ["ann@y.org"], "answer_start": [13]}},
        {"question": "é", "context": context, "answers": [{"text": "met", "answer_start": 9}]},
        {"words": ["by", "@jack", "."], "tags": ["O", "B-PER", "O"], "numbers": [1, 2]},
    ]
    text, result = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    new = [json.loads(line) for line in text.splitlines() if line]
    assert new[0] == {
        "text": "to [EMAIL]",
        "n": 1.5,
        "meta": {"by": "[USER]", "ok": True},
        "turns": [{"a": "[EMAIL]", "b": 2}, {"a": "by\n[USER]"}],
    }
    assert new[1]["answers"] == {"text": ["[EMAIL]"], "answer_start": [12]}
    assert new[2] == {**rows[2], "context": "[EMAIL] met [EMAIL].", "answers": [{"text": "met", "answer_start": 8}]}
    assert new[3] == {**rows[3], "words": ["by", "[USER]", "."]}
    assert (text.endswith("}\n\n"), "é" in text) == (True, True)
    assert str(result) == "9 places replaced in 4 rows: 6 email, 3 user"


def test_labels_of_words_follow_and_other_columns_stay_if_asked(tmp_path):
    row = {"words": ["write", "May", "2,", "2020", "@jack"], "tags": ["O", "B-D", "I-D", "I-D", "B-P"], "id": "@jack"}
    text, _ = written(tmp_path, "a.jsonl", json.dumps(row), text=("words",), labels=("tags",), kinds=("date", "user"))
    assert json.loads(text) == {"words": ["write", "[DATE]", "[USER]"], "tags": ["O", "B-D", "B-P"], "id": "@jack"}


def test_a_list_of_texts_stays_as_long_as_it_is(tmp_path):
    """Its entries have spaces inside; a list of words, or one with labels, may become longer or shorter."""
    texts = ["mail jo@corp.com now", "thank you", "", "ann@y.org"]
    rows = [
        {"id": 1, "sentences": texts, "words": ["on", "May", "2,", "2020"]},
        {"id": 2, "sentences": ["thanks", "no mail"], "words": ["10 000", "to", "@jack"], "tags": "O O B-P"},
    ]
    lines = "\n".join(map(json.dumps, rows))
    places = tmp_path / "places"
    options = {"kinds": ("email", "date", "user"), "text": ("words", "sentences"), "labels": ("tags",), "spans": places}
    text, result = written(tmp_path, "a.jsonl", lines, **options)
    first, second = map(json.loads, text.splitlines())
    assert first["sentences"] == ["mail [EMAIL] now", "thank you", "", "[EMAIL]"]
    assert first["words"] == ["on", "[DATE]"]
    assert second == {**rows[1], "words": ["10 000", "to", "[USER]"]}
    assert result.replaced == {"date": 1, "email": 2, "user": 1}
    for place in map(json.loads, places.read_text().splitlines()):
        column, old = place["column"], rows[int(place["row"][-1]) - 1]
        new = json.loads(text.splitlines()[int(place["row"][-1]) - 1])
        assert " ".join(old[column])[place["start"] : place["end"]] in ("jo@corp.com", "ann@y.org", "May 2, 2020", "@jack")
        assert " ".join(new[column])[place["new_start"] : place["new_end"]] == f"[{place['type'].upper()}]"


def test_rows_without_labels_stay_without(tmp_path):
    rows = [{"text": "on May 2, 2020", "tags": tags} for tags in ("", " _ ", None, "O B-D I-D I-D", "O _ _ B-D")]
    options = {"kinds": ("date",), "text": ("text",), "labels": ("tags",)}
    text, _ = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)), **options)
    new = [json.loads(line) for line in text.splitlines()]
    assert {row["text"] for row in new} == {"on [DATE]"}
    assert [row["tags"] for row in new] == ["", " _ ", None, "O B-D", "O B-D"]


def test_tables_with_and_without_a_header(tmp_path):
    text, result = written(tmp_path, "a.csv", 'text,label\n"to jo@x.com, ""now""",a\n@jack,b\n')
    assert text == 'text,label\n"to [EMAIL], ""now""",a\n[USER],b\n'
    assert result.replaced == {"email": 1, "user": 1}
    text, _ = written(tmp_path, "a.tsv", "@a_b\tto @jack\n", columns=("id", "text"), text=("text",))
    assert text == "@a_b\tto [USER]\n"
    text, _ = written(tmp_path, "a.txt", "to @jack\n\nand jo@x.com\n")
    assert text == "to [USER]\n\nand [EMAIL]\n"


CONLL = "# by jo@x.com\nwrite\tO\nMay\tB-D\n2,\tI-D\n2020\tI-D\n\n-DOCSTART-\tO\n\n@jack\tB-P\n"


def test_conll_keeps_comments_and_tags(tmp_path):
    text, result = written(tmp_path, "a.conll", CONLL, columns=("words", "tags"), kinds=("date", "user", "email"))
    assert text == "# by [EMAIL]\nwrite\tO\n[DATE]\tB-D\n\n-DOCSTART-\tO\n\n[USER]\tB-P\n"
    assert result == (2, {"date": 1, "email": 1, "user": 1})
    rest = "\t_\t_\t_\t_\t_\t_\t_\t_\n"
    sentence = f"1\t@jack{rest}2\tMay{rest}3\t2{rest}4\t2020{rest}\n"
    columns = {"columns": ("id", "form", *"cdefghij"), "text": ("form",)}
    assert written(tmp_path, "u.conllu", sentence, **columns)[0] == sentence.replace("@jack", "[USER]")
    with pytest.raises(UserError, match=r"u.conllu:1: a place of several words is replaced, and the ids of CoNLL-U"):
        written(tmp_path, "u.conllu", sentence, **columns, kinds=("date",))


def test_the_command_prints_counts_and_writes_places_without_texts(tmp_path, monkeypatch, capsys):
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("see 10.0.0.1, jo@x.com\n")
    (tmp_path / "key").write_text("secret")
    monkeypatch.chdir(tmp_path)
    flags = ["--output", "b.txt.gz", "--mode", "hash", "--key-file", "key", "--kinds", *KINDS, "--spans", "spans.jsonl"]
    monkeypatch.setattr("sys.argv", ["mtl-jax", "deidentify", "a.txt.gz", *flags])
    main.console()
    assert capsys.readouterr().out == "2 places replaced in 1 row: 1 email, 1 ip; everything is in b.txt.gz\n"
    new = gzip.decompress((tmp_path / "b.txt.gz").read_bytes()).decode()
    assert new.startswith("see IP_")
    first, second = (json.loads(line) for line in (tmp_path / "spans.jsonl").read_text().splitlines())
    assert first == {"row": "a.txt.gz:1", "column": "text", "type": "ip", "start": 4, "end": 12, "new_start": 4, "new_end": 19}
    assert (second["type"], new[second["new_start"] : second["new_end"]][:6]) == ("email", "EMAIL_")


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "to jo@x.com"}\n{"text": "of jo@x.com",\n')
    (tmp_path / "a.xml").write_text("x")
    for name, options, line in [
        ("a.jsonl", {}, "a.jsonl:2: not JSON that can be read$"),
        ("a.xml", {}, "a.xml: its name does not tell its format; give --format, one of jsonl, csv, tsv, conll, lines"),
        ("a.jsonl", {"format": "conll"}, "format conll needs columns, for example words tags"),
        ("a.jsonl", {"format": "lines", "text": ("words",)}, "there is no column 'words'; columns: text"),
        ("a.jsonl", {"output": tmp_path / "a.jsonl"}, "output .*: this is the file that is read; name another"),
        ("a.jsonl", {"output": tmp_path / "no" / "a"}, "output .*: name a file in a directory that exists"),
        ("a.jsonl", {"mode": "hash"}, "deidentify: mode hash needs key_file"),
        ("none.jsonl", {}, "none.jsonl: cannot be read"),
        ("none", {}, "none: cannot be read"),
    ]:
        with pytest.raises(UserError, match=line):
            mtl_jax.deidentify(tmp_path / name, **{"output": tmp_path / "new", "kinds": KINDS, **options})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.xml"]
