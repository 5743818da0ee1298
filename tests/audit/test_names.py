"""Names of persons, places and organisations: found by a tagging run of one's own, or by a function that is registered."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import mtl_jax
from mtl_jax import Classification, Source, Tagging, UserError, audit
from mtl_jax.audit import Deidentify
from mtl_jax.audit import person_names as names
from mtl_jax.core import parts
from mtl_jax.data import splits
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.tasks.label_names import named


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The workdir of a run that tags two names, and has a second task that tags nothing."""
    names = {"Ann": "B-PER", "Rome": "B-LOC", "Blue": "B-product"}
    words = [*names, "met", "in", ",", ".", "who", "and", "saw"]
    rows = []
    for index in range(80):
        sentence = [words[(index * step + step) % len(words)] for step in range(1, 7)]
        rows.append({"text": sentence, "tags": [names.get(word, "O") for word in sentence], "label": "ab"[index % 2]})
    sentences = [{**row, "text": [*row["text"], f"w{index}"], "tags": [*row["tags"], "O"]} for index, row in enumerate(rows)]
    experiment = mtl_jax.Experiment(
        name="tagger",
        trunk=mtl_jax.Embedding(),
        sources=(mtl_jax.Source(name="said", rows=sentences),),
        tasks=(mtl_jax.Tagging(name="names", source="said"), Classification(name="kind", source="said")),
        phases=(mtl_jax.Phase("all", 60, learning_rate=0.05),),
        batch=mtl_jax.Batching(rows=8, row_length=32),
    )
    workdir = tmp_path_factory.mktemp("tagger") / "run"
    mtl_jax.train(experiment, workdir)
    return workdir


@pytest.fixture(scope="module")
def tagger(workdir):
    return mtl_jax.load_model(workdir)


def test_names_are_those_of_a_tagging_run(tagger):
    people = audit.people_of(tagger, "names")
    assert people(["Ann, who saw Rome.", "", "who?"]) == [[(0, 3, "person"), (13, 17, "place")], [], []]
    new, places = audit.deidentify("Ann met Blue in Rome.", mode="mask", recognisers=(), people=people)
    assert [place.type for place in places] == ["person", "place"]
    assert new == "[PERSON] met Blue in [PLACE]."
    assert audit.people_of(tagger, "names", {"product": "brand"})(["Blue, Ann"]) == [[(0, 4, "brand")]]


def test_a_run_that_tags_no_names_is_one_line(tagger):
    with pytest.raises(UserError, match="people: task 'kind' is not a tagging task with entities"):
        audit.people_of(tagger, "kind")
    with pytest.raises(UserError, match="'nmaes'"):
        audit.people_of(tagger, "nmaes")


@pytest.mark.parametrize(
    ("tags", "label_names"),
    [
        (("O", "B-PER", "I-PER", "B-x"), {"PER": "Personne"}),
        (("O", "B-PER", "I-PER", "B-x"), {"B-PER": "Lieu", "I-PER": "I-LOC", "O": "dehors"}),
        (("O", "B-1", "I-1", "B-x"), {"1": "person"}),
        (("O", "B-per", "I-per", "B-x"), {"per": "location"}),
    ],
)
def test_types_are_those_of_the_tags_and_else_their_names(tags, label_names, tmp_path):
    """The names that people read hide no person, and a number may have its meaning in its name."""
    task = named(Tagging(name="names", source="said", labels=tags, label_names=label_names))
    outputs = {"Ann": 1, "Lee": 2, "Blue": 3}

    def predict(name, texts):
        rows = [Row({"text": words}, "a") for words in texts]
        numbers = [np.arange(len(words), dtype=np.int32) for words in texts]
        scores = [np.eye(4, dtype=np.float32)[[outputs.get(word, 0) for word in words]] for words in texts]
        return [
            task.describe([score], [Window(0, number, None, number, None)], row)
            for score, number, row in zip(scores, numbers, rows, strict=True)
        ]

    model = SimpleNamespace(run=SimpleNamespace(task=lambda name: task), predict=predict)
    assert audit.people_of(model, "names")(["who, Ann Lee met Blue"]) == [[(5, 12, "person")]]
    with pytest.raises(UserError, match=r"people: task 'names' tags none of the types brand, but B-.*, I-.*, B-x"):
        audit.people_of(model, "names", {"brand": "brand"})
    values = {"labels": list(tags), "label_names": task.label_names}
    (tmp_path / "data.json").write_text(json.dumps({"tasks": {"names": values, "b": {"labels": ["O", "B-x"]}}}))
    assert names.tagging_run(str(tmp_path), "names") == (tmp_path, "names")
    with pytest.raises(UserError, match="names: task 'b' does not tag persons, places or organisations there, but B-x"):
        names.tagging_run(f"{tmp_path}:b", "names")


