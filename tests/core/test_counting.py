"""Numbers of things in words: one thing has no plural."""

import ast
import re
from pathlib import Path

import pytest

from mtl_jax.core.errors import count, there_are

NOUNS = "columns|files|labels|layers|lines|rows|runs|seeds|settings|sources|steps|tags|tasks|texts|tokens|words"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("number", "nouns", "text"),
    [
        (0, ("run",), "0 runs"),
        (1, ("run",), "1 run"),
        (2, ("run",), "2 runs"),
        (1200, ("parameter",), "1,200 parameters"),
        (1, ("process", "processes"), "1 process"),
        (3, ("row has", "rows have"), "3 rows have"),
    ],
)
def test_a_number_and_its_noun(number, nouns, text):
    assert count(number, *nouns) == text
    assert there_are(number, *nouns) == f"there {'is' if number == 1 else 'are'} {text}"


def lengths(text: str) -> list[str]:
    """The formatted strings of a module in which a length comes before a plural."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            for value, after in zip(node.values, node.values[1:], strict=False):
                if not isinstance(value, ast.FormattedValue) or not isinstance(after, ast.Constant):
                    continue
                written = ast.unparse(value.value)
                if re.match(r"len\(|sum\(", written) and re.match(rf" (\w+ )?({NOUNS})\b", after.value):
                    found.append(f"{{{written}}}{after.value}")
    return found


def test_no_message_counts_without_it():
    assert lengths("f'{len(a)} long texts'") == ["{len(a)} long texts"]
    modules = [path for part in ("mtl_jax", "experiments", "benchmarks") for path in (ROOT / part).rglob("*.py")]
    assert {str(path.relative_to(ROOT)): found for path in modules if (found := lengths(path.read_text("utf-8")))} == {}
