"""Recognisers of identifiers of persons: functions from a text to the places of identifiers in it.

A pattern finds each place, which is then checked: card numbers by their Luhn digit, IBANs by their remainder modulo 97 and the
form of their country, telephone numbers by the plans of all countries, dates by the calendar. A script adds its own with
register_recogniser; ours are registered in the same way.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mtl_jax.core.errors import UserError
from mtl_jax.core.parts import Registry

# From a text to (first character, the one after the last) of each place.
Recogniser = Callable[[str], Iterable[tuple[int, int]]]

_URL = re.compile(r"(?:\b[a-z][a-z0-9+.-]*://|\bwww\.)[^\s<>\"'`{}|\\^]+", re.IGNORECASE)
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}(?![\w-])", re.IGNORECASE)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,30}\b", re.IGNORECASE)
_CARD = re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])")
_IP4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\.?\w)")
_IP6 = re.compile(r"(?<![\w:.])[0-9a-f:]*:[0-9a-f:]*:[0-9a-f:.]*[0-9a-f:](?![\w:])", re.IGNORECASE)
_USER = re.compile(r"(?<![\w@/.])@\w{2,}(?:[.-]\w+)*")
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DATE = re.compile(
    rf"(?<![\w/.-])(?:\d{{1,4}}[-/.]\d{{1,2}}[-/.]\d{{1,4}}|{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?,? \d{{4}}"
    rf"|\d{{1,2}}(?:st|nd|rd|th)? {_MONTH},? \d{{4}})(?![\w/-]|\.\d)",
    re.IGNORECASE,
)
_ID_WORD = r"(?:id|no|nr|number|account|acct|customer|order|invoice|ticket|case|ref|reference|passport|licen[cs]e|member)"
_ID = re.compile(
    r"(?<![\w-])(?:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"  # UUID
    r"|\d{3}-\d{2}-\d{4}"  # number of the social security of the USA
    r"|(?=[a-z0-9-]*[a-z])(?=(?:[a-z-]*\d){4})[a-z0-9]+(?:-[a-z0-9]+)*)(?![\w-])"  # letters and four digits or more
    rf"|(?:\b{_ID_WORD}\.? ?[:#]? ?|#)(?P<number>\d{{5,}})\b",
    re.IGNORECASE,
)

# Forms of dates as strptime has them; of two that fit, the first counts.
DATE_FORMS = (
    *(f"%Y{mark}%m{mark}%d" for mark in "-/."),
    *(form for mark in "/-." for form in (f"%m{mark}%d{mark}%Y", f"%d{mark}%m{mark}%Y")),
    *("%m/%d/%y", "%d/%m/%y"),
    *(f"{month} %d{comma} %Y" for month in ("%B", "%b", "%b.") for comma in (",", "")),
    *(f"%d {month}{comma} %Y" for month in ("%B", "%b", "%b.") for comma in ("", ",")),
)


def need(package: str, what: str, distribution: str = "") -> Any:
    """An optional package, imported.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = distribution or package.partition(".")[0]
        raise UserError(f"{what} need the package {name}, which is not installed; pip install 'mtl_jax[deidentify]'") from error


def _places(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    return (match.span() for match in pattern.finditer(text))


def url(text: str) -> Iterator[tuple[int, int]]:
    """Web addresses, without the punctuation after them."""
    for start, end in _places(_URL, text):
        address = text[start:end].rstrip(".,;:!?*_~")
        while address.endswith((")", "]")) and address.count(")") + address.count("]") > address.count("(") + address.count(
            "["
        ):
            address = address[:-1].rstrip(".,;:!?")
        yield start, start + len(address)


def email(text: str) -> Iterator[tuple[int, int]]:
    """E-mail addresses."""
    return _places(_EMAIL, text)


def iban(text: str) -> Iterator[tuple[int, int]]:
    """International bank account numbers of the right form and check digits, in groups or not."""
    checks = need("stdnum.iban", "account numbers", "python-stdnum")
    for start, end in _places(_IBAN, text):
        while end - start >= 15 and not checks.is_valid(text[start:end]):  # words in capitals may follow
            shorter = max(text.rfind(" ", start, end), text.rfind("-", start, end))
            end = shorter if shorter > start else start
        if end - start >= 15:
            yield start, end


def card(text: str) -> Iterator[tuple[int, int]]:
    """Numbers of 13 to 19 digits, in groups or not, with a valid Luhn digit."""
    luhn = need("stdnum.luhn", "card numbers", "python-stdnum")
    for start, end in _places(_CARD, text):
        digits = re.sub(r"\D", "", text[start:end])
        if luhn.is_valid(digits) and len(set(digits)) > 1:
            yield start, end


def ip(text: str) -> Iterator[tuple[int, int]]:
    """IP addresses, versions 4 and 6."""
    for pattern in (_IP4, _IP6):
        for start, end in _places(pattern, text):
            try:
                address = ipaddress.ip_address(text[start:end])
            except ValueError:
                continue
            if address != ipaddress.ip_address("::"):
                yield start, end


def telephone(text: str, region: str = "US") -> Iterator[tuple[int, int]]:
    """Telephone numbers that exist in the plan of their country.

    Args:
        text: The text.
        region: The country, such as US or DE, of numbers that are not in the international form.
    """
    numbers = need("phonenumbers", "telephone numbers")
    for match in numbers.PhoneNumberMatcher(text, region):
        unbalanced = match.raw_string.startswith("(") and match.raw_string.count("(") > match.raw_string.count(")")
        yield match.start + unbalanced, match.end


def date(text: str) -> Iterator[tuple[int, int]]:
    """Days with their year, in figures or with an English month, that exist in the calendar."""
    return ((start, end) for start, end in _places(_DATE, text) if date_form(text[start:end]))


def date_form(text: str) -> str:
    """The first of DATE_FORMS that fits a date; "" if none does. Endings as in 1st are ignored."""
    plain = without_ending(text)
    for form in DATE_FORMS:
        try:
            datetime.datetime.strptime(plain, form)
        except ValueError:
            continue
        return form
    return ""


def without_ending(text: str) -> str:
    """A date without the ending of its day: 1 May 2020 for 1st May 2020."""
    return re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text, flags=re.IGNORECASE)


def user(text: str) -> Iterator[tuple[int, int]]:
    """User names, @name, but not @user, which masks them in data sets of tweets."""
    return ((start, end) for start, end in _places(_USER, text) if text[start:end].lower() != "@user")


def identifier(text: str) -> Iterator[tuple[int, int]]:
    """UUIDs; social security numbers of the USA; words with letters and four digits or more; numbers of five digits or more
    after a word such as account, order or id, or after a #."""
    for match in _ID.finditer(text):
        yield match.span("number") if match.group("number") else match.span()


# The name of a recogniser is the type of its places. Of two places of equal length, the one of the first recogniser is used.
RECOGNISERS: Registry[Recogniser] = Registry(
    "recogniser",
    {
        "email": email,
        "url": url,
        "iban": iban,
        "card": card,
        "ip": ip,
        "date": date,
        "telephone": functools.partial(telephone, region="US"),
        "user": user,
        "id": identifier,
    },
)
register_recogniser = RECOGNISERS.register
