"""A run marked private: no text of its rows in any file of its workdir, in its log, or in an error line."""

import dataclasses
import json
import logging
import re

import pytest

import mtl_jax
from mtl_jax import (
    Batching,
    Classification,
    Embedding,
    Experiment,
    Multilabel,
    Phase,
    Pretrained,
    Regression,
    Source,
    Span,
    Tagging,
    UserError,
    audit,
)
from mtl_jax.core import parts, row_texts
from mtl_jax.training.experiment_json import from_json, to_json
from mtl_jax.training.setup import prepare

SECRET = "zebedee"  # in every text; no word of the model's vocabulary


def experiment(trunk, *sources, tasks=None, **fields):
    tasks = tasks or tuple(Classification(name=f"{source.name}_task", source=source.name) for source in sources)
    values = {"private": True, "batch": Batching(rows=8, row_length=16), **fields}
    return Experiment(name="kept", trunk=trunk, sources=sources, tasks=tasks, phases=(Phase("all", 2),), **values)


@pytest.fixture(scope="module")
def run(bert, tmp_path_factory):
    """The workdir of a private run with everything that has remarks, and its log."""
    folder = tmp_path_factory.mktemp("private")
    lines = [f"{SECRET} number {index},{'ab'[index % 2]}" for index in range(60)]
    lines += [f"{SECRET} number 3,a", f"bad {SECRET},a,a,a"]  # another label; a bad row
    (folder / "train.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    (folder / "test.csv").write_text(f"text,label\n{SECRET} ?!,a\n{SECRET},b\n")
    (folder / "dev.csv").write_text(f"text,label\na {SECRET} (number) {'n ' * 9},a\nof {SECRET},b\n")
    files = {"path": f"{folder}/train.csv", "dev_path": f"{folder}/dev.csv", "test_path": f"{folder}/test.csv"}
    records, log = [], logging.getLogger("mtl_jax")
    handler, level = logging.Handler(), log.level
    handler.emit = lambda record: records.append(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    source = Source("mails", lenient=True, **files)
    mtl_jax.train(experiment(Pretrained(str(bert)), source), folder / "run")
    log.removeHandler(handler)
    log.setLevel(level)
    return folder / "run", "\n".join(records)


def test_no_file_and_no_line_of_the_log_has_a_text(run):
    workdir, lines = run
    assert "the vocabulary does not know" in lines
    assert "train.csv:62 has (not shown: private) where " in lines
    assert re.search(r"skipped: .*train.csv:63: 4 columns, but there are 2 names: \(not shown: private\)", lines)
    assert SECRET not in lines
    files = [path for path in workdir.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.json", "data.json", "metrics.jsonl", "results.json"} <= names
    assert "train_sketches.npz" not in names  # by which a text could be looked for
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert json.loads((workdir / "config.json").read_text())["private"] is True


def test_predictions_show_what_they_were_asked_for_and_errors_nothing(run, caplog):
    model = mtl_jax.load_model(run[0])
    assert model.predict("mails_task", ["who"])[0]["label"] in "ab"
    model.evaluate("mails_task", [{"text": "who", "label": SECRET}, {"text": SECRET, "label": "a"}])
    assert "skipped: mails.rows[0]: label (not shown: private) is not in the label set" in caplog.text
    assert SECRET not in caplog.text


def test_what_a_run_remembers_is_measured_without_a_text(run, caplog):
    """Its rows are read again, and those that cannot be are named."""
    with pytest.raises(UserError, match="source 'mails' has 2 test rows, and membership needs 10") as error:
        mtl_jax.memorisation(run[0])
    assert "train.csv:63: 4 columns, but there are 2 names: (not shown: private)" in caplog.text
    assert SECRET not in caplog.text + str(error.value)


def refused(source, *tasks):
    """The line with which a private run refuses rows; a public one shows the text."""
    with pytest.raises(UserError, match=SECRET):
        prepare(experiment(Embedding(), source, tasks=tasks, private=False))
    with pytest.raises(UserError) as error:
        prepare(experiment(Embedding(), source, tasks=tasks))
    return str(error.value)


def rows_of(**columns):
    good = [{name: value for name, (value, _) in columns.items()} for _ in range(40)]
    good = [
        {**row, "text": row["text"] if isinstance(row["text"], list) else f"{row['text']} {i}"} for i, row in enumerate(good)
    ]
    return [*good, {name: value for name, (_, value) in columns.items()}]


HIDDEN = re.escape(row_texts.HIDDEN)


@pytest.mark.parametrize(
    ("task", "rows", "line"),
    [
        (Regression(name="t", source="s", column="y"), rows_of(text=("a", "b"), y=("1", SECRET)), "is not a number"),
        (
            Tagging(name="t", source="s", labels=("O", "B-X")),
            [*({"text": ["a", f"b{i}"], "tags": ["O", "B-X"]} for i in range(40)), {"text": [SECRET], "tags": [SECRET]}],
            "tag HIDDEN of word 1, HIDDEN, is neither",
        ),
        (
            Multilabel(name="t", source="s", column="y", labels=("a", "b")),
            rows_of(text=("a", "b"), y=(["a"], [SECRET])),
            "label HIDDEN is not in the label set",
        ),
        (
            Span(name="t", source="s"),
            rows_of(text=("a", "b"), context=("c", SECRET), answers=([], [{"text": SECRET, "start": 3}])),
            "the answer HIDDEN at 3 is outside the context of 7 characters",
        ),
        (Classification(name="t", source="s", column="y"), rows_of(text=("a", "b"), y=("1", [SECRET])), "has a list, HIDDEN"),
    ],
)
def test_rows_that_are_refused_are_named_by_file_and_line(task, rows, line):
    pair = {"pair": "context"} if isinstance(task, Span) else {}
    message = refused(Source("s", rows=rows, cut_dev=0.3, cut_test=0.3, **pair), task)
    assert "s.rows[40]" in message
    assert re.search(line.replace("HIDDEN", HIDDEN), message)
    assert SECRET not in message


def test_a_file_without_its_header_shows_no_row(tmp_path):
    (tmp_path / "a.csv").write_text(f"{SECRET},{SECRET}s\nb,c\n")
    source = Source("s", f"{tmp_path}/a.csv")
    line = refused(source, Classification(name="t", source="s"))
    assert line.endswith("a.csv: source 's' has no text column 'text'; columns: (not shown: private)")


def test_errors_of_a_script_are_not_quoted():
    def rows():
        yield {"text": "a", "label": "b"}
        int(SECRET)

    line = refused(Source("s", rows=rows), Classification(name="t", source="s"))
    assert re.search(r"s.rows\[1\]: .* failed: ValueError: ValueError \(not shown: private\)", line)
    with parts.forgotten():

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Number(Regression):
            def parse(self, row):
                return float(row.columns["y"])

        source = Source("s", rows=rows_of(text=("a", "b"), y=("1", SECRET)))
        line = refused(source, Number(name="t", source="s", column="y"))
        assert "s.rows[40]: task 't': ValueError (not shown: private)" in line


def test_an_audit_of_a_private_experiment_has_no_texts():
    train = [{"text": f"{SECRET} !", "label": "a"}, {"text": f"{SECRET} !!", "label": "b"}, {"text": "b", "label": "b"}]
    held_out = [{"text": SECRET, "label": "a"}]
    source = Source("s", rows=train, dev_rows=held_out, test_rows=held_out)
    private = audit.of_experiment(experiment(Embedding(), source))
    assert (len(private.overlaps), len(private.conflicts)) == (2, 1)
    assert SECRET not in private.table(texts=True) + json.dumps(private.to_json())
    assert SECRET in audit.of_experiment(experiment(Embedding(), source, private=False)).table(texts=True)


def test_the_field_is_recorded_only_where_it_is_set():
    source = Source("s", rows=[{"text": "a"}])
    public, private = (experiment(Embedding(), source, private=value) for value in (False, True))
    assert "private" not in to_json(public)
    assert from_json(json.loads(json.dumps(to_json(private)))).private


def test_a_vocabulary_of_the_texts_is_a_remark():
    rows = [{"text": f"{SECRET} {index}", "label": "ab"[index % 2]} for index in range(60)]
    notes = prepare(experiment(Embedding(), Source("s", rows=rows))).notes
    assert "private: the vocabulary in trunk/ is made of words of the texts; a pretrained trunk brings its own" in notes


def test_an_id_that_occurs_twice():
    rows = [{"text": "a", "id": SECRET}, {"text": "b", "id": SECRET}]
    line = refused(Source("s", rows=rows, id="id"), Classification(name="t", source="s"))
    assert line.startswith("s.rows[1]: the id (not shown: private) occurs already at s.rows[0]")
