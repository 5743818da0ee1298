import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.tasks.span import BestSpan, best_span


def brute_force(logits, context, max_answer):
    """Every pair of every window, one after another."""
    best = None
    for number, (window, inside) in enumerate(zip(logits, context, strict=True)):
        for start in range(len(window)):
            for end in range(start, min(start + max_answer, len(window))):
                score = float(window[start, 0] + window[end, 1])
                if inside[start] and inside[end] and (best is None or score > best.score):
                    best = BestSpan(number, start, end, score, min(float(w[0, 0] + w[0, 1]) for w in logits))
    return best


@st.composite
def windows(draw):
    """Windows as they come: [CLS], a question, a context that may be empty, [SEP]. Few numbers, so that there are ties."""
    logits, context = [], []
    for _ in range(draw(st.integers(1, 3))):
        question, inside = draw(st.integers(1, 3)), draw(st.integers(0, 8))
        length = question + inside + 1
        numbers = draw(st.lists(st.integers(-3, 3), min_size=2 * length, max_size=2 * length))
        logits.append(np.array(numbers, np.float32).reshape(length, 2))
        context.append(np.array([False] * question + [True] * inside + [False]))
    return logits, context


@given(windows(), st.integers(1, 10))
def test_the_best_is_that_of_every_pair(windows, max_answer):
    logits, context = windows
    assert best_span(logits, context, max_answer) == brute_force(logits, context, max_answer)


def test_an_answer_is_not_longer_than_allowed():
    logits = np.array([[0, 0], [5, 0], [1, 0], [0, 5]], np.float32)
    context = [np.array([False, True, True, True])]
    assert best_span([logits], context, 3)[:3] == (0, 1, 3)
    assert best_span([logits], context, 2)[:3] == (0, 2, 3)
