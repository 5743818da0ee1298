import pytest

from mtl_jax.core.errors import UserError
from mtl_jax.merging.method import Method, checked

TWO = ("a", "b")


def test_defaults_are_filled_in():
    assert checked(Method("ties"), TWO, "base").describe() == {"name": "ties", "keep": 0.2, "scale": (1.0,)}
    assert checked(Method("dare_ties", drop=0.5), TWO, "base").describe() == {
        "name": "dare_ties",
        "drop": 0.5,
        "keep": 0.2,
        "scale": (1.0,),
        "seed": 0,
    }
    assert checked(Method("wise"), ("a",), "base").alpha == 0.5
    assert checked(Method("arithmetic", scale=(-1.0,)), ("a",), "base").scale == (-1.0,)
    assert checked(Method("soup"), TWO, "").describe() == {"name": "soup"}


@pytest.mark.parametrize(
    ("method", "sources", "base", "message"),
    [
        (Method("tiees"), TWO, "", "unknown method 'tiees' .did you mean 'ties'"),
        (Method("soup", weights=(1.0, 2.0)), TWO, "", "method soup has no weights; that is for average"),
        (Method("soup", keep=0.2), TWO, "", "method soup has no keep; that is for ties, dare_ties"),
        (Method("ties", drop=0.2), TWO, "base", "method ties has no drop; that is for dare, dare_ties"),
        (Method("soup"), ("a", "a"), "", "a is given twice; each source counts once"),
        (Method("soup"), ("a",), "", "method soup needs at least two sources, not 1"),
        (Method("greedy"), ("a",), "", "method greedy needs at least two sources, not 1"),
        (Method("average", weights=(1.0,)), ("a",), "", "method average needs at least two sources"),
        (Method("ties"), ("a",), "base", "method ties needs at least two sources, not 1"),
        (Method("wise"), TWO, "base", "method wise is for the base and one source, not 2; merge several first, by soup"),
        (Method("arithmetic"), (), "base", "no source given"),
        (Method("soup"), TWO, "base", "method soup has no base; leave --base out"),
        (Method("wise"), ("a",), "", "method wise needs --base: the run or checkpoint that the sources started from"),
        (Method("dare"), TWO, "", "method dare needs --base"),
        (Method("average"), TWO, "", "method average needs --weights, one for each source"),
        (Method("average", weights=(1.0,)), TWO, "", "weights are 1: one for each of the 2 models is needed"),
        (Method("wise", alpha=1.5), ("a",), "base", "alpha is 1.5; it must be from 0 to 1 .task arithmetic"),
        (Method("ties", keep=0.0), TWO, "base", "keep is 0; it is the share that is kept"),
        (Method("dare", drop=1.0), TWO, "base", "drop is 1; it is the share that is dropped"),
        (Method("dare", seed=-1), TWO, "base", "seed is -1; it must not be negative"),
        (Method("arithmetic", scale=(1.0, 2.0, 3.0)), TWO, "base", "scale is 1 2 3: give one number, or one for each of the 2"),
        (Method("ties", scale=(1.0, 2.0)), TWO, "base", "scale is 1 2: give one number"),
        (Method("arithmetic", scale=(float("inf"),)), TWO, "base", "scale is inf; it must be finite"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(method, sources, base, message):
    with pytest.raises(UserError, match=message):
        checked(method, sources, base)
