"""De-identified texts: identifiers of persons are recognised and replaced, with offsets in the old and the new text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from mtl_jax.audit.recognisers import RECOGNISERS, Recogniser
from mtl_jax.audit.surrogates import Replace, replacement
from mtl_jax.core.errors import UserError, count
from mtl_jax.core.text_lines import as_list

# The type of people=: from texts to the (first character, the one after the last, type) of the names in each.
Names = Callable[[Sequence[str]], Sequence[Iterable[tuple[int, int, str]]]]


class Identifier(NamedTuple):
    """A place in a text that was replaced.

    Attributes:
        type: The name of a recogniser, or "person", "place", "organisation".
        start: Its first character in the old text.
        end: The character after its last, in the old text.
        new_start: Its first character in the new text.
        new_end: The character after its last, in the new text.
    """

    type: str
    start: int
    end: int
    new_start: int
    new_end: int


def deidentify(
    text: str,
    *,
    mode: str = "surrogate",
    recognisers: Sequence[str] | None = None,
    people: Names | None = None,
    seed: int = 0,
    key: str | bytes = "",
    language: str = "en_US",
) -> tuple[str, tuple[Identifier, ...]]:
    """A text in which e-mail addresses, numbers, names and the like are replaced, and the places where they are.

    Args:
        text: The text.
        mode: surrogate: by another value of the same type, the same one in every text. mask: by the type, as [EMAIL]. hash: by
            the type and a keyed hash.
        recognisers: Names of recognisers; None: all, including your own.
        people: From texts to the names in each, such as people_of(mtl_jax.load_model("runs/social_ner"), "entities"); None:
            names are not replaced.
        seed: Seed of the surrogates.
        key: Key of the hashes.
        language: Language of the surrogates, as Faker names it.

    Returns:
        The new text, and the replaced places in order. All other characters are those of the old text.

    Raises:
        UserError: A name or mode is unknown, a package of the extra "deidentify" is needed and not installed, or `people` or a
            recogniser gives a place outside the text.

    Examples:
        >>> deidentify("Write to jo@corp.com by 2024-05-01.", mode="mask")[0]
        'Write to [EMAIL] by [DATE].'
    """
    if not isinstance(text, str):
        raise UserError(f"text is a {type(text).__name__}; it must be a text, for a list use deidentify_texts")
    options: dict[str, Any] = {"recognisers": recognisers, "people": people, "seed": seed, "key": key, "language": language}
    return deidentify_texts([text], mode=mode, **options)[0]


def deidentify_texts(
    texts: Sequence[str],
    *,
    mode: str = "surrogate",
    recognisers: Sequence[str] | None = None,
    people: Names | None = None,
    seed: int = 0,
    key: str | bytes = "",
    language: str = "en_US",
) -> list[tuple[str, tuple[Identifier, ...]]]:
    """As deidentify(), for many texts: `people` gets them all at once."""
    texts = as_list(texts, "texts", "texts, for one use deidentify")
    if isinstance(recognisers, str):
        raise UserError(f"recognisers is the text {recognisers!r}; it must be a list of names")
    names = list(RECOGNISERS if recognisers is None else recognisers)
    functions = [(name, RECOGNISERS.find(name)) for name in names]
    replace = replacement(mode, seed, key, language)
    return replaced_texts(texts, functions, people, replace)


def replaced_texts(
    texts: Sequence[str],
    recognisers: Sequence[tuple[str, Recogniser]],
    people: Names | None,
    replace: Replace,
    kinds: Sequence[str] = (),
) -> list[tuple[str, tuple[Identifier, ...]]]:
    """Texts in which the places that recognisers and `people` find are replaced, and these places without outer spaces.

    Args:
        texts: The texts.
        recognisers: (type, function) of each recogniser.
        people: As for deidentify().
        replace: From type and value to the replacement.
        kinds: The types that are replaced; none: all.

    Raises:
        UserError: `people` or a recogniser gives a place outside the text.
    """
    named = [[] for _ in texts] if people is None else [list(places) for places in people(texts)]
    if len(named) != len(texts):
        raise UserError(f"people gave the names of {count(len(named), 'text')} for {count(len(texts), 'text')}")
    result = []
    for text, entities in zip(texts, named, strict=True):
        places = [(start, end, name) for name, function in recognisers for start, end in function(text)]
        places += [entity for entity in entities if not kinds or entity[2] in kinds]
        for start, end, kind in places:
            if not 0 <= start < end <= len(text):
                raise UserError(f"{kind} at {start} to {end} is not within a text of {count(len(text), 'character')}")
        trimmed = [(*_trimmed(text, start, end), kind) for start, end, kind in places]
        result.append(_replaced(text, [place for place in trimmed if place[0] < place[1]], replace))
    return result


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A place without white space at its ends."""
    part = text[start:end]
    return end - len(part.lstrip()), start + len(part.rstrip())


def _replaced(text: str, places: list[tuple[int, int, str]], replace: Replace) -> tuple[str, tuple[Identifier, ...]]:
    """The text with its places replaced; of overlapping places the longest is used, or the first of equal length."""
    chosen: list[tuple[int, int, str]] = []
    for start, end, kind in sorted(places, key=lambda place: place[0] - place[1]):
        if all(end <= other_start or other_end <= start for other_start, other_end, _ in chosen):
            chosen.append((start, end, kind))
    parts: list[str] = []
    identifiers: list[Identifier] = []
    done = length = 0
    for start, end, kind in sorted(chosen):
        new = replace(kind, text[start:end])
        parts += [text[done:start], new]
        length += start - done
        identifiers.append(Identifier(kind, start, end, length, length + len(new)))
        done, length = end, length + len(new)
    return "".join([*parts, text[done:]]), tuple(identifiers)


def moved(identifiers: Sequence[Identifier], start: int, end: int) -> tuple[int, int]:
    """Where a stretch of the old text is in the new one, such as the label of a span or the characters of a word.

    Args:
        identifiers: The places of the text, as deidentify() returns them.
        start: First character in the old text; inside a replaced place it becomes that place's first.
        end: The character after the last in the old text; inside a replaced place it becomes the one after its last.

    Examples:
        >>> text, places = deidentify("Jo's address is jo@corp.com today", mode="mask")
        >>> first, last = moved(places, 16, 27)
        >>> text[first:last]
        '[EMAIL]'
    """
    new_start, new_end = start, end
    for place in identifiers:
        if place.end <= start:
            new_start = start + place.new_end - place.end
        elif place.start <= start:
            new_start = place.new_start
        if place.end <= end:
            new_end = end + place.new_end - place.end
        elif place.start < end:
            new_end = place.new_end
    return new_start, max(new_start, new_end)
