"""Plants copies in held-out texts, each with an edit of a kind, and texts that look like copies and are none. Seeded.

Edits that keep the letters: case, spaces, punctuation, quotation marks, full-width letters, decomposed accents, a Treebank's
spaces around punctuation, emoji. Edits of words, at most one word in ten, so none in a text of fewer than ten words: a word
replaced, dropped, inserted, misspelt; two neighbours swapped; a few words before or after the text; the end cut off.

Texts that are not copies: the first half of one text with the second half of another; a text with two words in five replaced;
the words of a text in another order; a short text with one word replaced.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

LEAST_WORDS = 10  # of a text with an edit of words
SHORT = 7  # most words of a text that is short

Edit = Callable[[str, random.Random, Sequence[str]], str]


class Planted(NamedTuple):
    """Held-out texts, and which of them were planted.

    Attributes:
        train: Training texts.
        held_out: Held-out texts.
        copies: {index of a held-out text: (index of the training text that it copies, kind of edit)}.
        others: {index of a held-out text: kind} of texts that look like a copy and are none.
    """

    train: list[str]
    held_out: list[str]
    copies: dict[int, tuple[int, str]]
    others: dict[int, str]


def _edits(text: str) -> int:
    return max(1, len(text.split()) // 10)


def _each(text: str, rng: random.Random, change: Callable[[list[str], int], None]) -> str:
    """The text with a change at one word in ten, at different places, from the last to the first."""
    words = text.split()
    for place in sorted(rng.sample(range(1, len(words)), _edits(text)), reverse=True):
        change(words, place)
    return " ".join(words)


def replace(text: str, rng: random.Random, vocabulary: Sequence[str]) -> str:
    return _each(text, rng, lambda words, place: words.__setitem__(place, rng.choice(vocabulary)))


def drop(text: str, rng: random.Random, vocabulary: Sequence[str]) -> str:
    return _each(text, rng, lambda words, place: words.__delitem__(place))


def insert(text: str, rng: random.Random, vocabulary: Sequence[str]) -> str:
    return _each(text, rng, lambda words, place: words.insert(place, rng.choice(vocabulary)))


def misspell(text: str, rng: random.Random, vocabulary: Sequence[str]) -> str:
    def change(words: list[str], place: int) -> None:
        word = words[place]
        at = rng.randrange(len(word) + 1)
        words[place] = word[:at] + rng.choice("abcdefghijklmnopqrstuvwxyz") + word[at + rng.randrange(2) :]

    return _each(text, rng, change)


def swap(text: str, rng: random.Random, vocabulary: Sequence[str]) -> str:
    words = text.split()
    at = rng.randrange(len(words) - 1)
    words[at], words[at + 1] = words[at + 1], words[at]
    return " ".join(words)


def before(text: str, rng: random.Random, vocabulary: Sequence[str]) -> str:
    return " ".join([*rng.choices(vocabulary, k=_edits(text)), text])


def after(text: str, rng: random.Random, vocabulary: Sequence[str]) -> str:
    return " ".join([text, *(f"#{word}" for word in rng.choices(vocabulary, k=_edits(text)))])


def cut(text: str, rng: random.Random, vocabulary: Sequence[str]) -> str:
    words = text.split()
    return " ".join(words[: len(words) - _edits(text)])


LETTERS_KEPT: dict[str, Edit] = {
    "capitals": lambda text, rng, vocabulary: text.upper(),
    "title case": lambda text, rng, vocabulary: text.title(),
    "spaces": lambda text, rng, vocabulary: re.sub(" ", lambda match: rng.choice([" ", "  ", "\t", "\u00a0"]), f" {text} "),
    "no punctuation": lambda text, rng, vocabulary: re.sub(r"[^\w\s]", "", text) or text,
    "more punctuation": lambda text, rng, vocabulary: text.rstrip(".!? ") + rng.choice(["!!!", "...", " ?", ' ."', " --"]),
    "treebank": lambda text, rng, vocabulary: re.sub(r"([^\w\s])", r" \1 ", text),
    "joined": lambda text, rng, vocabulary: re.sub(r" (?=[^\w\s])", "", text),
    "quotation marks": lambda text, rng, vocabulary: f"\u201c{text.replace(chr(39), chr(0x2019))}\u201d",
    "full width": lambda text, rng, vocabulary: "".join(
        chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else "\u3000" if c == " " else c for c in text
    ),
    "decomposed": lambda text, rng, vocabulary: unicodedata.normalize("NFD", text),
    "emoji": lambda text, rng, vocabulary: f"{text} {rng.choice(['😂', '🙏🏽', '❤️', '👩‍👩‍👧'])}",
}
WORDS_CHANGED: dict[str, Edit] = {
    "replaced": replace,
    "dropped": drop,
    "inserted": insert,
    "misspelt": misspell,
    "swapped": swap,
    "words before": before,
    "words after": after,
    "cut off": cut,
}


def halves(text: str, rng: random.Random, other: str) -> str:
    first, second = text.split(), other.split()
    return " ".join(first[: len(first) // 2] + second[len(second) // 2 :])


def two_in_five(text: str, rng: random.Random, vocabulary: Sequence[str]) -> str:
    words = text.split()
    for place in rng.sample(range(len(words)), max(1, len(words) * 2 // 5)):
        words[place] = rng.choice(vocabulary)
    return " ".join(words)


def shuffled(text: str, rng: random.Random) -> str:
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def one_word(text: str, rng: random.Random, vocabulary: Sequence[str]) -> str:
    words = text.split()
    words[rng.randrange(len(words))] = rng.choice(vocabulary)
    return " ".join(words)


def plant(texts: Sequence[str], seed: int = 0, held_out: float = 0.25) -> Planted:
    """Divides texts into train and held-out, and makes half of the held-out ones copies and a quarter false copies.

    Args:
        texts: Different texts, none like another, in an order without meaning.
        seed: Seed of all choices.
        held_out: The share of the result that is held out.
    """
    rng = random.Random(seed)
    train = list(texts[: round(len(texts) * (1 - held_out))])
    fresh = list(texts[len(train) :])
    vocabulary = sorted({word for text in train[:20_000] for word in text.split() if word.isalpha() and len(word) > 3})
    origins = rng.sample(range(len(train)), len(fresh) * 3 // 4)
    copies: dict[int, tuple[int, str]] = {}
    others: dict[int, str] = {}
    result: list[str] = []
    for number, text in enumerate(fresh):
        if number >= len(origins):
            result.append(text)
            continue
        origin = origins[number]
        original, words = train[origin], len(train[origin].split())
        if number < len(fresh) // 2:
            edits = {**LETTERS_KEPT, **WORDS_CHANGED} if words >= LEAST_WORDS else LETTERS_KEPT
            kind = rng.choice(sorted(edits))
            copies[number] = (origin, kind)
            result.append(edits[kind](original, rng, vocabulary))
        elif words <= SHORT:
            others[number] = "short, one word"
            result.append(one_word(original, rng, vocabulary))
        else:
            kind = rng.choice(["halves", "shuffled", "two in five"])
            others[number] = kind
            result.append(
                halves(original, rng, text)
                if kind == "halves"
                else shuffled(original, rng)
                if kind == "shuffled"
                else two_in_five(original, rng, vocabulary)
            )
    return Planted(train, result, copies, others)
