"""What README and docs show is there."""

import re
from pathlib import Path

import pytest

from mtl_jax import Experiment
from mtl_jax.experiment import select

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if not re.match(r"https?:", target):
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def test_every_guide_is_in_the_readme():
    readme = PAGES[0].read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert page.name in readme or any(f"({page.name})" in other.read_text(encoding="utf-8") for other in PAGES[1:]), page


def test_the_whole_script_is_an_experiment():
    (script,) = re.findall(
        r"^```python\n(from mtl_jax import.*?)^```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    names = {"__name__": "two_tasks"}
    exec(compile(script, "README.md", "exec"), names)
    experiment = names["EXPERIMENT"]
    assert isinstance(experiment, Experiment)
    assert [task.name for task in select(experiment).tasks] == ["spam", "type"]
