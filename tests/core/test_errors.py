"""Lists in error lines are cut to ten and a number, everywhere."""

import ast
from pathlib import Path

import pytest

import mtl_jax
from mtl_jax.core.errors import listed, unknown

PACKAGE = Path(mtl_jax.__file__).parent
# Lists of ours with a known end, or that are cut where they are made; and codes, all of which are needed to choose one.
SHORT = {
    ("inference/generate_texts.py", "languages"),
    ("tasks/seq2seq.py", "choices"),
    ("training/workdir.py", "changed[:5]"),
    ("training/restore.py", "separate"),
    ("inference/answer_rows.py", "names"),
    ("pretrained/locate.py", "VOCABULARIES"),
    ("pretrained/tensor_files.py", "DTYPES"),
    ("data/splits.py", "NAMED"),
    ("merging/__init__.py", "others[:3]"),
    ("merging/method.py", "used"),
    ("transfer/adapters/adapted.py", "sharing[:2]"),
}


def joined(path):
    """What is joined by commas inside of an error that a module makes: the sources of the expressions."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in (
            "UserError",
            "ValueError",
            "WrongField",
            "UnreadableTexts",
        ):
            for node in ast.walk(call):
                join = node.func if isinstance(node, ast.Call) else None
                if isinstance(join, ast.Attribute) and isinstance(join.value, ast.Constant) and join.value.value == ", ":
                    yield ast.unparse(node.args[0])


def test_errors_list_names_by_listed():
    found = {(str(path.relative_to(PACKAGE)), what) for path in PACKAGE.rglob("*.py") for what in joined(path)}
    assert found <= SHORT


@pytest.mark.parametrize("count", [0, 1, 10, 11, 20_000])
def test_a_list_of_any_length_is_short(count):
    line = listed(f"name {n}" for n in range(count))
    assert line.count(",") == max(min(count, 10) - 1, 0)
    assert line.endswith(f" and {count - 10} more") == (count > 10)
    assert len(str(unknown("name", "x" * 5000, ["y" * 5000] * count))) < 2000
