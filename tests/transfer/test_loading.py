"""Which parameters of a source go where: names alone, on small trees."""

import numpy as np
import pytest

from mtl_jax.core.errors import UserError
from mtl_jax.transfer import loading
from mtl_jax.transfer.loading import InitFrom, load_into

HERE = {
    "trunk": {"layer_0": {"kernel": np.zeros((2, 3), np.float32)}, "layer_1": {"kernel": np.zeros((2, 3), np.float32)}},
    "heads": {"new": {"bias": np.zeros(4, np.float32)}},
}
SOURCE = {
    "trunk/layer_0/kernel": np.full((2, 3), 1.0, np.float32),
    "trunk/layer_1/kernel": np.full((2, 3), 2.0, np.float16),
    "heads/old/bias": np.full(4, 3.0, np.float32),
}


def test_the_same_names_go_to_the_same_places():
    params, account = load_into(HERE, SOURCE, InitFrom("x"))
    assert (params["trunk"]["layer_0"]["kernel"] == 1).all()
    assert (params["trunk"]["layer_1"]["kernel"] == 2).all()
    assert params["trunk"]["layer_1"]["kernel"].dtype == np.float32
    assert params["heads"]["new"]["bias"] is HERE["heads"]["new"]["bias"]
    assert account == (
        {"trunk/layer_0/kernel": "trunk/layer_0/kernel", "trunk/layer_1/kernel": "trunk/layer_1/kernel"},
        ("heads/new/bias",),
        (),
        ("heads/old/bias",),
        (),  # nothing starts as a part of the trunk
    )
    assert not HERE["trunk"]["layer_0"]["kernel"].any()  # not in place


@pytest.mark.parametrize(
    ("init", "loaded"),
    [
        (InitFrom("x", subtree="heads/old", into="heads/new"), {"heads/new/bias": "heads/old/bias"}),
        (InitFrom("x", subtree="heads/old/bias", into="heads/new/bias"), {"heads/new/bias": "heads/old/bias"}),
        (InitFrom("x", renames=(("old", "new"),), leave_out=("trunk/.*",)), {"heads/new/bias": "heads/old/bias"}),
        (
            InitFrom("x", subtree="trunk", renames=((r"layer_0/", "layer_9/"), ("layer_1", "layer_0"), ("layer_9", "layer_1"))),
            {"trunk/layer_0/kernel": "trunk/layer_1/kernel", "trunk/layer_1/kernel": "trunk/layer_0/kernel"},
        ),
        (InitFrom("x", renames=((r"layer_(\d)", r"layer_\1"),)), None),
        (InitFrom("x", subtree="trunk/layer_0"), {"trunk/layer_0/kernel": "trunk/layer_0/kernel"}),
    ],
)
def test_subtrees_renames_and_what_is_left_out(init, loaded):
    if loaded is None:
        with pytest.raises(UserError, match="changes no path"):
            load_into(HERE, SOURCE, init)
        return
    params, account = load_into(HERE, SOURCE, init)
    assert account.loaded == loaded
    here = {"trunk/layer_0/kernel", "trunk/layer_1/kernel", "heads/new/bias"}
    assert set(account.initialised) == here - set(loaded)
    assert set(account.left_out) | set(account.without_place) == set(SOURCE) - set(loaded.values())  # every one is somewhere
    for path, old in loaded.items():
        leaf = params
        for name in path.split("/"):
            leaf = leaf[name]
        np.testing.assert_array_equal(leaf, SOURCE[old])


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (InitFrom("x", subtree="trunc"), r"init_from.subtree: x has nothing at 'trunc'; there are heads/old, trunk"),
        (
            InitFrom("x", leave_out=("trunk",)),
            r"leave_out: 'trunk' matches no path; they look like trunk/layer_0/kernel",
        ),
        (
            InitFrom("x", renames=(("layer_0", "layer_1"),)),
            r"layer_0/kernel and trunk/layer_1/kernel of x would both become",
        ),
        (InitFrom("x", subtree="heads"), "nothing of x has a place here; its paths look like trunk/layer_0/kernel"),
        (InitFrom("x", into="deep"), "nothing of x has a place here"),
    ],
)
def test_what_does_not_fit(init, message):
    with pytest.raises(UserError, match=message):
        load_into(HERE, SOURCE, init)


def test_both_shapes_are_named():
    wide = SOURCE | {"trunk/layer_1/kernel": np.zeros((2, 5), np.float32)}
    with pytest.raises(UserError, match=r"trunk/layer_1/kernel is 2x3 here and 2x5 in x \(trunk/layer_1/kernel\)"):
        load_into(HERE, wide, InitFrom("x"))
    _, account = load_into(HERE, wide, InitFrom("x", leave_out=("trunk/layer_1/.*",)))
    assert account.left_out == ("trunk/layer_1/kernel",)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (InitFrom(subtree="trunk"), "init_from.subtree is given, but init_from.path is not"),
        (InitFrom("x", step="-3"), "init_from.step is '-3'; it must be best, last, or the number of a step"),
        (InitFrom("x", leave_out=("(",)), r"init_from.leave_out: '\(' is not a regular expression"),
        (InitFrom("x", renames=(("a", r"\1"),)), r"init_from.renames: .* cannot take the place of 'a'"),
    ],
)
def test_fields_that_make_no_sense(init, message):
    with pytest.raises(UserError, match=message):
        loading.check(init)
