"""The README.md beside a compiled predictor: what the files are, and the lines that run it without this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtl_jax.tasks import Classification, Contrastive, Multilabel, Ordinal, Regression, Span, Tagging, Task

_PAGE = """\
---
library_name: jax
---

# {run}: {task}

Written by mtl_jax: the predictor of the task {task}, {article} {kind}, of the run {run}, as a StableHLO program. It needs jax,
flatbuffers, numpy, safetensors and {tokenizers}; not mtl_jax.

```python
{snippet}```

| file | contents |
|---|---|
| {programs} | {what}, for {platforms}; `jax.export.deserialize` reads it |
| `{parameters}` | the parameters by name: the program's first argument |
| tokenizer files | the tokenizer as transformers saves it |
| `predictor.json` | labels, the names and dtypes of inputs, the output, versions, and the SHA-256 of programs and parameters |

- Inputs are {inputs}, int32[b, t]: {tokens}. The output is {output}{meaning}.
- A text of more than {row_length} tokens is cut.{windows}
- The numbers are those of `mtl_jax.predict`, to rounding. The program computes in {dtype}; parameters are float32.
- jax opens such a program for at least six months of later releases; it was written by jax {jax}.
"""

_IMPORTS = """\
import json
from pathlib import Path

import jax
import jax.export
import numpy as np
from safetensors.numpy import load_file
"""
_FAST = """\
from tokenizers import Tokenizer

folder = Path("path/of/this/directory")
texts = {texts}

about = json.loads((folder / "predictor.json").read_text(encoding="utf-8"))
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.no_padding()
tokenizer.enable_truncation(about["row_length"])
encodings = tokenizer.encode_batch({encoded})
ids, types = [e.ids for e in encodings], [e.type_ids for e in encodings]
"""
_SLOW = """\
from transformers import AutoTokenizer

folder = Path("path/of/this/directory")
texts = {texts}

