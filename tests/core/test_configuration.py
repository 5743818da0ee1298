"""A wrong field of a configuration is one line that names it."""

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
import typing

import pytest

import mtl_jax
from mtl_jax import Batching, Classification, Experiment, Phase, Source, UserError
from mtl_jax.core import configuration, parts
from mtl_jax.core.errors import nearest
from mtl_jax.data import Augmentation, RowEdit
from mtl_jax.decoding import GenerationConfig
from mtl_jax.merging.method import Method
from mtl_jax.models.encoder import EncoderConfig
from mtl_jax.models.seq2seq_layers import Seq2SeqConfig
from mtl_jax.pretrained.text_classifier import FamilyClassifier
from mtl_jax.sharing import Hard, Sharing
from mtl_jax.tasks import Task
from mtl_jax.transfer.adapters import Adapter
from mtl_jax.transfer.regularisers import Regulariser
from mtl_jax.trunks import TrunkConfig

PUBLIC = [getattr(mtl_jax, name) for name in mtl_jax.__all__]
KINDS = [kind for kind in PUBLIC if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
KINDS += [GenerationConfig, Method]
DOORS = (Task, TrunkConfig, Sharing, Adapter, Regulariser, RowEdit, Augmentation)
OTHERS = [getattr(package, name) for package in (mtl_jax.augment, mtl_jax.sharing) for name in package.__all__]
CLASSES = [kind for kind in OTHERS if isinstance(kind, type) and issubclass(kind, configuration.Configuration)]
WITH_FIELDS = [kind for kind in CLASSES if dataclasses.fields(kind)]
KINDS += [kind for kind in WITH_FIELDS if not inspect.isabstract(kind)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_configuration_names_a_wrong_field_and_the_nearest(kind):
    field = dataclasses.fields(kind)[-1].name
    with pytest.raises(UserError) as caught:
        kind(**{f"{field}x": 1})
    assert isinstance(caught.value, TypeError)  # who catches what Python raises for such a call still does
    assert f"unknown field of {kind.__name__}: '{field}x' (did you mean {field!r}?); choices: " in str(caught.value)
    assert "\n" not in str(caught.value)


def reached(hint):
    """The dataclasses that a type hint mentions, and those that they mention; of a door, its kinds."""
    if hint in DOORS:
        yield from (kind for name in parts.kinds(hint) for kind in reached(parts.kinds(hint)[name]) if hint is not kind)
        return
    if dataclasses.is_dataclass(hint):
        yield hint
        for field in typing.get_type_hints(hint).values():
            yield from reached(field)
    for part in typing.get_args(hint):
        yield from reached(part)


def test_an_experiment_is_made_of_nothing_else():
    sizes = {Seq2SeqConfig, EncoderConfig, FamilyClassifier}  # which tasks fill in from the trunk: no script writes them
    kinds = {kind for kind in reached(Experiment) if parts.origin_of(kind) is None} - sizes
    assert len(kinds) > 20
    assert kinds - {Hard} <= set(KINDS)  # which has no field


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Source("a", "b", text_pair="x"), r"field of Source 'a': 'text_pair' \(did you mean 'pair'\?\)"),
        (lambda: Source(name="a", path="b", text="c", txt="d"), "'txt'; choices"),  # text is given already
        (lambda: Phase("all", 3, lr=0.1), r"field of Phase 'all': 'lr' \(did you mean 'learning_rate'\?\)"),
        (lambda: dataclasses.replace(Batching(), row=3), r"'row' \(did you mean 'rows'\?\)"),
        (lambda: Source(path="a"), "Source needs the field name$"),
        (lambda: Classification(labels=("a",)), "Classification needs the fields name, source$"),
    ],
)
def test_wrong_and_missing_fields(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    "make", [lambda: Phase("all", 1, 2, 3, 4, 5, 6, 7, 8, 9), lambda: Source("a", "b", name="c"), lambda: Source()]
)
def test_other_mistakes_stay_as_python_says_them(make):
    with pytest.raises(TypeError) as caught:
        make()
    assert not isinstance(caught.value, UserError)


def test_copies_and_pickles():
    source = Source("a", "b", pair="c")
    assert pickle.loads(pickle.dumps(source)) == copy.deepcopy(source) == dataclasses.replace(source) == source


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("text_pair", "pair"),
        ("label_column", "column"),
        ("column_name", "column"),
        ("colunm", "column"),
        ("steps", "step"),
        ("lr", "learning_rate"),
        ("nothing", ""),
    ],
)
def test_the_nearest_name(name, meant):
    assert nearest(name, ["text", "pair", "column", "step", "learning_rate"]) == meant


def test_a_user_error_that_nothing_catches_is_one_line(capsys, monkeypatch):
    monkeypatch.delattr(sys, "ps1", raising=False)
    before = []
    show = configuration._hook(lambda *error: before.append(error))
    with pytest.raises(SystemExit) as ended:
        show(UserError, UserError("a field is wrong"), None)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: a field is wrong\n"
    other = (ValueError, ValueError("a fault"), None)
    show(*other)
    assert before == [other]
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    show(UserError, UserError("at the prompt"), None)
    assert capsys.readouterr().err == "error: at the prompt\n"


@pytest.mark.long
def test_a_script_ends_with_one_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text('from mtl_jax import Source\n\nSource(name="a", path="b", text_pair="c")\n', encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown field of Source 'a': 'text_pair' (did you mean 'pair'?)")
    assert done.stderr.count("\n") == 1
