"""The matrix of sources and targets on a tiny trunk: resumed without work, its file evaluated alone, copies left out."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from mtl_jax import Source, Tagging, UserError

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(EXPERIMENTS))
    yield importlib.import_module("affinity_matrix")
    sys.path.remove(str(EXPERIMENTS))


def experiment(deep, data):
    """The tiny experiment and tagged words, ten of whose texts are also questions."""
    questions = [line.partition(" ")[2] for line in (data / "questions.txt").read_text().splitlines()[:10]]
    random = np.random.default_rng(0)
    texts = [*questions, *(" ".join(random.choice(tiny.OTHER, 12).tolist()) for _ in range(50))]
    rows = [{"text": text, "tags": ["N" if len(word) > 3 else "A" for word in text.split()]} for text in texts]
    base = tiny.experiment(deep, data)
    tags = Tagging(name="tags", source="words", metric="token_accuracy")
    return dataclasses.replace(base, sources=(*base.sources, Source(name="words", rows=rows)), tasks=(*base.tasks, tags))


@pytest.fixture(scope="module")
def done(script, deep, data, tmp_path_factory):
    """Two tasks, each a source and a target."""
    import affinity_tasks

    folder = tmp_path_factory.mktemp("matrix")
    numbers = {"sizes": (8,), "steps": (1,), "source_steps": 2, "seeds": (0, 1)}
    matrix = script.Matrix(sources=("coarse", "tags"), targets=("coarse", "tags"), **numbers, workdir=str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affinity_tasks, "EXPERIMENT", experiment(deep, data))
        patch.setattr(affinity_tasks, "SOURCES", matrix.sources)
        patch.setattr(affinity_tasks, "TARGETS", matrix.targets)
        yield matrix, script.compare(matrix), folder


def test_every_pair_has_scores_and_estimates(done):
    _, text, folder = done
    content = json.loads((folder / "matrix.json").read_text())
    assert content["scores"]["coarse"]["8"].keys() == {"alone", "tags"}
    assert content["scores"]["tags"]["8"].keys() == {"alone", "coarse"}
    assert content["trainings"] == {"targets": 8, "sources": 4}
    assert content["estimates"]["logme"]["coarse"]["8"].keys() == {"tags"}
    assert "leep" not in content["estimates"]  # one labels texts, the other words
    assert 0 < content["copies"]["tags"]["coarse"] <= 10
    assert "| logme " in text
    assert (folder / "gains.png").stat().st_size > 1000


def test_a_missing_score_alone_is_computed_again(script, done, capsys):
    """The same score as before; all others are read."""
    matrix, text, folder = done
    before = (folder / "matrix.json").read_text()
    (folder / "scores" / "tags-8-coarse-1.json").unlink()
    capsys.readouterr()
    script.run(matrix)
    assert capsys.readouterr().out.split()[0] == "tags-8-coarse-1"
    assert json.loads((folder / "matrix.json").read_text())["scores"] == json.loads(before)["scores"]
    (folder / "matrix.json").write_text(before)
    scores = dataclasses.replace(matrix, scores=str(folder / "matrix.json"), workdir=str(folder / "again"))
    assert script.compare(scores) == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": ("coarze",)}, "unknown sources 'coarze' (did you mean 'coarse'?)"),
        ({"seeds": ()}, "give at least one of seeds"),
        ({"steps": (1, 2)}, "steps has 2 numbers; it must have one for each of sizes, 1"),
        ({"source_steps": 3}, "choose another --workdir"),
    ],
)
def test_wrong_settings(script, done, fields, message):
    with pytest.raises(UserError) as error:
        script.compare(dataclasses.replace(done[0], **fields))
    assert message in str(error.value)
