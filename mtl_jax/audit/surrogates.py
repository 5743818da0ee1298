"""Replacements of names and addresses: a mask, a keyed hash, or a surrogate that looks like them.

A surrogate is a function of the seed, the type and the value, ignoring case and spaces: the same person has the same name in
all rows, splits and tasks, in every process, and nothing is stored. Two values can, rarely, have the same surrogate.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import hmac
import random
import string
from collections.abc import Callable
from typing import Any

from mtl_jax.audit.recognisers import date_form, need, without_ending
from mtl_jax.audit.text_keys import exact
from mtl_jax.core.errors import UserError, unknown

MODES = ("surrogate", "mask", "hash")
TRIES = 10  # until a surrogate differs from the value
OLDEST = datetime.date(1930, 1, 1)
DAYS = 365 * 90

# From (type, value) to the replacement.
Replace = Callable[[str, str], str]


def replacement(mode: str, seed: int = 0, key: str | bytes = "", language: str = "en_US") -> Replace:
    """The function of a mode.

    Args:
        mode: One of MODES. mask: the type, as [EMAIL]. hash: the type and 12 hex digits of an HMAC-SHA256 of the value under
            `key`, as EMAIL_6a30c42c9a4b. surrogate: another e-mail address, name, number, date, ...
        seed: Seed of surrogates.
        key: Key of hashes; whoever does not know it cannot find values by trying.
        language: Language of surrogates, as Faker names it: en_US, de_DE, ...

    Raises:
        UserError: The mode is unknown, there is no key, Faker is not installed or does not know the language.
    """
    if mode not in MODES:
        raise unknown("mode", str(mode), MODES)
    if mode == "mask":
        return lambda kind, value: f"[{kind.upper()}]"
    if mode == "hash":
        if not isinstance(key, str | bytes) or not key:
            raise UserError("mode hash needs a key: a text that nobody knows who may read the result")
        secret = key.encode() if isinstance(key, str) else key
        return lambda kind, value: _hashed(kind, value, secret)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"seed is {seed!r}; it must be a whole number")
    _faker(language)
    return lambda kind, value: _surrogate(kind, value, seed, language)


def _hashed(kind: str, value: str, secret: bytes) -> str:
    return f"{kind.upper()}_{hmac.new(secret, _canonical(kind, value), hashlib.sha256).hexdigest()[:12]}"


def _canonical(kind: str, value: str) -> bytes:
    return f"{kind}\0{exact(value)}".encode("utf-8", "surrogatepass")


def _surrogate(kind: str, value: str, seed: int, language: str) -> str:
    make = _MAKERS.get(kind, _same_shape)
    for attempt in range(TRIES):
        digest = hashlib.blake2b(f"{seed}\0{attempt}\0".encode() + _canonical(kind, value), digest_size=8).digest()
        number = int.from_bytes(digest, "big")
        result = make(value, number, language)
        if exact(result) != exact(value):
            break
    return result


@functools.cache
def _faker(language: str) -> Any:
    module = need("faker", "surrogates", "Faker")
    try:
        return module.Faker(language)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"language {language!r}: Faker has no such language; write it as en_US or de_DE") from error


def _by_faker(name: str) -> Callable[[str, int, str], str]:
    """A surrogate from one of Faker's functions."""

    def make(value: str, number: int, language: str) -> str:
        faker = _faker(language)
        faker.seed_instance(number)
        made: str = getattr(faker, name)()
        return made.replace("\n", " ")

    return make


def _user(value: str, number: int, language: str) -> str:
    return f"@{_by_faker('user_name')(value, number, language)}"


def _ip(value: str, number: int, language: str) -> str:
    return _by_faker("ipv6" if ":" in value else "ipv4_private")(value, number, language)


def _date(value: str, number: int, language: str) -> str:
    """A day between 1930 and 2019, in the form of the value."""
    day = OLDEST + datetime.timedelta(days=number % DAYS)
    form = date_form(value)
    return day.strftime(form) if form else _same_shape(without_ending(value), number, language)


def _same_shape(value: str, number: int, language: str) -> str:
    """The value with other digits and letters, in the same case; hexadecimal stays so, and other characters do not change."""
    rng = random.Random(number)
    letters = string.ascii_lowercase if set(value.lower()) & set(string.ascii_lowercase[6:]) else string.ascii_lowercase[:6]

    def other(character: str) -> str:
        if character.isdigit():
            return rng.choice(string.digits)
        if character.isalpha():
            letter = rng.choice(letters)
            return letter.upper() if character.isupper() else letter
        return character

    return "".join(map(other, value))


_MAKERS: dict[str, Callable[[str, int, str], str]] = {
    "person": _by_faker("name"),
    "place": _by_faker("city"),
    "organisation": _by_faker("company"),
    "email": _by_faker("safe_email"),
    "url": _by_faker("url"),
    "iban": _by_faker("iban"),
    "card": _by_faker("credit_card_number"),
    "ip": _ip,
    "date": _date,
    "telephone": _by_faker("phone_number"),
    "user": _user,
}