def test_a_text_that_the_run_cannot_read_is_one_line(tagger):
    broken = SimpleNamespace(run=tagger.run, predict=lambda task, texts: [{"error": "no room"} for _ in texts])
    with pytest.raises(UserError, match=r"people: text 1 cannot be read by task 'names' \(no room\)"):
        audit.people_of(broken, "names")(["Ann"])


def test_rows_and_files_without_names(workdir, tmp_path):
    texts = [f"Ann met Bo{number} in Rome" for number in range(30)]
    edit = Deidentify(kinds=("person", "email"), names=str(workdir))
    parts = splits.read(Source("said", rows=[{"text": text.split()} for text in texts], deidentify=edit))
    assert parts.replaced == {"person": 30}
    assert parts.rows["test"][0].columns["text"][:2] == ["[PERSON]", "met"]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    flags = {"kinds": ("email", "place", "organisation"), "names": f"{workdir}:names"}
    assert mtl_jax.deidentify(tmp_path / "a.txt", tmp_path / "b.txt", **flags).replaced == {"place": 30}
    assert (tmp_path / "b.txt").read_text().splitlines()[0] == "Ann met Bo0 in [PLACE]"


def test_a_run_without_such_a_task_is_one_line_before_any_work(workdir, tmp_path):
    def check(text):
        Deidentify(kinds=("email",), names=text).check("x")

    with pytest.raises(UserError, match="unknown tagging task with entities in x: names: 'kind'; choices: names"):
        check(f"{workdir}:kind")
    data = json.loads((workdir / "data.json").read_text())
    for number, (tasks, line) in enumerate(
        [
            ({"kind": data["tasks"]["kind"]}, "has no tagging task with entities, but kind"),
            ({"a": data["tasks"]["names"], "b": data["tasks"]["names"]}, "several tasks tag persons, .*; write .*:a or .*:b"),
            ({"a": {"labels": ["B-x", "O"]}}, "no task tags persons, places or organisations there, but B-x; name another run"),
            (3, "data.json is not what mtl_jax wrote"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "data.json").write_text(json.dumps({"tasks": tasks}))
        with pytest.raises(UserError, match=line):
            check(str(folder))
    with pytest.raises(UserError, match=r"x: names is 'no', which is neither the workdir .* recogniser of names \(presidio\)"):
        check("no")


def test_a_function_of_a_script_finds_names():
    with parts.forgotten():

        @audit.register_names("capitals")
        def capitals():
            return lambda texts: [
                [(i, i + 1, "capital") for i, letter in enumerate(text) if letter.isupper()] for text in texts
            ]

        deidentified = Deidentify(kinds=("capital",), names="capitals").texts()
        assert [new for new, _ in deidentified(["a B", "c"])] == ["a [CAPITAL]", "c"]


def test_presidio_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(UserError, match="names by presidio need the package presidio-analyzer, which is not installed"):
        names.names_by("presidio", "names")


def test_presidio_has_the_best_installed_model_and_downloads_none(monkeypatch):
    """Modules with the calls of presidio-analyzer 2.2 and spaCy 3.8 that are used."""
    default = {
        "models": [{"model_name": "en_core_web_lg"}],
        "ner_model_configuration": {"labels_to_ignore": ["ORGANIZATION", "DATE"]},
    }

    class NlpEngineProvider:
        def __init__(self, nlp_configuration=default):
            self.nlp_configuration = nlp_configuration

        def create_engine(self):
            return self.nlp_configuration

    class AnalyzerEngine:
        def __init__(self, nlp_engine):
            engines.append(nlp_engine)

        def analyze(self, text, language, entities):
            return [SimpleNamespace(start=0, end=3, entity_type="PERSON")] if text.startswith("Ann") else []

    engines, installed = [], ["de_core_news_lg"]
    monkeypatch.setitem(sys.modules, "presidio_analyzer", SimpleNamespace(AnalyzerEngine=AnalyzerEngine))
    monkeypatch.setitem(sys.modules, "presidio_analyzer.nlp_engine", SimpleNamespace(NlpEngineProvider=NlpEngineProvider))
    monkeypatch.setitem(sys.modules, "spacy.util", SimpleNamespace(get_installed_models=lambda: installed))
    with pytest.raises(UserError, match="need an English model of spaCy, such as en_core_web_lg, and none is installed"):
        names.names_by("presidio", "names")
    installed += ["en_core_web_md", "en_core_web_sm_more"]
    assert names.names_by("presidio", "names")(["Ann met", "met"]) == [[(0, 3, "person")], []]
    assert engines == [
        {
            "models": [{"lang_code": "en", "model_name": "en_core_web_md"}],
            "ner_model_configuration": {"labels_to_ignore": ["DATE"]},
        }
    ]
