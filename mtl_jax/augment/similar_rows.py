"""Whether a made row has the meaning of its original, by the cosine of the vectors of their texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtl_jax.audit.meaning import embedder, open_encoder
from mtl_jax.core.errors import UserError
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import AugmentedRows

DISSIMILAR = "not similar"
# From rows and what was made of each, a row or a reason, to the same with the reason DISSIMILAR in place of some.
KeepSimilar = Callable[[Sequence[Row], Sequence[Row | str]], list[Row | str]]


def check(where: str, similarity: float) -> None:
    """Raises UserError unless a least cosine is a number from -1 to 1."""
    if isinstance(similarity, bool) or not isinstance(similarity, int | float) or not -1 <= similarity <= 1:
        raise UserError(f"{where}: similarity is {similarity!r}; it must be a cosine, at least -1 and at most 1")


def keep_similar(source: AugmentedRows, encoder: str, similarity: float) -> KeepSimilar:
    """The function that keeps a made row if all its changed texts have a cosine of at least `similarity` with the old.

    Args:
        source: Their source.
        encoder: As audit.meaning.open_encoder(); empty: all rows are kept.
        similarity: The least cosine.

    Raises:
        UserError: The encoder cannot be opened.
    """
    if not encoder:
        return lambda rows, made: list(made)
    embed = embedder(open_encoder(encoder))

    def keep(rows: Sequence[Row], made: Sequence[Row | str]) -> list[Row | str]:
        pairs = [
            (place, _text(row.columns.get(name)), _text(new.columns.get(name)))
            for place, (row, new) in enumerate(zip(rows, made, strict=True))
            if not isinstance(new, str)
            for name in source.columns.texts
            if row.columns.get(name) != new.columns.get(name)
        ]
        different = list(dict.fromkeys(text for _, *texts in pairs for text in texts))
        vector_of = dict(zip(different, embed(different), strict=True))
        cosines = {place: 1.0 for place, _, _ in pairs}
        for place, old, changed in pairs:
            cosines[place] = min(cosines[place], float(np.dot(vector_of[old], vector_of[changed])))
        return [DISSIMILAR if cosines.get(place, 1.0) < similarity else new for place, new in enumerate(made)]

    return keep


def _text(value: Any) -> str:
    return value if isinstance(value, str) else " ".join(value or [])
