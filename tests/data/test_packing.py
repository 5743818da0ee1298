import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.data.packing import best_fit


def by_hand(lengths, row_length, most):
    """Best-fit decreasing: into the fullest row with room; of equal ones, into that which came to its fill last."""
    rows, left, changed = [], [], []
    for clock, place in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [r for r in range(len(rows)) if lengths[place] <= left[r] > 0 and len(rows[r]) < most]
        if not fitting:
            rows.append([])
            left.append(row_length)
            changed.append(0)
            fitting = [len(rows) - 1]
        row = min(fitting, key=lambda r: (left[r], -changed[r]))
        rows[row].append(place)
        left[row] -= lengths[place]
        changed[row] = clock
    return rows


@given(st.lists(st.integers(0, 16), max_size=60), st.integers(1, 6))
def test_it_is_best_fit_decreasing(lengths, most):
    rows = best_fit(lengths, 16, most)
    assert [row.tolist() for row in rows] == by_hand(lengths, 16, most)
    assert sorted(np.concatenate([*rows, []])) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 16 and len(row) <= most for row in rows)


def test_rows_of_natural_lengths_are_nearly_full():
    """Lengths like those of SNIPS, about 11 tokens a sentence."""
    lengths = np.clip(np.random.default_rng(0).poisson(11, 5000), 4, 40)
    assert lengths.sum() / (64 * len(best_fit(lengths, 64, 12))) > 0.97
