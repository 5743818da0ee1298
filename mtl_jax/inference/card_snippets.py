"""The code in the README.md of an exported model, by the kind of its head, and what the pages of a hub know of that kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mtl_jax.data.source import Source
from mtl_jax.tasks import CausalLM, Classification, Contrastive, Multilabel, Regression, Seq2Seq, Span, Tagging, Task
from mtl_jax.tasks.text_head import TextTask

LABELS = "labels.json"
FOLDER = "path/of/this/directory"

_PIPELINE = """\
from transformers import pipeline

folder = "{folder}"
classify = pipeline("text-classification", model=folder)
{comment}
print(classify({texts}, top_k=None, truncation=True, max_length={length}))
"""
_PIPELINE_COMMENTS: dict[Any, str] = {
    Classification: "# Of each text all labels with their probabilities, the likeliest first.",
    Multilabel: "# Of each text all labels with their probabilities, which do not sum to 1: several may apply, or none.",
    Regression: "# Of each text the predicted value, as the score of its only label.",
}
_HEADLESS = """\
The head reads {vector}. No class of transformers has such a head, so config.json is that of the bare model
and names no labels: a pipeline("text-classification") of this directory has a random head. The head lies beside the trunk,
in the format of sentence-transformers, which gives the task's outputs: {outputs}.
"""
_OUTPUTS: dict[Any, str] = {
    Classification: f"logits in the order of {LABELS}",
    Multilabel: f"logits in the order of {LABELS}",
    Regression: "predicted values",
}
_SNIPPETS: dict[Any, str] = {
    Classification: """\
import json
from pathlib import Path

from sentence_transformers import SentenceTransformer

folder = "{folder}"
labels = json.loads(Path(folder, "{labels}").read_text(encoding="utf-8"))
logits = SentenceTransformer(folder).encode(["a text", "another one"])
print([labels[best] for best in logits.argmax(axis=-1)])
""",
    Multilabel: """\
import json
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

folder = "{folder}"
labels = json.loads(Path(folder, "{labels}").read_text(encoding="utf-8"))
logits = SentenceTransformer(folder).encode(["a text", "another one"])
for probabilities in 1 / (1 + np.exp(-logits)):
    print(dict(zip(labels, probabilities.tolist())))
""",
    Regression: """\
from sentence_transformers import SentenceTransformer

folder = "{folder}"
values = SentenceTransformer(folder).encode(["a text", "another one"])
print(values[:, 0])
""",
    Contrastive: """\
from sentence_transformers import SentenceTransformer

folder = "{folder}"
vectors = SentenceTransformer(folder).encode(["a text", "another one"])
print(vectors @ vectors.T)
""",
    Tagging: """\
from transformers import pipeline

folder = "{folder}"
tags = pipeline("token-classification", model=folder)
print(tags("a text"))
""",
    Span: """\
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForQuestionAnswering.from_pretrained(folder)
question, context = "a question", "a text with the answer"
inputs = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
offsets = inputs.pop("offset_mapping")[0].tolist()
inside = [sequence == 1 for sequence in inputs.sequence_ids()]
outputs = model(**inputs)
starts, ends = outputs.start_logits[0].tolist(), outputs.end_logits[0].tolist()
spans = [
    (starts[start] + ends[end], start, end)
    for start in range(len(inside))
    for end in range(start, len(inside))
    if inside[start] and inside[end]
]
_, start, end = max(spans)
print(context[offsets[start][0] : offsets[end][1]])
""",
    Seq2Seq: """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSeq2SeqLM.from_pretrained(folder)
inputs = tokenizer(["a text"], return_tensors="pt")
tokens = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"])
print(tokenizer.batch_decode(tokens, skip_special_tokens=True))
""",
    CausalLM: """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("a prompt", return_tensors="pt")  # of a task with a chat template: tokenizer.apply_chat_template
print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))
""",
    type(None): """\
from transformers import AutoModel, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder)
print(model(**tokenizer("a text", return_tensors="pt")).last_hidden_state.shape)
""",
}

_TAGS: dict[Any, str] = {
    Contrastive: "sentence-similarity",
    Tagging: "token-classification",
    Span: "question-answering",
    CausalLM: "text-generation",
    type(None): "feature-extraction",
}


class Usage(NamedTuple):
    """How an export is used.

    Attributes:
        library: The library that opens it, as hubs call it.
        tag: The kind of its pipeline, as hubs call it; "" where it has none.
        text: What stands in front of the code; may be empty.
        code: Lines of Python, which name the directory FOLDER.
    """

    library: str
    tag: str
    text: str
    code: str


def usage(task: Task | None, source: Source | None, length: int, pooling: str = "mean") -> Usage:
    """How the export of a trunk with a task's head is used.

    Args:
        task: The task; None: the trunk alone.
        source: Its source.
        length: The longest text in training, in tokens.
        pooling: How the trunk makes a vector of a text: mean or last.
    """
    kind: Any = next((kind for kind in _SNIPPETS if isinstance(task, kind)), type(None))
    if opens_in_pipeline(task):
        pair = source is not None and bool(source.pair)
        texts = '[{"text": "a text", "text_pair": "another one"}]' if pair else '["a text", "another one"]'
        filled = {"folder": FOLDER, "comment": _PIPELINE_COMMENTS[kind], "texts": texts, "length": length}
        return Usage("transformers", "text-classification", "", _PIPELINE.format(**filled))
    code = _SNIPPETS[kind].format(folder=FOLDER, labels=LABELS)
    vector = "the vector of the last token" if pooling == "last" else "the mean of the token vectors"
    if kind in _OUTPUTS:
        # Without a tag: hubs would open a pipeline for it.
        return Usage("sentence-transformers", "", _HEADLESS.format(vector=vector, outputs=_OUTPUTS[kind]), code)
    if kind is Contrastive:
        text = f"A text's vector is {vector}, scaled to length 1; the product of two is their cosine.\n"
        return Usage("sentence-transformers", _TAGS[kind], text, code)
    return Usage("transformers", _seq2seq_tag(task) if isinstance(task, Seq2Seq) else _TAGS[kind], "", code)


def opens_in_pipeline(task: Task | None) -> bool:
    """Whether the task's head is a text classifier of transformers."""
    return isinstance(task, TextTask) and task.classifier is not None


def _seq2seq_tag(task: Seq2Seq) -> str:
    """The tag of a text-to-text task that its fields tell: that of translation or summaries, or none."""
    if task.target_language:
        return "translation"
    return "summarization" if task.metric.startswith("rouge") else ""


def note(task: Task | None, folder: Path) -> str:
    """A hint for opening an export; "" where transformers opens it as usual."""
    if isinstance(task, Contrastive):
        return f"{folder} is a model of sentence-transformers: SentenceTransformer(folder).encode(texts) gives the vectors"
    if not isinstance(task, TextTask) or opens_in_pipeline(task):
        return ""
    return (
        f"transformers has no class for the head of {task.name}: open {folder} with sentence-transformers, as its README.md "
        'shows; pipeline("text-classification") would put a random head in its place (a run with head="family" in the task '
        "opens there)"
    )
