"""Whether a task's weight reaches its head: each rule says it, its docstring and the guide say the same."""

import dataclasses
import json
import re
from pathlib import Path

import every_rule
import pytest
import tiny

from mtl_jax import weighting
from mtl_jax.ablation import ablation_dir
from mtl_jax.core.errors import UserError
from mtl_jax.experiment import keep_head_weights, rule_of, weighs_heads
from mtl_jax.experiment_checks import check
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.experiment_json import from_json, to_json
from mtl_jax.weighting import COMBINATORS, RULES

# As in LibMTL, and for rules that it does not have as in their papers or in TorchJD.
PLAIN = {
    *("mgda", "pcgrad", "gradvac", "cagrad", "aligned", "moco", "sdmgrad", "gradnorm", "imtl_g", "db_mtl", "graddrop"),
    *("upgrad", "dualproj", "config", "krum", "gcs", "pcd", "modo", "trimmed_mean"),
}
GUIDE = Path(__file__).parents[2] / "docs" / "weighting.md"


def made(name):
    return every_rule.make(name, "abc")


@pytest.mark.parametrize("name", RULES)
def test_a_rule_and_its_docstring_say_how_heads_are_trained(name):
    said = " ".join((RULES[name].__doc__ or "").split())
    assert made(name).weighs_heads == (name not in PLAIN)
    assert ("Heads follow their plain losses" in said) == (name in PLAIN)
    assert ("Heads are weighted" in said) == (name not in PLAIN)


def test_the_guide_lists_every_rule_once():
    rows = re.findall(r"^\| (weighted|plain) \| (.*?) \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    listed = [(name, heads) for heads, names in rows for name in re.findall(r"`(\w+)`", names)]
    assert sorted(listed) == sorted((name, "plain" if name in PLAIN else "weighted") for name in RULES)


@pytest.mark.parametrize("name", COMBINATORS)
def test_combinators_leave_the_heads_to_the_rule(name):
    text = {"every": "every:k=2", "subset": "subset:s=1"}.get(name, name)
    assert not weighting.combine(weighting.mgda(), text).weighs_heads
    assert weighting.combine(weighting.nash(), text).weighs_heads


def test_a_rule_of_ones_own_weighs_heads_unless_it_says_otherwise():
    assert weighting.Rule(init=tuple, update=lambda state, signals: ({}, state)).weighs_heads


@pytest.mark.parametrize(
    ("setting", "name", "expected"),
    [("rule", "mgda", False), ("rule", "nash", True), (True, "mgda", True), (False, "nash", False)],
)
def test_an_experiment_may_say_otherwise(setting, name, expected):
    experiment = tiny.experiment("bert", "data", weighting=name, weigh_heads=setting)
    check(experiment)
    assert weighs_heads(experiment, rule_of(experiment, experiment.phases[0])) is expected


@pytest.mark.parametrize("setting", ["sometimes", 1, None])
def test_another_word_is_refused(setting):
    with pytest.raises(UserError, match=f"weigh_heads is {setting!r}; it must be true, false or rule"):
        check(tiny.experiment("bert", "data", weigh_heads=setting))


@pytest.mark.parametrize("setting", [True, False, "rule"])
def test_the_setting_is_kept_in_a_workdir(setting):
    written = json.dumps(to_json(tiny.experiment("bert", "data", weigh_heads=setting)))
    opened = from_json(json.loads(written)).weigh_heads
    assert (opened, type(opened)) == (setting, type(setting))


@pytest.mark.parametrize("name", ["equal", "mgda"])
def test_a_workdir_of_an_earlier_version_resumes_unchanged(tmp_path, caplog, name):
    """Its configuration says true, which was the default; the same script now says rule. Only mgda makes a difference."""
    caplog.set_level("INFO", logger="mtl_jax")
    experiment = tiny.experiment("bert", "data", weighting=name)
    stored = to_json(dataclasses.replace(experiment, weigh_heads=True))
    workdirs.write_json(tmp_path / "config.json", stored)
    resumed = keep_head_weights(experiment, stored)
    assert resumed.weigh_heads is True
    assert not workdirs.config_changed(tmp_path, to_json(resumed), allow_change=False)
    assert ("its heads keep their weighted gradients" in caplog.text) == (name == "mgda")


@pytest.mark.parametrize(
    ("stored", "setting"), [("rule", "rule"), (False, "rule"), (True, False), (True, True), (None, "rule")]
)
def test_other_workdirs_are_not_reinterpreted(stored, setting):
    experiment = tiny.experiment("bert", "data", weighting="mgda", weigh_heads=setting)
    config = None if stored is None else to_json(dataclasses.replace(experiment, weigh_heads=stored))
    assert keep_head_weights(experiment, config) == experiment


@pytest.mark.parametrize("kept", [True, "rule"])
def test_an_ablation_of_an_earlier_version_resumes_unchanged(tmp_path, kept):
    experiment = tiny.experiment("bert", "data", weighting="mgda")
    (tmp_path / "runs" / "0000").mkdir(parents=True)
    assert ablation_dir.keep_head_weights_of_runs(tmp_path, experiment) == experiment
    run = {"run": "0000", "values": {}, "program": 0, "status": "waiting"}
    workdirs.write_json(tmp_path / "ablation.json", {"name": "tiny", "runs": [run], "axes": [], "programs": [{}]})
    workdirs.write_json(tmp_path / "runs" / "0000" / "config.json", to_json(dataclasses.replace(experiment, weigh_heads=kept)))
    assert ablation_dir.keep_head_weights_of_runs(tmp_path, experiment).weigh_heads == kept
