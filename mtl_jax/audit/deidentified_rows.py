"""Source(deidentify=Deidentify(...)): de-identified rows of a source.

Texts change, and with them words, their labels and the characters of answers, so that labels stay right. A replacement depends
only on the type, the value, and the seed or key: the same person has the same surrogate in all rows, splits and sources.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl_jax.audit.deidentification import Identifier, moved, replaced_texts
from mtl_jax.audit.person_names import NAME_KINDS, NAMES, check_names, names_by
from mtl_jax.audit.recognisers import RECOGNISERS, Recogniser
from mtl_jax.audit.surrogates import replacement
from mtl_jax.audit.word_labels import lines_of, with_labels, word_groups
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.files import check_regular, expanded, reason, shown
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.row_keys import check_answer
from mtl_jax.data.source import EditRows, RowEdit, TextColumns

Replaced = tuple[str, tuple[Identifier, ...]]
# From texts to the new text and the replaced places of each.
DeidentifyTexts = Callable[[Sequence[str]], list[Replaced]]
# A row with its new texts, or the error that says why it cannot be read; and (column, replaced place) of each place.
EditedRow = tuple[Row | UserError, list[tuple[str, Identifier]]]
# A character of a JSON text that is written in another way.
_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|.)")


@dataclasses.dataclass(frozen=True)
class Deidentify(RowEdit):
    """How identifiers of persons are replaced in the rows of a source when they are read.

    Attributes:
        mode: mask: by the type, as [EMAIL]. surrogate: by another value of the type, the same for the same value. hash: by the
            type and a keyed hash.
        kinds: The types that are replaced: names of recognisers such as email, and, if `names` is given, person, place and
            organisation. Empty: all.
        names: Who finds persons, places and organisations: the workdir of a tagging run, or WORKDIR:TASK; or the name of a
            registered recogniser of names, such as presidio. Empty: names stay.
        seed: The seed of surrogates. Sources with the same seed have the same surrogates. Whoever knows it can test a guess.
        key_file: A file with the key of hashes. The key itself is recorded nowhere.
        language: The language of surrogates, as Faker names it.

    Examples:
        >>> import mtl_jax
        >>> mask = mtl_jax.audit.Deidentify(kinds=("email",))
        >>> source = mtl_jax.Source("mails", rows=[{"text": "to jo@corp.com"}], text="text", deidentify=mask)
    """

    mode: str = "mask"
    kinds: tuple[str, ...] = ()
    names: str = ""
    seed: int = 0
    key_file: str = ""
    language: str = "en_US"

    def check(self, where: str) -> None:
        """Checks the fields, the key file, and that the necessary packages and run exist.

        Raises:
            UserError: One of them is wrong or missing.
        """
        self._replacement(where)
        self._recognisers(where)
        if self.names:
            check_names(self.names, f"{where}: names")

    def editor(self, columns: TextColumns) -> EditRows:
        deidentified = self.texts("deidentify")

        def edit(rows: Sequence[Row]) -> list[tuple[Row | UserError, Mapping[str, int]]]:
            return [
                (row, Counter(place.type for _, place in places)) for row, places in edited_rows(rows, columns, deidentified)
            ]

        return edit

    def texts(self, where: str = "deidentify") -> DeidentifyTexts:
        """The function from texts to the new text and the replaced places of each; it opens a run of `names` now.

        Raises:
            UserError: As check().
        """
        self.check(where)
        replace, recognisers = self._replacement(where), self._recognisers(where)
        people = names_by(self.names, f"{where}: names") if self.names else None

        def deidentified(texts: Sequence[str]) -> list[Replaced]:
            return replaced_texts(texts, recognisers, people, replace, self.kinds)

        return deidentified

    def _replacement(self, where: str) -> Any:
        if self.mode == "hash" and not self.key_file:
            raise UserError(f"{where}: mode hash needs key_file, a file with a text that nobody knows who may read the result")
        try:
            return replacement(self.mode, self.seed, _key(self.key_file), self.language)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def _recognisers(self, where: str) -> list[tuple[str, Recogniser]]:
        if isinstance(self.kinds, str):
            raise UserError(f"{where}: kinds is the text {self.kinds!r}; it must be a tuple of names")
        for kind in self.kinds:
            if kind in NAME_KINDS and not self.names:
                raise UserError(f"{where}: kinds has {kind}, but names is empty; name the tagging run that finds names")
            if kind not in (*RECOGNISERS, *NAME_KINDS) and self.names not in NAMES:  # a registered one has its own types
                raise unknown(f"kind of {where}:", kind, (*RECOGNISERS, *NAME_KINDS))
        chosen = [(name, function) for name, function in RECOGNISERS.items() if not self.kinds or name in self.kinds]
        for _, function in chosen:
            try:
                list(function(""))  # asks for the package that it needs
            except UserError as error:
                raise UserError(f"{where}: {error}; or name the kinds that need none") from error
        return chosen


def _key(path: str) -> bytes:
    if not path:
        return b""
    file = expanded(path)
    check_regular(file)
    try:
        key = Path(file).read_bytes().strip()
    except OSError as error:
        raise UserError(f"key_file {shown(path)}: cannot be read ({reason(error)})") from error
    if not key:
        raise UserError(f"key_file {shown(path)}: the file is empty; write a long random text into it")
    return key


def edited_rows(rows: Sequence[Row], columns: TextColumns, deidentified: DeidentifyTexts) -> list[EditedRow]:
    """Rows with new texts, labels of words and answers, and the replaced places of each.

    Args:
        rows: The rows.
        columns: Their columns.
        deidentified: Deidentify.texts().
    """
    texts = [text for row in rows for text in _all_texts(row, columns)]
    found = deidentified([_ESCAPE.sub(_blank, text) if _is_json(text) else text for text in texts])
    replaced = {text: _in_json(text, new) if _is_json(text) else new for text, new in zip(texts, found, strict=True)}
    return [_edited(row, columns, replaced) for row in rows]


def _is_json(text: str) -> bool:
    """Whether a text is a list or object of JSON, such as a conversation."""
    if not text.lstrip().startswith(("[", "{")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _blank(escape: re.Match[str]) -> str:
    """As many blanks: else the n of a new line would be the first letter of the word after it."""
    return " " * len(escape.group())


def _in_json(text: str, found: Replaced) -> Replaced:
    """A JSON text with the replacements that were found in it without its escapes, and their places."""
    new, identifiers = found
    parts: list[str] = []
    places: list[Identifier] = []
    done = length = 0
    for place in identifiers:
        part = json.dumps(new[place.new_start : place.new_end], ensure_ascii=False)[1:-1]
        parts += [text[done : place.start], part]
        length += place.start - done
        places.append(place._replace(new_start=length, new_end=length + len(part)))
        done, length = place.end, length + len(part)
    return "".join([*parts, text[done:]]), tuple(places)


def _all_texts(row: Row, columns: TextColumns) -> list[str]:
    """The texts of a row in which places are searched; words are joined by spaces."""
    texts = [text for name in columns.texts for text in _texts(row, name, columns)]
    for name in columns.targets:
        value = row.columns.get(name)
        texts += [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    return texts


def _texts(row: Row, name: str, columns: TextColumns) -> list[str]:
    """The texts of a column: one text, the words of a list joined by spaces, or each of a list of texts."""
    value: Any = row.columns.get(name)
    if isinstance(value, str):
        return [value]
    if not _are_words(value):
        return []
    return list(value) if _are_texts(row, name, columns) else [" ".join(value)]


def _are_texts(row: Row, name: str, columns: TextColumns) -> bool:
    """Whether a column is a list of texts: an entry has a space inside, and no labels say that the entries are words."""
    value: Any = row.columns.get(name)
    spaced = _are_words(value) and any(" " in text.strip() for text in value)
    return spaced and (name != columns.text or not _has_labels(row, columns))


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value)


def _edited(row: Row, columns: TextColumns, replaced: Mapping[str, Replaced]) -> EditedRow:
    try:
        changed = _answers(row, columns, replaced)
        places: list[tuple[str, Identifier]] = []
        lines = row.words
        for name in columns.texts:
            value: Any = row.columns.get(name)
            if _are_texts(row, name, columns):
                changed[name], of_column = _joined([replaced[text] for text in value], value)
                places += [(name, place) for place in of_column]
                continue
            if not isinstance(value, str) and not _are_words(value):
                continue
            new, identifiers = replaced[value if isinstance(value, str) else " ".join(value)]
            places += [(name, place) for place in identifiers]
            if not identifiers:
                continue
            groups = word_groups(value, identifiers, new)
            changed[name] = new if isinstance(value, str) else [word for group in groups for word in group.words]
            if name != columns.text:
                continue
            for label_column in _word_columns(row, columns):
                try:
                    none = columns.no_label(label_column)
                    changed[label_column] = with_labels(row.columns[label_column], groups, none)
                except ValueError as error:
                    raise UserError(f"{row.where}: column {label_column!r}: {error}") from error
            if lines is not None:
                lines = (lines[0], lines_of(lines[1], groups))
        for name in columns.targets:
            value = row.columns.get(name)
            texts = value if isinstance(value, list) else [value]
            results = [replaced[text] if isinstance(text, str) else (text, ()) for text in texts]
            places += [(name, place) for _, identifiers in results for place in identifiers]
            if any(identifiers for _, identifiers in results):
                changed[name] = [text for text, _ in results] if isinstance(value, list) else results[0][0]
    except UserError as error:
        return error, []
    return row._replace(columns={**row.columns, **changed}, words=lines), places


def _joined(results: Sequence[Replaced], texts: Sequence[str]) -> tuple[list[str], list[Identifier]]:
    """The new texts of a list, and the replaced places in the text that joins them by spaces."""
    places: list[Identifier] = []
    old = new = 0
    for text, (new_text, identifiers) in zip(texts, results, strict=True):
        places += [
            Identifier(place.type, old + place.start, old + place.end, new + place.new_start, new + place.new_end)
            for place in identifiers
        ]
        old, new = old + len(text) + 1, new + len(new_text) + 1
    return [text for text, _ in results], places


def _word_columns(row: Row, columns: TextColumns) -> list[str]:
    """The columns with a label for each word: those that tasks read, and all others in a file with a word a line."""
    of_words = row.columns if row.words is not None else columns.word_labels
    return [name for name in of_words if name in row.columns and name not in columns.texts]


def _has_labels(row: Row, columns: TextColumns) -> bool:
    """Whether any column has labels of the row's words."""
    values = [(row.columns[name], columns.no_label(name)) for name in _word_columns(row, columns)]
    return any(value is not None and not (isinstance(value, str) and value.strip() in none) for value, none in values)


def _answers(row: Row, columns: TextColumns, replaced: Mapping[str, Replaced]) -> dict[str, Any]:
    """{column: answers at their places in the new context}, for the columns that have some."""
    context = row.columns.get(columns.context)
    result: dict[str, Any] = {}
    for name, value in row.columns.items():
        if not isinstance(value, list) or not value or not all(isinstance(answer, dict) for answer in value):
            continue
        if not isinstance(context, str) or context not in replaced:
            continue
        new, places = replaced[context]
        for answer in value:
            check_answer(answer, context, row.where)
        moved_answers = []
        for answer in value:
            start, end = moved(places, answer["start"], answer["start"] + len(answer["text"]))
            moved_answers.append({**answer, "text": new[start:end], "start": start})
        result[name] = moved_answers
    return result
