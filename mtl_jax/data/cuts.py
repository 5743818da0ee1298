"""How the rows of a source are divided into train, dev and test, and how few of them are taken.

A seeded hash of a text or of its document decides its split, so that it stays there after rows are added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from mtl_jax.data.source import Source


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
    unit = "document" if source.group else "text"
    texts = f"{distinct} distinct {unit}{'' if distinct == 1 else 's'}"
    if split == "train":
        if distinct:
            return f"of its {texts} none is left after dev and test: give it more rows, or make cut_dev and cut_test smaller"
        return f"the {unit}s of all its {dropped} rows are in dev or test: name another path" if dropped else ""
    if source.place(split):
        return ""
    share = getattr(source, f"cut_{split}")
    if not share:
        return f"cut_{split} is 0: make it a share of the {unit}s, or name a {split}_path"
    return (
        f"of its {texts} none fell into the share of {share:g}: "
        f"give it more rows, a larger cut_{split}, another cut_seed, or a {split}_path"
    )
