"""The conflicts of task gradients over time, and the section on which tasks help which."""

import json

import made
import numpy as np
import pytest

from mtl_jax import UserError, reporting
from mtl_jax.reporting import affinity_section, heat_maps, read, render, statistics
from mtl_jax.reporting.series import of_records

ESTIMATES = {
    "rankings": {
        "movies": {
            "leep": [{"source": "sms", "value": -0.5}, {"source": "tweets", "value": -0.9}, {"source": "news", "value": -1.0}],
            "logme": [{"source": "sms", "value": 2.0}, {"source": "news", "value": 1.0}, {"source": "tweets", "value": 0.5}],
        },
        "sms": {"leep": [{"source": "tweets", "value": -0.5}]},
    },
    "places": {"movies": {"sms": 0.0, "tweets": 0.75, "news": 0.75}, "sms": {"tweets": 0.0}},
    "seconds": {"features": 3.0, "leep": 1.5},
    "advice": {"movies": {"source": "sms", "way": "joint", "target": "movies"}},
    "copies": {"movies": {"tweets": {"rows": {"exact": 2, "letters": 0, "near": 1}, "of": 40, "same_rows": False}}},
}


def with_cosines(folder, **changes):
    """A run of two tasks in ten steps; in the second, one of them has no examples."""
    made.write_run(folder, {"values": {"weighting": "pcgrad", "seed": 0}, "status": "done"}, steps=10, **changes)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in lines:
        if record["kind"] == "train":
            tasks = sorted(made.TASKS)[: 2 if record["step"] == 2 else 3]
            record |= {f"gradient_norm/{task}": 1.0 for task in tasks}
            cosines = np.full((3, 3), 0.1 * record["step"])
            cosines[0, 2] = -0.5
            record["cosines"] = cosines[: len(tasks), : len(tasks)].tolist()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    return folder


def test_a_cosine_is_a_curve_for_each_pair_that_has_examples(tmp_path):
    study = read([with_cosines(tmp_path / "a")])
    curves = study.runs[0].curves
    pairs = {name.removeprefix("cosine/") for name in curves if name.startswith("cosine/")}
    assert pairs == {"movies/sms", "movies/tweets", "sms/tweets"}
    assert curves["cosine/movies/sms"].values_N.tolist() == pytest.approx([0.1 * step for step in range(1, 11)])
    assert curves["cosine/sms/tweets"].steps_N.tolist() == [1, *range(3, 11)]
    [figure] = heat_maps.conflicts(study, statistics.groups(study))
    assert len(figure.panels) == 1
    text = render.svg(figure.panels[0], "p")
    assert text.index("movies - tweets") < text.index("movies - sms")  # they agree least
    assert "<image" not in text  # the page loads nothing
    assert of_records([{"kind": "train", "step": 1, "cosines": [[1.0]], "gradient_norm/a": 1.0}], {"a": "accuracy"}, 1) == {}


def test_the_page_has_the_estimates(tmp_path):
    file = tmp_path / "affinity.json"
    file.write_text(json.dumps(ESTIMATES))
    page = reporting.report(with_cosines(tmp_path / "a"), output=tmp_path / "report", affinity=file).read_text()
    for text in ("Which tasks help which", "Conflicts of task gradients over time", "Rank correlation of", "3 of 40"):
        assert text in page
    assert (tmp_path / "report" / "figures" / "affinity.png").stat().st_size > 1000
    names, agreement = affinity_section._agreement(ESTIMATES)
    assert names == ["leep", "logme"]
    assert agreement.tolist() == [[pytest.approx(1), pytest.approx(0.5)], [pytest.approx(0.5), pytest.approx(1)]]
    parts = affinity_section.section(ESTIMATES, read([tmp_path / "a"])).parts
    [table] = [part for part in parts if getattr(part, "name", "") == "Costs"]
    assert [row[0].text for row in table.rows] == ["features", "leep", "all"]
    assert table.rows[2][1].text == "4.5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "it cannot be read"),
        ("{", "it is not JSON"),
        ('{"rankings": {}}', "places is missing; give a file that mtl-jax affinity --json wrote"),
    ],
)
def test_another_file_is_refused(tmp_path, text, message):
    file = tmp_path / "file.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        reporting.write(tmp_path / "nowhere", tmp_path / "out", affinity=file)
