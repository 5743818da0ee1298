"""setfit with the trunk, rows and steps of few_labels.py: an optional peer, for its column in the table.

It needs setfit, sentence-transformers, evaluate, accelerate, datasets and torch.
"""

import importlib.util
import shutil
from pathlib import Path

import few_labels_sets as sets
from few_labels_methods import LAYERS, METHODS, MINILM, Comparison, Run

from mtl_jax.core import assets


def is_installed() -> bool:
    """Whether setfit can be imported."""
    return importlib.util.find_spec("setfit") is not None


def score_of(comparison: Comparison, run: Run, workdir: Path) -> float:
    """Trains setfit with the same trunk, top layers, steps and tokens of a step; its metric on test."""
    import datasets
    import setfit as peer_package
    import torch
    from sentence_transformers import SentenceTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score

    torch.manual_seed(run.draw)
    trunk = workdir / "trunk"
    inside = assets.locate(MINILM.path)
    for folder in ("", "1_Pooling"):
        (trunk / folder).mkdir(parents=True, exist_ok=True)
        for file in (inside / folder if folder else inside).iterdir():
            if file.is_file():
                (trunk / folder / file.name).write_bytes(file.read_bytes())
    body = SentenceTransformer(str(trunk), device="cpu")
    body.max_seq_length = sets.ROW_LENGTH
    top = tuple(f"layer.{LAYERS - 1 - number}." for number in range(comparison.layers))
    for path, parameter in body.named_parameters():
        parameter.requires_grad = any(part in path for part in top)
    model = peer_package.SetFitModel(model_body=body, model_head=LogisticRegression(max_iter=1000))
    arguments = peer_package.TrainingArguments(
        output_dir=str(workdir),
        batch_size=8,
        max_steps=comparison.steps,
        body_learning_rate=METHODS["contrastive, head"].strength,
        seed=run.draw,
        save_strategy="no",
        report_to="none",
    )
    train, _ = sets.drawn(run.set, run.rows, run.draw)
    test = sets.rows_of(run.set).test
    trainer = peer_package.Trainer(model=model, args=arguments, train_dataset=datasets.Dataset.from_list(train))
    trainer.train()
    shutil.rmtree(trunk)
    predicted = [str(label) for label in model.predict([row["text"] for row in test])]
    labels = [row["label"] for row in test]
    if sets.SETS[run.set].metric == "accuracy":
        return float(accuracy_score(labels, predicted))
    return float(f1_score(labels, predicted, average="macro"))
