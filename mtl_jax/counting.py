"""Numbers of things in words."""

from __future__ import annotations


def count(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun: "1 run", "2 runs", "1,000 runs".

    Args:
        number: How many.
        noun: Of one, with what goes before it, such as "other run".
        plural: Of several, where it is not the noun and an s.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def there_are(number: int, noun: str, plural: str = "") -> str:
    """As count(), after a verb: "there is 1 run", "there are 2 runs"."""
    return f"there {'is' if number == 1 else 'are'} {count(number, noun, plural)}"
