"""Names of labels: where they are read from, where they are shown, and what is refused."""

import json

import numpy as np
import pytest

from mtl_jax import Classification, Multilabel, Tagging
from mtl_jax.core.errors import UserError
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.tasks import label_names
from mtl_jax.training.experiment_json import tasks_from_json, tasks_to_json

NUMBERS = [Row({"text": "a", "label": str(n % 3), "labels": [str(n % 3)], "tags": [str(n % 3)]}, f"row {n}") for n in range(6)]
NAMES = {"0": "none", "1": "against", "2": "favor"}
WINDOW = Window(0, np.arange(3), None, np.array([-1, 0, -1]), None)


@pytest.fixture(params=["json", "tsv", "dict"])
def names(request, tmp_path):
    path = tmp_path / "mapping"
    if request.param == "json":
        path.write_text(json.dumps(NAMES))
    else:
        path.write_text("0\tnone\r\n1\tagainst\n\n2\tfavor")  # the last line of such files often has no end
    return NAMES if request.param == "dict" else str(path)


def test_names_are_shown_and_nothing_else_changes(names):
    plain = Classification(name="stance", source="a").filled(NUMBERS, None)
    task = Classification(name="stance", source="a", label_names=names).filled(NUMBERS, None)
    assert task.label_names == NAMES
    assert task.labels == plain.labels == ("0", "1", "2")
    assert task.parse(NUMBERS[2]) == 2
    outputs = [np.array([0.0, 3.0, 1.0])]
    assert plain.describe(outputs, [WINDOW], NUMBERS[0])["label"] == "1"
    assert task.describe(outputs, [WINDOW], NUMBERS[0])["label"] == "against"
    assert label_names.in_line(task.labels, task.shown_labels) == ["0 = none", "1 = against", "2 = favor"]
    stored = tasks_to_json([task])
    assert tasks_from_json(stored) == (task,)
    assert "label_names" not in tasks_to_json([plain])["stance"]  # as in a data.json of before


def test_labels_without_a_name_keep_theirs():
    task = Multilabel(name="m", source="a", label_names={"1": "one"}).filled(NUMBERS, None)
    assert task.describe([np.array([-1.0, 2.0, 1.0])], [WINDOW], NUMBERS[0])["labels"] == ["one", "2"]
    tagging = Tagging(name="t", source="a", label_names={"1": "one"}).filled(NUMBERS, None)
    assert tagging.describe([np.array([[0, 0, 0], [0, 2, 0], [0, 0, 0]])], [WINDOW], NUMBERS[0])["tags"] == ["one"]


def test_the_name_of_a_type_is_that_of_its_tags():
    rows = [Row({"text": "a b c", "tags": "B-P I-P O"}, "row 1")]
    task = Tagging(name="t", source="a", label_names={"P": "person", "O": "-"}).filled(rows, None)
    assert task.label_names == {"B-P": "B-person", "I-P": "I-person", "O": "-"}
    outputs = np.zeros((5, 3))
    outputs[1, task.labels.index("B-P")] = outputs[2, task.labels.index("I-P")] = outputs[3, task.labels.index("O")] = 9
    window = Window(0, np.arange(5), None, np.array([-1, 0, 1, 2, -1]), None)
    answer = task.describe([outputs], [window], rows[0])
    assert answer["tags"] == ["B-person", "I-person", "-"]
    assert answer["entities"] == [{"type": "person", "start": 0, "end": 2, "text": "a b"}]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"3": "x"}, "unknown label in label_names of task 's': '3'; choices: 0, 1, 2"),
        ({"0": "x", "1": "x"}, "label_names of task 's': the labels '0' and '1' have one name, 'x'"),
        ({"0": "1"}, "the labels '0' and '1' have one name, '1'"),
        ({0: "x"}, 'label_names of task \'s\': 0 is not a text; write names as in {"0": "anger"}'),
        ({"0": ""}, "'' is not a text"),
        ("nothing", "nothing: no such file"),
        (b"0 none\n", "mapping:1: not a label, a tab and its name"),
        (b"0\ta\n0\tb\n", "mapping:2: the label '0' has a name already, 'a'"),
        (b"0\t\xff\n", "mapping:1: not UTF-8"),
        (b'{"0": 1}', "not an object of labels and names"),
        (b'{"0": ', "not JSON"),
    ],
)
def test_what_is_refused(names, message, tmp_path):
    if isinstance(names, bytes):
        (tmp_path / "mapping").write_bytes(names)
        names = str(tmp_path / "mapping")
    with pytest.raises(UserError, match=message):
        Classification(name="s", source="a", label_names=names).filled(NUMBERS, None)
