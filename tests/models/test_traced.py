"""What tracing tells about a module is found out once for all equal modules."""

import doctest

import flax.linen as nn
import pytest

from mtl_jax.models import traced


class Counted(nn.Module):
    """Counts its traces in a list that all of them share."""

    width: int
    sizes: object = ()

    @nn.compact
    def __call__(self, input_ids):
        traces.append(self.width)
        return nn.Embed(5, self.width)(input_ids)


traces: list[int] = []


@pytest.fixture(autouse=True)
def _no_traces():
    traces.clear()


@pytest.mark.parametrize("ask", [traced.shapes, traced.calls])
def test_equal_modules_are_traced_once_and_others_by_themselves(ask):
    width = 10 if ask is traced.shapes else 20
    first = ask(Counted(width))
    assert ask(Counted(width)) is first
    ask(Counted(width + 1))
    assert traces == [width, width + 1]


def test_a_module_without_a_hash_is_traced_each_time():
    unhashable = Counted(30, sizes=bytearray())
    assert traced.shapes(unhashable)[0].shape == traced.shapes(unhashable)[0].shape == (1, 1, 30)
    assert traces == [30, 30]


def test_examples():
    assert doctest.testmod(traced).failed == 0
