"""Where sentences end."""

from __future__ import annotations

import re

# Ends of sentences: the mark, what closes after it, and the space up to the next; Chinese and Japanese have no space there.
SENTENCES = re.compile(
    r"[.!?\u2026]+[\"'\u2019\u201d\u00bb)\]]*\s+"
    r"|[\u3002\uff01\uff1f\uff61]+[\u300d\u300f\u2019\u201d\uff09]*\s*"
)


def first_sentence(text: str) -> str:
    """A text up to the first end of a sentence, or all of it; white space around it is left out."""
    text = text.strip()
    found = SENTENCES.search(text)
    return text if found is None else text[: found.end()].strip()
