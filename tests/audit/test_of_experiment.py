"""The audit of an experiment: every way in which rows of different sources and splits can be copies."""

import dataclasses
import json

import pytest

import mtl_jax
from mtl_jax import Classification, Embedding, Experiment, Phase, Regression, Seq2Seq, Source, Span, UserError, audit
from mtl_jax.cli import main

LONG = "an old dog sleeps under that red house by our river"
NEAR = "an old dog sleeps under that blue house by our river"
DEV = [{"text": "something else to choose by", "label": "a"}]


def source(name, train, test, dev=DEV, **fields):
    return Source(name=name, rows=train, dev_rows=dev, test_rows=test, **fields)


def labelled(*texts):
    return [{"text": text, "label": "ab"[index % 2]} for index, text in enumerate(texts)]


def experiment(*sources, tasks=None):
    tasks = tasks or tuple(Classification(name=f"{part.name}_task", source=part.name) for part in sources)
    return Experiment(name="audited", trunk=Embedding(), sources=sources, tasks=tasks, phases=(Phase("all", 1),))


def counted(result):
    """{(source and split, train source, view): (exact, letters, near, training rows, dropped)}"""
    return {
        (f"{entry.source} {entry.split}", entry.train_source, entry.view): (
            *entry.rows.values(),
            entry.train_rows,
            entry.dropped,
        )
        for entry in result.overlaps
    }


def test_rows_of_all_sources_are_compared_and_counted_by_kind():
    films = source(
        "films",
        labelled("A moore 's film!", "only in train", NEAR, "Copied  Exactly", "copied exactly"),
        labelled("a Moore's film", LONG, "copied exactly"),
    )
    books = source(
        "books", labelled("an old book", "copied exactly", "to learn from"), labelled("OLD BOOK, an", "an old book?")
    )
    result = audit.of_experiment(experiment(films, books))
    assert counted(result) == {
        ("films test", "films", "row"): (1, 1, 1, 4, 2),
        ("films test", "books", "row"): (1, 0, 0, 1, 1),
        ("books test", "books", "row"): (0, 1, 0, 1, 0),
    }
    assert result.sizes["films"] == {"train": 5, "dev": 1, "test": 3}
    first = result.overlaps[0]
    assert (first.of, {example.kind for example in first.examples}) == (3, {"exact", "letters", "near"})
    near = next(example for example in first.examples if example.kind == "near")
    assert (near.text, near.train_text, near.similarity) == (LONG, NEAR, 0.75)
    assert (near.row, near.train_row) == ("films.test_rows[1]", "films.rows[2]")


def test_a_higher_threshold_leaves_out_near_copies():
    films = source("films", labelled(NEAR, "only in train"), labelled(LONG))
    assert counted(audit.of_experiment(experiment(films), near=0.8)) == {}
    assert "No held-out row is a copy of a training row." in str(audit.of_experiment(experiment(films), near=0.8))


def test_pairs_count_in_either_order_and_by_their_single_texts():
    def pairs(*texts):
        return [{"first": one, "second": other, "label": "ab"[i % 2]} for i, (one, other) in enumerate(texts)]

    dev = pairs(("for the", "dev rows"))
    both = source(
        "both",
        pairs(("a cat", "a dog"), ("it rains", "it pours")),
        pairs(("A dog.", "a cat"), ("it rains", "it is dry"), ("none", "of these")),
        dev,
        text="first",
        pair="second",
    )
    single = source("single", labelled("it pours", "A DOG", "and more"), labelled("a  cat", "nothing like it"))
    assert counted(audit.of_experiment(experiment(both, single))) == {
        ("both test", "both", "row"): (0, 1, 0, 1, 0),
        ("both test", "both", "single text"): (2, 0, 0, 2, 0),
        ("both test", "single", "single text"): (0, 1, 0, 1, 0),
        ("single test", "both", "single text"): (1, 0, 0, 1, 0),
    }


def test_contexts_of_questions_and_targets_of_translations_are_compared():
    def asked(question, context):
        return {"question": question, "context": context, "answers": [{"text": context.split()[0], "start": 0}]}

    questions = source(
        "questions",
        [asked("Who slept?", LONG), asked("Who ran?", "A fox ran.")],
        [asked("Where?", NEAR), asked("Who ran?", "Nobody ran at all.")],
        [asked("Why?", "Because of it.")],
        text="question",
        pair="context",
    )
    translated = source(
        "translated",
        [{"text": "red house", "target": "maison rouge"}, {"text": "blue", "target": "bleu"}],
        [{"text": "the red house", "target": "Maison rouge!"}],
        [{"text": "fox", "target": "renard"}],
    )
    tasks = (
        Span(name="answer", source="questions"),
        Seq2Seq(name="french", source="translated", column="target"),
    )
    assert counted(audit.of_experiment(experiment(questions, translated, tasks=tasks))) == {
        ("questions test", "questions", "single text"): (1, 0, 1, 2, 0),
        ("translated test", "translated", "target"): (0, 1, 0, 1, 0),
    }


