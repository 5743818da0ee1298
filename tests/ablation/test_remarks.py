"""Where weights change nothing, the ablation says so, and only there."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import tiny

from mtl_jax import L2SP, Optimizer, ParamRule, Phase
from mtl_jax.ablation import plan, space
from mtl_jax.ablation.remarks import weights_do_nothing
from mtl_jax.reporting import sections
from mtl_jax.reporting.study import Study
from mtl_jax.transfer import freezing
from mtl_jax.transfer import optimizer as optimizers

ONES = {"rating": 1.0, "coarse": 1.0, "fine": 1.0}
ADAM = Optimizer(clip_norm=0.0)
HEADS = (Phase("heads", steps=6, rules=tiny.HEADS_ONLY),)
SAME = (
    "no parameter that tasks share is trained, and Adam divides a constant weight out of a head's gradient again: points that "
    "differ only in weights are equal"
)
PLAIN = (
    "no parameter that tasks share is trained, and heads follow their plain losses: points that differ only in weights are "
    "equal"
)


def remark(*vary, trunk=False, **changes):
    """Of the first program; as prepare() would have it, with phases that train the trunk or do not."""
    experiment = tiny.experiment("no/bert", "no/data", **{"phases": HEADS, "optimizer": ADAM} | changes)
    (program, *_) = plan.programs(plan.runs(experiment, space.axes(experiment, vary or ("weights=1/1/1,0.2/0.3/0.5",))))
    plans = [
        SimpleNamespace(phase=p, mask={"trunk": {"k": trunk}}, regularisers=experiment.regularisers) for p in experiment.phases
    ]
    return weights_do_nothing(program, plans)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, SAME),
        ({"optimizer": dataclasses.replace(ADAM, name="adam")}, SAME),
        ({"optimizer": dataclasses.replace(ADAM, weight_decay=0.5)}, SAME),  # decoupled
        ({"optimizer": Optimizer()}, f"{SAME}, except for the effect of clipping at norm 1"),
        ({"combinators": ("normalized",)}, SAME),
        ({"weigh_heads": False, "optimizer": Optimizer(name="sgd")}, PLAIN),
        ({"phases": (Phase("a", 2, rules=tiny.HEADS_ONLY), Phase("b", 2, rules=tiny.HEADS_ONLY))}, SAME),
    ],
)
def test_where_weights_change_nothing_it_is_said(changes, expected):
    assert remark(**changes) == expected


def test_heads_whose_weight_is_0_do_not_train():
    assert remark("weights=1/1/0,1/0.5/0.5") == f"{SAME}, except for heads whose weight is 0"
    both = remark("weights=1/1/0,1/0.5/0.5", optimizer=Optimizer())
    assert both == f"{SAME}, except for the effect of clipping at norm 1 and heads whose weight is 0"


@pytest.mark.parametrize(
    ("vary", "changes"),
    [
        ((), {"trunk": True}),
        ((), {"optimizer": dataclasses.replace(ADAM, name="sgd")}),
        ((), {"optimizer": dataclasses.replace(ADAM, eps=1e-3)}),
        ((), {"regularisers": (L2SP(name="start", weight=0.1),)}),
        (("optimizer.learning-rate=1e-3,1e-2",), {}),  # the weights do not vary
        (("weights.fine=linear_schedule(1.0, 0.1, 6),1.0",), {"weighting": "scheduled", "weights": ONES}),
        (("phases.heads.weights=1/1/1,2/1/1",), {"phases": (*HEADS, Phase("more", 2, rules=tiny.HEADS_ONLY, weights=ONES))}),
    ],
)
def test_elsewhere_nothing_is_said(vary, changes):
    assert remark(*vary, **changes) == ""


def after(weight, config):
    """Two heads after some steps, one of them with a weight."""
    params = {"heads": {"a": {"kernel": np.ones((2, 2), np.float32)}, "b": {"kernel": np.ones((2, 2), np.float32)}}}
    optimizer = optimizers.build(config, freezing.decide(params, (ParamRule(".*"),)), 0.1, 5)
    state = optimizer.init(params)
    for step in range(5):
        gradient = 0.3 * (1 + step % 3) * np.cos(np.arange(4, dtype=np.float32).reshape(2, 2) + step)
        gradients = {"heads": {"a": {"kernel": weight * gradient}, "b": {"kernel": gradient}}}
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


@pytest.mark.parametrize(
    ("config", "alike"),
    [
        (ADAM, True),
        (dataclasses.replace(ADAM, weight_decay=0.5), True),
        (Optimizer(clip_norm=1.0), False),
        (dataclasses.replace(ADAM, name="sgd"), False),
    ],
)
def test_what_is_said_is_so(config, alike):
    assert np.allclose(after(0.1, config), after(1.0, config), atol=1e-5) == alike


def test_the_page_says_it():
    programs = ({"program": 0, "remark": SAME, "runs": 2}, {"program": 1, "runs": 2})
    study = Study("name", "", ("weights",), {}, "mean", (), programs, "", {})
    assert f"Program 0: {SAME}." in sections._settings(study, ()).parts
