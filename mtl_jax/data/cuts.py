"""How the rows of a source are divided into train, dev and test, and how few of them are taken.

A seeded hash of a text or of its document decides its split, so that it stays there after rows are added; or the time of a row
does, so that a model is tested on what is newer than all that it learned.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from mtl_jax.core import row_texts
from mtl_jax.core.errors import UserError, count
from mtl_jax.core.row_texts import quoted
from mtl_jax.data.formats.rows import Row, no_column
from mtl_jax.data.source import SPLITS, Source

_MONTH = re.compile(r"\d{4}-\d{2}")
_YEAR = re.compile(r"[1-9][0-9]{3}")


class Moment(NamedTuple):
    """The time of a row.

    Attributes:
        value: A number; of a date, seconds since 1970, UTC where it says no other zone.
        text: As the row has it.
        dated: Whether it is a date.
    """

    value: float
    text: str
    dated: bool = False


NO_MOMENT = Moment(0.0, "")


def moment_of(source: Source, row: Row) -> Moment:
    """The time of a row, from the column `time` of its source.

    Raises:
        UserError: There is no such column, or it has neither a number nor an ISO date.
    """
    if source.time not in row.columns:
        raise no_column(source, row.where, "time", row.columns)
    value = row.columns[source.time]
    try:
        moment = _moment(value.strip()) if isinstance(value, str) else None
    except (ValueError, OverflowError):
        moment = None
    if moment is None or not math.isfinite(moment.value):
        needed = "neither a number nor an ISO date such as 2024-05-01"
        raise UserError(f"{row.where}: the time column {source.time!r} has {quoted(value)}, which is {needed}")
    return moment


def _moment(text: str) -> Moment:
    try:
        return Moment(float(text), text)
    except ValueError:
        return Moment(_seconds(f"{text}-01" if _MONTH.fullmatch(text) else text), text, dated=True)


def _seconds(date: str) -> float:
    moment = datetime.datetime.fromisoformat(date)
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def of_one_scale(source: Source, moments: Sequence[Moment]) -> list[Moment]:
    """The times of a source's rows on one scale: where any is a date, a number of four digits is the beginning of that year.

    Raises:
        UserError: There are dates, and numbers that are not years.
    """
    date = next((moment for moment in moments if moment.dated), None)
    if date is None:
        return list(moments)
    number = next((moment for moment in moments if not moment.dated and not _YEAR.fullmatch(moment.text)), None)
    if number is not None:
        both = f"dates, such as {quoted(date.text)}, and numbers, such as {quoted(number.text)}"
        where = f"source {source.name!r}: the time column {source.time!r}"
        raise UserError(f"{where} has {both}, so their order is not known; write all as dates")
    return [moment if moment.dated else Moment(_seconds(f"{moment.text}-01-01"), moment.text, dated=True) for moment in moments]


def by_time(moments: Sequence[Moment], cuts: Mapping[str, float]) -> list[str]:
    """The split of each row: the newest become test, those before them dev. Rows of one time are in one split, the newer one.

    Args:
        moments: The time of each row.
        cuts: {"dev" and "test": share of the rows}.
    """
    ordered = sorted(moment.value for moment in moments)

    def first_of(share: float) -> float:
        number = round(share * len(ordered))
        return ordered[-number] if number else math.inf

    test, dev = first_of(cuts["test"]), first_of(cuts["test"] + cuts["dev"])
    dev = dev if cuts["dev"] else math.inf
    return ["test" if moment.value >= test else "dev" if moment.value >= dev else "train" for moment in moments]


def time_remarks(moments: Sequence[Moment], targets: Sequence[str], documents: Sequence[str]) -> list[str]:
    """Lines on a division by time: where it cuts, and how many documents have rows on both sides of a cut.

    Args:
        moments: The time of each row.
        targets: Its split.
        documents: Its document; empty where the source has none.
    """
    spans = []
    for split in ("train", "dev", "test"):
        inside = sorted(moment for moment, target in zip(moments, targets, strict=True) if target == split)
        if inside and not row_texts.are_hidden():
            spans.append(f"{split} from {inside[0].text} to {inside[-1].text}")
    lines = [f"divided by time: {', '.join(spans)}"] if spans else ["divided by time"]
    places: dict[str, set[str]] = {}
    for document, target in zip(documents, targets, strict=True):
        places.setdefault(document, set()).add(target)
    both = sum(len(splits) > 1 for document, splits in places.items() if document)
    if both:
        lines.append(f"{count(both, 'document has', 'documents have')} rows on both sides of a cut, as time alone divides them")
    return lines


def drop_swapped_pairs(
    kept: dict[str, list[Any]], digests: dict[str, list[bytes]], cut: Collection[str]
) -> tuple[int, list[str]]:
    """Leaves out of train and dev the pairs that dev or test have the other way round, since documents or times may part them.

    Args:
        kept: {split: its rows}, which is changed.
        digests: {split: the digest of each row's text}, which is changed; a pair and the swapped pair have the same one.
        cut: The splits whose rows are from the source's path; the others stay as they are.

    Returns:
        The number of rows that were left out, and a line that says so; no line if there are none.
    """
    held_out: set[bytes] = set()
    numbers: dict[str, int] = {}
    for split in reversed(SPLITS):
        if split in cut:
            pairs = [pair for pair in zip(kept[split], digests[split], strict=True) if pair[1] not in held_out]
            numbers[split] = len(kept[split]) - len(pairs)
            kept[split], digests[split] = [entry for entry, _ in pairs], [digest for _, digest in pairs]
        held_out.update(digests[split])
    total = sum(numbers.values())
    parts = ", ".join(f"{numbers[split]:,} of {split}" for split in SPLITS if numbers.get(split))
    what = f"{count(total, 'pair is', 'pairs are')} left out ({parts}): the same pair the other way round is held out"
    return total, [what] if total else []


def split_shares(source: Source) -> dict[str, float]:
    """The shares of the training rows that become dev and test; 0 for a split with its own file or rows."""
    return {split: 0.0 if source.place(split) else getattr(source, f"cut_{split}") for split in ("dev", "test")}


def split_of(key: str, seed: int, cuts: Mapping[str, float]) -> str:
    """The split of a text: a hash of seed and text is a number in [0, 1), which falls into one of the shares."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    number = int.from_bytes(digest[:8], "big") / 2**64
    if number < cuts["test"]:
        return "test"
    return "dev" if number < cuts["test"] + cuts["dev"] else "train"


def limited(digests: Sequence[bytes], source: Source, split: str) -> Sequence[int]:
    """The indices, ascending, of a sample of a split's rows as large as the source's limits allow.

    Rows are sampled by a hash of cut_seed and text: all classes occur even if the file is sorted, and the rows of a smaller
    limit are among those of a larger one.

    Args:
        digests: A digest of each row's text.
        source: The source.
        split: The split of the rows.
    """
    limits = (source.limit, source.limit_train if split == "train" else 0)
    most = min((limit for limit in limits if limit), default=len(digests))
    if most >= len(digests):
        return range(len(digests))
    seed = f"{source.cut_seed}\0limit\0".encode()

    def rank(index: int) -> tuple[bytes, int]:
        return hashlib.blake2b(seed + digests[index], digest_size=8).digest(), index

    return sorted(sorted(range(len(digests)), key=rank)[:most])


def empty_split_advice(source: Source, split: str, distinct: int, dropped: int) -> str:
    """Why a split is empty and what to do; "" if that is not known.

    Args:
        source: The source.
        split: The empty split.
        distinct: Number of texts in the source's path that were divided among splits, or of documents if it has a group.
        dropped: Number of training rows that were dropped because their text occurred before, or in dev or test.
    """
    unit = "document" if source.group and not source.time else "text"
    texts = f"{distinct} distinct {unit}{'' if distinct == 1 else 's'}"
    if split == "train":
        if distinct:
            return f"of its {texts} none is left after dev and test: give it more rows, or make cut_dev and cut_test smaller"
        return f"the {unit}s of all its {dropped} rows are in dev or test: name another path" if dropped else ""
    if source.place(split):
        return ""
    share = getattr(source, f"cut_{split}")
    if share and source.time:
        return f"of its {texts} none is among the newest {share:g}: rows of one time stay together; give it rows of more times"
    if not share:
        return f"cut_{split} is 0: make it a share of the {unit}s, or name a {split}_path"
    return (
        f"of its {texts} none fell into the share of {share:g}: "
        f"give it more rows, a larger cut_{split}, another cut_seed, or a {split}_path"
    )
