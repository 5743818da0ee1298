"""Words are replaced by words that a masked LM predicts in their place; no list of words is needed.

Shapes in names: B texts, T tokens, K candidates of a token, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import pretrained
from mtl_jax.augment import similar_rows as similar
from mtl_jax.augment.aligned import UNCHANGED, EditWords, Word, Words, edited
from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.files import shown
from mtl_jax.data.augmentations import check_shares
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import Augmentation, AugmentedRows, MakeRows
from mtl_jax.data.tokenize import encode
from mtl_jax.models.trunk_output import token_table
from mtl_jax.tasks import MaskedLM

TEXTS = 16  # texts of a batch
LENGTHS = (16, 32, 64, 128)  # tokens of a batch, a program for each; words after the last do not change


class MaskedModel(NamedTuple):
    """A masked LM.

    Attributes:
        tokenizer: Its tokenizer.
        max_length: The most tokens of a text.
        candidates: (ids i32[B, T], mask i32[B, T]) -> probabilities f32[B, T, K] and tokens i32[B, T, K], most likely first.
    """

    tokenizer: Any
    max_length: int
    candidates: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def open_masked_model(path: str, top: int, where: str) -> MaskedModel:
    """A masked LM: an encoder checkpoint with such a head, or a run of ours with a MaskedLM task.

    Args:
        path: A directory, pip:ASSET/MEMBER, a hub id; or a workdir.
        top: K.
        where: The beginning of an error line.

    Raises:
        UserError: It cannot be opened, or is not a masked LM.
    """
    logits: Callable[[Any, jax.Array, jax.Array], jax.Array]
    if (Path(path) / "data.json").is_file():
        import mtl_jax  # a run is opened by the public door: models stand above this package

        run = mtl_jax.load_model(path).run
        tasks = [task for task in run.tasks if isinstance(task, MaskedLM)]
        if not tasks:
            raise UserError(
                f"{where}: the run in {shown(path)} has no MaskedLM task, but {listed(task.name for task in run.tasks)}"
            )
        tokenizer, params, length = run.trunk.tokenizer, run.params, run.experiment.batch.row_length
        task, module = tasks[0], run.trunk.module

        def logits(params: Any, ids_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
            output: Any = module.apply({"params": params["trunk"]}, ids_BxT, mask_BxT)
            return task.logits(params["heads"][task.name], output.hidden, token_table(params["trunk"]))
    else:
        checkpoint = pretrained.load(path)
        if checkpoint.head != "masked_lm":
            raise UserError(f"{where}: {shown(path)} has no head of a masked LM; name a checkpoint such as bert-base-uncased")
        tokenizer, params, model = checkpoint.tokenizer, checkpoint.params, checkpoint.model
        length = checkpoint.config.max_length or LENGTHS[-1]

        def logits(params: Any, ids_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
            output: Any = model.apply({"params": params}, ids_BxT, mask_BxT)
            return jnp.asarray(output.logits, jnp.float32)

    if tokenizer.mask_token_id is None:
        raise UserError(f"{where}: the tokenizer of {shown(path)} has no mask token")

    @jax.jit
    def best(params: Any, ids_BxT: jax.Array, mask_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.top_k(jax.nn.softmax(logits(params, ids_BxT, mask_BxT)), top)

    return MaskedModel(tokenizer, min(length, LENGTHS[-1]), functools.partial(best, params))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedNeighbours(Augmentation):
    """Some words are hidden from a masked LM and replaced by words that it predicts there (Kobayashi, 2018; Wu et al., 2019).

    Rows whose meaning changes too much are left out. Words of entities and answers stay. Rows are made before training; to draw
    anew in every pass, write several for each row with mtl-jax augment and train with Written(added=0).

    Attributes:
        share: As in all augmentations.
        added: As in all augmentations; at least 1.
        seed: As in all augmentations.
        model: The masked LM: an encoder checkpoint with such a head, or the workdir of a run with a MaskedLM task.
        words: The share of a text's words that are replaced, at least one.
        top: A word is drawn, by its probability, from this many of the model's most likely words.
        similarity: The least cosine of the vectors of a text and its changed text, by `encoder`.
        encoder: minilm, or a path as of mtl-jax audit --embeddings. Empty: nothing is left out.

    References:
        https://arxiv.org/abs/1805.06201, https://arxiv.org/abs/1812.06705

    Examples:
        >>> masked = mtl_jax.augment.MaskedNeighbours(model="bert-base-uncased", words=0.15)
        >>> source = mtl_jax.Source("reviews", "reviews.csv", augment=(masked,))
    """

    share: float = 1.0
    added: int = 1
    model: str
    words: float = 0.15
    top: int = 10
    similarity: float = 0.8
    encoder: str = "minilm"

    keeps: ClassVar[tuple[str, ...]] = ("example", "word", "answer")
    in_passes: ClassVar[bool] = False

    def check(self, where: str) -> None:
        check_shares(self, where, "words")
        similar.check(where, self.similarity)
        if self.top < 1:
            raise UserError(f"{where}: top is {self.top}; it must be at least 1")
        if not self.model:
            raise UserError(f"{where}: model is empty; name a masked LM: a checkpoint, or a run with a MaskedLM task")

    def maker(self, source: AugmentedRows) -> MakeRows:
        model = open_masked_model(self.model, self.top + 1, f"source {source.source.name!r}: model of MaskedNeighbours")
        keep = similar.keep_similar(source, self.encoder, self.similarity)

        def make(rows: Sequence[Row], generators: Sequence[np.random.Generator]) -> list[Row | str]:
            asked: list[_Hidden] = []

            def hide(words: Words, rng: np.random.Generator) -> list[Word]:
                free = np.flatnonzero(~words.fixed)
                number = min(len(free), max(1, round(self.words * len(words.texts))))
                chosen = np.sort(rng.choice(free, number, replace=False)).tolist() if number else []
                asked.append(_Hidden(words.texts, chosen, rng.random(len(chosen))))
                return [Word(text, place) for place, text in enumerate(words.texts)]

            firsts: list[int] = []  # among the texts that are asked for, the first of each row
            for row, rng in zip(rows, generators, strict=True):
                firsts.append(len(asked))
                edited(row, source, hide, rng)
            predicted = _replaced(model, asked)

            def put(new_words: Iterator[dict[int, str]]) -> EditWords:
                def edit(words: Words, rng: np.random.Generator) -> list[Word]:
                    new = next(new_words)
                    return [Word(new.get(n, text), n, keeps_label=n not in new) for n, text in enumerate(words.texts)]

                return edit

            made = [
                edited(row, source, put(iter(predicted[first:])), rng)
                for row, first, rng in zip(rows, firsts, generators, strict=True)
            ]
            return keep(rows, ["no other word fits" if new == UNCHANGED else new for new in made])

        return make


class _Hidden(NamedTuple):
    """A text with the words that the model is to replace, and a number from 0 to 1 for each."""

    words: list[str]
    chosen: list[int]
    draws: np.ndarray


def _replaced(model: MaskedModel, texts: Sequence[_Hidden]) -> list[dict[int, str]]:
    """{word: the word in its place} for each text."""
    tokenizer, mask = model.tokenizer, model.tokenizer.mask_token_id
    encoded = encode(tokenizer, [text.words for text in texts], max_length=model.max_length) if texts else None
    result: list[dict[int, str]] = [{} for _ in texts]
    order = sorted(range(len(texts)), key=lambda n: len(encoded.tokens[n]) if encoded else 0)
    for start in range(0, len(order), TEXTS):
        part = order[start : start + TEXTS]
        assert encoded is not None
        assert encoded.words is not None
        hidden = [_hide(encoded.tokens[n], encoded.words[n], set(texts[n].chosen), mask, tokenizer) for n in part]
        length = next((size for size in LENGTHS if size >= max(len(ids) for ids, _ in hidden)), LENGTHS[-1])
        ids_BxT, mask_BxT = np.zeros((2, TEXTS, length), np.int32)
        for row, (ids, _) in enumerate(hidden):
            ids_BxT[row, : len(ids)], mask_BxT[row, : len(ids)] = ids, 1
        probabilities, tokens = map(np.asarray, model.candidates(ids_BxT, mask_BxT))
        for row, n in enumerate(part):
            for word, draw in zip(texts[n].chosen, texts[n].draws.tolist(), strict=True):
                place = hidden[row][1].get(word)
                if place is None:  # after the last token, or not in the vocabulary
                    continue
                if new := _drawn(tokenizer, texts[n].words[word], tokens[row, place], probabilities[row, place], draw):
                    result[n][word] = new
    return result


def _hide(ids: np.ndarray, words: np.ndarray, chosen: set[int], mask: int, tokenizer: Any) -> tuple[list[int], dict[int, int]]:
    """The tokens of a text with one mask in place of each chosen word, and {word: the place of its mask}."""
    special = set(tokenizer.all_special_ids)
    result: list[int] = []
    places: dict[int, int] = {}
    current = -1
    for token, word in zip(ids.tolist(), words.tolist(), strict=True):
        if word >= 0:
            current = word
        elif token in special and token != tokenizer.unk_token_id:
            current = -1
        if current in chosen:
            if word >= 0:
                places[word] = len(result)
                result.append(mask)
        else:
            result.append(token)
    return result, places


def _drawn(tokenizer: Any, word: str, tokens: np.ndarray, probabilities: np.ndarray, draw: float) -> str:
    """One of the candidates by its probability, in the case of the old word; "" if none is another whole word."""
    candidates: list[str] = []
    weights: list[float] = []
    special = set(tokenizer.all_special_ids)
    for token, weight in zip(tokens.tolist(), probabilities.tolist(), strict=True):
        piece = str(tokenizer.convert_ids_to_tokens(token))
        text = tokenizer.decode([token]).strip()
        if token in special or piece.startswith("##") or not text or len(text.split()) != 1:
            continue
        if text.isalpha() != word.isalpha() or text.lower() == word.lower():
            continue
        candidates.append(text.capitalize() if word.istitle() and text.islower() else text)
        weights.append(weight)
    if not candidates:
        return ""
    cumulated = np.cumsum(weights)
    return candidates[min(int(np.searchsorted(cumulated, draw * cumulated[-1], side="right")), len(candidates) - 1)]
