"""Keys of texts: two texts with the same key are copies of one kind. A pair of texts has one key, whatever its order.

Three kinds, from strict to loose: `exact` ignores case and white space; `letters` also ignores punctuation and the division
into words, so `moore 's` is `moore's`; near has no key, see minhash.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence

# A text; or the two texts of a pair.
Text = str | Sequence[str]

# Marks of Unicode that no script writes as a letter: signs that choose the form of the character before them.
_SELECTORS = frozenset([*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0), 0x20E3])


def sides(text: Text) -> tuple[str, ...]:
    """A text as a tuple of itself, or the two texts of a pair."""
    return (text,) if isinstance(text, str) else tuple(text)


def normalise(text: str) -> str:
    """Unicode's NFKC form, without case: full-width letters, ligatures and composed accents have one spelling."""
    if text.isascii():
        return text.lower()
    # Folding can undo the composition, as for the Turkish dotted I.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def exact(text: Text) -> str:
    """A key that ignores only case, Unicode form and white space; "" for an empty text.

    >>> exact("The  Moore's") == exact("the moore's")
    True
    """
    return "\n".join(sorted(" ".join(normalise(side).split()) for side in sides(text))).strip("\n")


def letters(text: Text) -> str:
    """The letters and digits of a text; "" for a text without any, such as "?!".

    >>> letters("a moore 's film !")
    'amooresfilm'
    """
    return "\n".join(sorted(normalise(side).translate(_KEPT) for side in sides(text))).strip("\n")


@functools.cache
def is_letter(code: int) -> bool:
    """Whether a code point is a letter, a digit, or a mark that belongs to a letter, such as a vowel sign."""
    return unicodedata.category(chr(code))[0] in "LNM" and code not in _SELECTORS


class _Kept(dict[int, int | None]):
    """A table for str.translate that is filled as characters occur."""

    def __missing__(self, code: int) -> int | None:
        self[code] = code if is_letter(code) else None
        return self[code]


_KEPT = _Kept()
