"""How the commands that write texts differ, and the object of an answer: known before any model is imported."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from mtl_jax.core.errors import UserError


class Kind(NamedTuple):
    """What differs between the commands.

    Attributes:
        name: The command.
        task: The name of its task in checkpoints.
        field: The name of an answer in an object.
        long: What happens to long texts.
    """

    name: str
    task: str
    field: str
    long: Literal["divide", "cut"]


class TextAnswer(NamedTuple):
    """The answers to a text.

    Attributes:
        texts: num_return_sequences answers, the best first; for a text that was divided, the answers to its pieces joined by
            spaces. A blank text has none.
        scores: Their scores; for a text that was divided, the mean over its pieces. None where the model's output was not
            finite; the answer is then empty.
        ended: Whether all answers ended before the length limit.
    """

    texts: tuple[str, ...]
    scores: tuple[float | None, ...]
    ended: bool


TRANSLATE = Kind("translate", "translation", "translation", "divide")
SUMMARIZE = Kind("summarize", "summarization", "summary", "cut")
GENERATE = Kind("generate", "generation", "answer", "cut")


def check_numbers(rows: int, max_source_tokens: int | None, seed: int) -> None:
    """Raises UserError where a number is outside its limits."""
    for name, value in (("rows", rows), ("max-source-tokens", max_source_tokens)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if not 0 <= seed < 1 << 63:
        raise UserError(f"--seed is {seed}; it must be at least 0 and below 2^63")


def answer_object(row: dict[str, Any], answer: TextAnswer, field: str, scores: bool) -> dict[str, Any]:
    """An object with the answer added, and with its score as FIELD_score; several answers as lists.

    Args:
        row: The object of the text.
        answer: Its answers.
        field: The name of the answer in the object.
        scores: Whether scores are added.
    """
    texts, rounded = list(answer.texts), [None if score is None else round(score, 4) for score in answer.scores]
    several = len(texts) > 1
    added: dict[str, Any] = {field: texts if several else "".join(texts)}
    if scores:
        added[f"{field}_score"] = rounded if several else next(iter(rounded), None)
    return row | added
