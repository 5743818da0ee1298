"""The figure of a run."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from mtl_jax.core import plotting


@pytest.fixture
def axes(monkeypatch, tmp_path):
    """Draws the figure of a run; returns its axes: loss, dev, weight."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))

    def axes(records, tasks=("a", "b", "c")):
        plotting.curves(records, [(task, "f1") for task in tasks], tmp_path / "curves.png")
        return drawn[-1].axes

    return axes


def train(steps, losses, weights=(1.0, 1.0, 1.0)):
    return [
        {"kind": "train", "step": step, "phase": 0}
        | {f"loss/{task}": loss / step for task, loss in zip("abc", losses, strict=True)}
        | {f"weight/{task}": weight for task, weight in zip("abc", weights, strict=True)}
        for step in steps
    ]


def dev(steps):
    return [{"kind": "dev", "step": step, "a/f1": 0.5, "b/f1": 0.5, "c/f1": 0.1 * step} for step in steps]


def test_one_step_is_a_point(axes):
    for axis in axes(train([1], (1.0, 2.0, 3.0)) + dev([1])):
        assert len(axis.lines) == 3
        assert all(line.get_marker() == "o" for line in axis.lines)


def test_lines_that_hide_each_other_are_dashed_in_turns(axes):
    loss, dev_axis, weight = axes(train(range(1, 30), (1.0, 1.0, 3.0)) + dev(range(1, 30)))
    for axis, hidden in ((loss, 2), (dev_axis, 2), (weight, 3)):  # of fixed weights all lines are one
        patterns = [line._unscaled_dash_pattern for line in axis.lines]
        assert len({offset for offset, dashes in patterns if dashes}) == hidden
        assert sum(dashes is None for _, dashes in patterns) == 3 - hidden


def test_what_lies_together():
    x = np.arange(5)
    lines = [(x, x), (x, x + 1.0), (x, x + 1e-3), (x[:4], x[:4]), (x, x + 1.001), (x, np.full(5, 2.0))]
    assert plotting.overlapping(lines) == [(0, 2), (1, 4)]
    assert plotting.overlapping([(x, x * 0.0 - 3.0), (x, x * 0.0 - 3.0), (x, x * 0.0 - 3.0 + 1e-6)]) == [(0, 1)]
    assert plotting.overlapping([]) == []
    nan = np.where(x == 2, np.nan, 1.0)
    assert plotting.overlapping([(x, nan), (x, nan), (x, np.ones(5))]) == [(0, 1)]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_each_of_equal_lines_has_its_part(count):
    """Of the period of the dashes every line takes its own part, and together they take all of it."""
    parts = []
    for style in plotting.distinguish([(range(9), range(9))] * count):
        offset, (on, off) = style["linestyle"]
        parts.append({int((place - offset) % (on + off)) for place in range(int(on))})
    assert set.union(*parts) == set(range(int(plotting.DASH) * count))
    assert all(not one & other for one, other in itertools.combinations(parts, 2))