about = json.loads((folder / "predictor.json").read_text(encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(texts, truncation=True, max_length=about["row_length"])["input_ids"]
types = [[0] * len(row) for row in ids]
"""
_RUN = """\
length = max(len(row) for row in ids)
length = min((n for n in map(int, about["programs"]) if n >= length), default=length)


def padded(rows):
    return np.array([row + [0] * (length - len(row)) for row in rows], np.int32)


inputs = {"input_ids": padded(ids), "attention_mask": padded([[1] * len(row) for row in ids]), "token_type_ids": padded(types)}
inputs = {name: inputs[name] for name in about["inputs"]}
program = jax.export.deserialize((folder / about["programs"].get(str(length), about["program"])).read_bytes())
parameters = jax.device_put(load_file(folder / about["parameters"]))
outputs = np.asarray(jax.jit(program.call)(parameters, inputs))
"""
_ANSWERS: dict[Any, str] = {
    Classification: """\
shares = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
shares /= shares.sum(axis=-1, keepdims=True)
answers = [{"label": about["labels"][row.argmax()], "probability": float(row.max())} for row in shares]
""",
    Multilabel: """\
shares = 1 / (1 + np.exp(-outputs))
answers = [
    {
        "labels": [label for label, share in zip(about["labels"], row) if share > 0.5],
        "probabilities": dict(zip(about["labels"], row.tolist())),
    }
    for row in shares
]
""",
    Ordinal: """\
above = np.minimum.accumulate(1 / (1 + np.exp(-outputs)), axis=-1)  # the probabilities of being above each label
ends = np.ones((len(above), 1)), np.zeros((len(above), 1))
shares, best = -np.diff(np.concatenate([ends[0], above, ends[1]], axis=-1)), (outputs > 0).sum(axis=-1)
answers = [{"label": about["labels"][n], "probability": float(row[n])} for n, row in zip(best, shares)]
""",
    Regression: """\
answers = [{"value": float(value)} for value in outputs[:, 0] * about["scale"]]
""",
    Contrastive: """\
vectors = outputs / np.maximum(np.linalg.norm(outputs, axis=-1, keepdims=True), 1e-6)
answers = [{"vector": row.tolist()} for row in vectors]
""",
    Tagging: """\
answers = []
for words, encoding, row in zip(texts, encodings, outputs):
    first = {word: place for place, word in reversed(list(enumerate(encoding.word_ids))) if word is not None}
    best = [row[first[n]].argmax() if n in first else None for n in range(len(words))]
    answers.append({"words": words, "tags": [about["outside"] if n is None else about["labels"][n] for n in best]})
""",
    Span: """\
answers = []
for (_, context), encoding, row in zip(texts, encodings, outputs):
    places = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
    spans = [(row[a, 0] + row[b, 1], a, b) for a in places for b in places if a <= b < a + about["max_answer"]]
    score, a, b = max(spans, key=lambda span: span[0])
    start, end = encoding.offsets[a][0], encoding.offsets[b][1]
    no_answer = row[0].sum()
    is_answer = no_answer - score <= float(about["no_answer_threshold"])
    answer = {"answer": context[start:end].strip() if is_answer else ""}
    answers.append(answer | {"score": float(score), "no_answer_score": float(no_answer)})
""",
    Task: """\
answers = [{"outputs": row.tolist()} for row in outputs]
""",
}
_MEANINGS: dict[Any, str] = {
    Classification: ", logits in the order of `labels`",
    Multilabel: ", logits in the order of `labels`; a label is predicted where its logit is above 0",
    Ordinal: ", logits of being above each label but the last",
    Regression: ", the value divided by `scale`",
    Contrastive: ", vectors of any length; their cosines are what was trained",
    Tagging: ", logits of the tags in the order of `labels`; a word has those of its first token",
    Span: ", logits of being the first and the last token of the answer",
    Task: "",
}
_TEXTS = {
    "text": '["a text", "another one"]',
    "pair": '[("a text", "a second one"), ("another text", "its second one")]',
    "words": '[["a", "text"], ["another", "one"]]',
}


def readme(run: str, task: Task, about: Mapping[str, Any]) -> str:
    """The page.

    Args:
        run: The experiment's name.
        task: The task.
        about: The contents of predictor.json.
    """
    kind = type(task).__name__
    files = list(about["programs"].values()) or [about["program"]]
    several = f"programs for texts of up to {', '.join(about['programs'])} tokens" if about["programs"] else ""
    return _PAGE.format(
        run=run,
        task=task.name,
        kind=kind,
        article="an" if kind[0] in "AEIOU" else "a",
        tokenizers="tokenizers" if about["fast_tokenizer"] else "transformers",
        snippet=snippet(task, about),
        programs=", ".join(f"`{file}`" for file in files),
        what=several or "the program, for any number of texts and tokens",
        platforms=", ".join(about["platforms"]),
        parameters=about["parameters"],
        inputs=", ".join(f"`{name}`" for name in about["inputs"]),
        tokens="a row for each text, with attention_mask 0 at padding",
        output=about["output"],
        meaning=_of_kind(_MEANINGS, task),
        row_length=about["row_length"],
        windows=" mtl_jax.predict reads a longer one in several windows, and forbids tags that cannot follow each other."
        if isinstance(task, Tagging)
        else " mtl_jax.predict reads a longer one in several windows."
        if task.windows
        else "",
        dtype=about["dtype"],
        jax=about["versions"]["jax"],
    )


def snippet(task: Task, about: Mapping[str, Any]) -> str:
    """The lines that run the predictor of a task."""
    encoded = "texts, is_pretokenized=True" if about["reads"] == "words" else "texts"
    if about.get("space_before_words"):
        encoded = '[[word if n == 0 else f" {word}" for n, word in enumerate(words)] for words in texts], is_pretokenized=True'
    read = (_FAST if about["fast_tokenizer"] else _SLOW).format(texts=_TEXTS[about["reads"]], encoded=encoded)
    return f"{_IMPORTS}{read}{_RUN}{_of_kind(_ANSWERS, task)}print(answers)\n"


def _of_kind(texts: Mapping[Any, str], task: Task) -> str:
    """The text of the first kind that a task is."""
    return next(text for kind, text in texts.items() if isinstance(task, kind))