def test_contexts_that_are_no_column_of_the_source_are_a_view_of_their_own():
    def asked(question, context):
        return {"question": question, "context": context, "answers": [{"text": context.split()[0], "start": 0}]}

    questions = source(
        "questions",
        [asked("Who slept?", LONG), asked("Who ran?", "A fox ran.")],
        [asked("Where?", NEAR), asked("who slept?", LONG.upper())],
        [asked("Why?", "Because of it.")],
        text="question",
    )
    tasks = (Classification(name="kind", source="questions", column="question"),)
    assert counted(audit.of_experiment(experiment(questions, tasks=tasks))) == {
        ("questions test", "questions", "row"): (1, 0, 0, 1, 1),
        ("questions test", "questions", "context"): (1, 0, 1, 1, 1),
    }


def test_copies_under_another_label_within_train_are_named():
    rows = [
        {"text": "it is fine", "label": "a"},
        {"text": "It is fine!", "label": "b"},
        {"text": "it is  fine", "label": "b"},
        {"text": LONG, "label": "a"},
        {"text": NEAR, "label": "b"},
        {"text": "the same", "label": "a"},
        {"text": "the same!", "label": "a"},
        {"text": "without", "label": "b"},
    ]
    result = audit.of_experiment(experiment(source("films", rows, labelled("for the test"))))
    (conflict,) = result.conflicts
    assert (conflict.task, conflict.source, conflict.of) == ("films_task", "films", 8)
    assert conflict.rows == {"exact": 2, "letters": 1, "near": 2}
    assert {frozenset(example.labels) for example in conflict.examples} == {frozenset("ab")}
    assert {(example.text, example.train_text) for example in conflict.examples if example.kind == "near"} == {(LONG, NEAR)}
    assert "films" in str(result)


def test_scores_are_labels_too_and_rows_without_a_label_are_none():
    rows = [{"text": "a b", "score": score} for score in ("1.5", "", "2.0")]
    rows += [{"text": f"text {index}", "score": "0"} for index in range(3)]
    films = source("films", rows, [{"text": "c", "score": "1"}], [{"text": "d", "score": "1"}])
    tasks = (Regression(name="stars", source="films", column="score"),)
    (conflict,) = audit.of_experiment(experiment(films, tasks=tasks)).conflicts
    assert conflict.rows == {"exact": 2, "letters": 0, "near": 0}


def test_an_audit_is_json_with_texts_only_if_asked_for():
    films = source("films", labelled(NEAR, "only in train"), labelled(LONG))
    result = audit.of_experiment(experiment(films))
    assert NEAR in json.dumps(result.to_json())
    without = json.loads(json.dumps(result.to_json(texts=False)))
    assert NEAR not in json.dumps(without)
    assert without["overlaps"][0]["rows"] == {"exact": 0, "letters": 0, "near": 1}


def test_only_the_tasks_that_are_trained_are_audited():
    films, books = (
        source("films", labelled("x y", "z"), labelled("x y!")),
        source("books", labelled("x Y!", "q"), labelled("r")),
    )
    whole = experiment(films, books)
    assert len(audit.of_experiment(dataclasses.replace(whole, only=("books_task",))).overlaps) == 0


def test_a_threshold_outside_its_range_is_one_line():
    with pytest.raises(UserError, match="near is 0; it must be a number above 0 and at most 1"):
        audit.of_experiment(experiment(source("films", labelled("a", "b"), labelled("c"))), near=0)


SCRIPT = """
import mtl_jax
from mtl_jax import Classification, Embedding, Experiment, Phase, Source
rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(["A moore 's film", "b", "c", "B!"])]
mtl_jax.main(Experiment(
    name="audited", trunk=Embedding(), phases=(Phase("all", 1),), tasks=(Classification(name="t", source="films"),),
    sources=(Source(name="films", rows=rows, dev_rows=rows[2:3], test_rows=[{"text": "a Moore's film", "label": "a"}]),),
))
"""


def test_the_command_prints_tables_and_writes_json(tmp_path, monkeypatch, capsysbinary):
    (tmp_path / "script.py").write_text(SCRIPT)
    path = tmp_path / "audit.json"
    monkeypatch.setattr("sys.argv", ["mtl-jax", "audit", str(tmp_path / "script.py"), "--json", str(path), "--texts"])
    main.console()
    printed = capsysbinary.readouterr().out.decode()
    assert "| films test |" in printed
    assert "a Moore's film" in printed
    assert json.loads(path.read_text())["overlaps"][1]["rows"]["letters"] == 1


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--near", "2"], "error: --near is 2.0; it must be a number above 0 and at most 1, such as 0.7"),
        (["--json", "/proc/none/a.json"], "error: --json /proc/none/a.json: name a file in a directory that exists"),
    ],
)
def test_a_bad_flag_of_the_command_is_one_line(flags, line, tmp_path, monkeypatch, capsys):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr("sys.argv", ["mtl-jax", "audit", str(tmp_path / "script.py"), *flags])
    with pytest.raises(SystemExit):
        main.console()
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("call", ["train(workdir='run', experiment=", "ablate(workdir='run', vary=[], experiment="])
def test_a_script_that_trains_by_itself_is_stopped_before(call, tmp_path, monkeypatch, capsysbinary):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT.replace("mtl_jax.main(", f"mtl_jax.{call}"))
    monkeypatch.setattr("sys.argv", ["mtl-jax", "audit", "script.py"])
    main.console()
    assert b"| films test |" in capsysbinary.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_script_without_an_experiment_is_one_line(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match=r"did not call mtl_jax\.main\(experiment\), so there is nothing to audit"):
        mtl_jax.cli.scripts.read(str(tmp_path / "empty.py"), "audit")
