"""What README and docs show is there."""

import inspect
import json
import operator
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jitted import apply

import mtl_jax
from mtl_jax import Experiment, UserError
from mtl_jax.data import corpus
from mtl_jax.experiment import select
from mtl_jax.inference import answer_rows
from mtl_jax.pretrained import load_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


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
    """Or in another guide; index.md is the front page of the site."""
    for page in PAGES[1:]:
        assert (
            any(f"{page.name})" in other.read_text(encoding="utf-8") for other in PAGES if other != page)
            or page.name == "index.md"
        )


def test_the_whole_script_is_an_experiment():
    (script,) = re.findall(
        r"^```python\n(from mtl_jax import.*?)^```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    names = {"__name__": "two_tasks"}
    exec(compile(script, "README.md", "exec"), names)
    experiment = names["EXPERIMENT"]
    assert isinstance(experiment, Experiment)
    assert [task.name for task in select(experiment).tasks] == ["spam", "type"]


def test_the_pairs_of_the_guide_are_read_and_predicted(shallow, tmp_path, monkeypatch):
    """The example of Source.pair, with rows as its comment shows them."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(from mtl_jax import Classification, Source.*?)^```", page, re.DOTALL | re.MULTILINE)
    row = json.loads(re.search(r"# (\{.*\})", script).group(1))
    names = {}
    exec(compile(script, "data.md", "exec"), names)
    source, task = names["PAIRS"], names["FOLLOWS"]
    rows = [row | {"premise": f"the film was {n}", "verdict": "yes" if n % 2 else "no"} for n in range(80)]
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    monkeypatch.setenv("MTL_JAX_DATA", str(tmp_path))
    read = corpus.read_sources([source], [task])
    found = corpus.make_corpus([source], [task], read, load_tokenizer(shallow), 24)
    assert found.tasks[0].labels == ("no", "yes")
    assert answer_rows.row_of(source, row, 1, False).columns == row
    with pytest.raises(UserError, match=r"'hypothesis' is missing.*: --text gives one .* \{.premise.: .*, .hypothesis.: "):
        answer_rows.row_of(source, "A man sleeps.", 1, False)


def test_the_loop_of_ones_own_runs(bert):
    """Every block of the page, one after another, as a reader types them."""
    page = (ROOT / "docs" / "own_loop.md").read_text(encoding="utf-8")
    names = {"CHECKPOINT": str(bert)}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(compile(block, "own_loop.md", "exec"), names)
    assert names["weights"].keys() == {"sentiment", "length"}
    assert len(names["frozen"]) == 5  # the embeddings: three tables, and their norm
    plain = apply(names["trunk"], names["params"]["trunk"], names["ids"], names["mask"]).hidden
    np.testing.assert_allclose(names["hidden"], plain, atol=1e-5)
    packages = "weighting|transfer|pretrained|decoding|affinity|audit|augment"
    named = re.findall(rf"`(?:mtl_jax\.)?((?:{packages})\.[\w.]+)", page)
    for path in named:
        assert operator.attrgetter(path)(mtl_jax)


def test_the_table_of_functions_is_whole():
    """Functions of experiments, phases, names and workdirs are not for a loop of one's own."""
    page = (ROOT / "docs" / "own_loop.md").read_text(encoding="utf-8").partition("\n## Everything that works")[2]
    of_experiments = {
        "name_of",
        "required_options",
        "takes_weights",
        "probe_then_finetune",
        "self_training",
        "setfit",
        "unfreezing",
    }
    of_experiments |= {"resolve", "require_seq2seq", "require_generator", "fit_to_model"}
    for package in (mtl_jax.weighting, mtl_jax.transfer, mtl_jax.decoding, mtl_jax.pretrained):
        rules = {**mtl_jax.weighting.RULES, **mtl_jax.weighting.COMBINATORS}
        for name in set(dir(package)) - of_experiments - rules.keys():
            if inspect.isfunction(getattr(package, name)) and not name.startswith(("_", "register")):
                assert re.search(rf"\b{name}\b", page), name


@pytest.mark.long
def test_the_tutorial_as_it_stands(wheels, tmp_path):
    """Every command of the page, typed one after another in a folder with this environment as .venv."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    outputs = []
    for block in re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        done = subprocess.run(["bash", "-ec", block], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"
        outputs.append(done.stdout)
    text = "\n".join(outputs)
    assert '"label": "spam"' in text
    assert re.search(r"\| spam +\| accuracy +\| 0\.\d{4} ± 0\.0000 +\| 0\.9\d{3} ± ", text)
    assert (tmp_path / "runs" / "weights" / "report.html").exists()
    assert json.loads((tmp_path / "runs" / "largest" / "config.json").read_text())["parts"]["largest"]["file"] == "my_rule.py"
