"""The README.md of an exported model: the content of the directory, and code that uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtl_jax.tasks import CausalLM, Classification, Contrastive, Regression, Seq2Seq, Span, Tagging, Task

LABELS = "labels.json"

_HEADLESS = """\
The head reads the mean of the token vectors. No class of transformers has such a head, so config.json is that of the bare model
and names no labels: a pipeline("text-classification") of this directory has a random head. The head lies beside the trunk,
in the format of sentence-transformers, which gives the task's outputs: {outputs}.
"""
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
_LIBRARIES: dict[Any, str] = dict.fromkeys((Classification, Regression, Contrastive), "sentence-transformers")
_OUTPUTS: dict[Any, str] = {Classification: f"logits in the order of {LABELS}", Regression: "predicted values"}


def card(run: str, task: Task | None, raw: Any) -> str:
    """The text of the card.

    Args:
        run: The experiment's name.
        task: The task whose head is in the directory; None: the trunk alone.
        raw: The config.json of the trunk.
    """
    kind: Any = next((kind for kind in _SNIPPETS if isinstance(task, kind)), type(None))
    library = _LIBRARIES.get(kind, "transformers")
    head = "" if task is None else f" with the head of the task {task.name}, {_article(type(task).__name__)}"
    parts = [
        f"---\nlibrary_name: {library}\n---\n",
        f"# {run}{'' if task is None else f': {task.name}'}\n",
        f"Written by mtl_jax: the trunk{head}, of the run {run}. The trunk is a {raw.get('model_type')} model.\n",
    ]
    if kind in _OUTPUTS:
        parts.append(_HEADLESS.format(outputs=_OUTPUTS[kind]))
    if kind is Contrastive:
        parts.append(
            "A text's vector is the mean of its token vectors, scaled to length 1; the product of two is their cosine.\n"
        )
    parts.append(f"```python\n{_SNIPPETS[kind].format(folder='path/of/this/directory', labels=LABELS)}```\n")
    return "\n".join(parts)


def note(task: Task | None, folder: Path) -> str:
    """A hint for opening an export; "" where transformers opens it as usual."""
    if isinstance(task, Contrastive):
        return f"{folder} is a model of sentence-transformers: SentenceTransformer(folder).encode(texts) gives the vectors"
    if not isinstance(task, Classification | Regression):
        return ""
    return (
        f"transformers has no class for the head of {task.name}: open {folder} with sentence-transformers, as its README.md "
        'shows; pipeline("text-classification") would put a random head in its place'
    )


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
