"""Which split a text falls into, which rows a limit leaves, and what to do where a split is empty."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtl_jax.data.sources import Source


def shares(source: Source) -> dict[str, float]:
    """The shares of the source's path that become dev and test; 0 where a split has a file of its own."""
    return {"dev": 0.0 if source.dev_path else source.cut_dev, "test": 0.0 if source.test_path else source.cut_test}


def cut(key: str, seed: int, cuts: Mapping[str, float]) -> str:
    """The split of a text: a hash of seed and text, as a number in [0, 1), falls into one of the shares."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    at = int.from_bytes(digest[:8], "big") / 2**64
    if at < cuts["test"]:
        return "test"
    return "dev" if at < cuts["test"] + cuts["dev"] else "train"


def drawn(identities: Sequence[bytes], source: Source, split: str) -> Sequence[int]:
    """The places, ascending, of the rows that the source's limits leave in a split: drawn by a hash of cut_seed and text.

    So they are of all classes, also where the file is sorted, and the rows of a smaller limit are among those of a larger one.

    Args:
        identities: A digest of each row's text.
        source: The source.
        split: The split that the rows are of.
    """
    limits = (source.limit, source.limit_train if split == "train" else 0)
    most = min((limit for limit in limits if limit), default=len(identities))
    if most >= len(identities):
        return range(len(identities))
    seed = f"{source.cut_seed}\0limit\0".encode()

    def rank(place: int) -> tuple[bytes, int]:
        return hashlib.blake2b(seed + identities[place], digest_size=8).digest(), place

    return sorted(sorted(range(len(identities)), key=rank)[:most])


def advice(source: Source, split: str, distinct: int, dropped: int) -> str:
    """Why a split is empty and what to do, as far as that is known.

    Args:
        source: The source.
        split: The empty split.
        distinct: Texts that were cut from the source's path, or its documents where it has a group.
        dropped: Training rows that were dropped because their text occurred before, or in dev or test.
    """
    what = "document" if source.group else "text"
    count = f"{distinct} distinct {what}{'' if distinct == 1 else 's'}"
    if split == "train":
        if distinct:
            return f"of its {count} none is left beside dev and test: give it more rows, or make cut_dev and cut_test smaller"
        return f"the {what}s of all its {dropped} rows stand in dev or test: name another path" if dropped else ""
    if getattr(source, f"{split}_path"):
        return ""
    share = getattr(source, f"cut_{split}")
    if not share:
        return f"cut_{split} is 0: make it a share of the {what}s, or name a {split}_path"
    return (
        f"of its {count} none fell into the share of {share:g} that is drawn: "
        f"give it more rows, a larger cut_{split}, another cut_seed, or a {split}_path"
    )
