"""Random tiny models of transformers beside ours: the same numbers in, and the same numbers back out.

python tests/pretrained/parity.py prints the table: family x head x largest difference in both directions.
"""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from mtl_jax import pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

QUICKLY = {"xla_backend_optimization_level": 0}  # each program here runs once, on a few numbers
VOCAB, TYPES = 60, 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "type_vocab_size": TYPES,
    "initializer_range": 0.1,
    "num_labels": 3,
}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
DISTIL |= {name: SIZES[name] for name in ("vocab_size", "max_position_embeddings", "initializer_range", "num_labels")}
MODERN = {name: value for name, value in SIZES.items() if name != "type_vocab_size"}
# A window of 2 on either side, in rows of 11 tokens; the token ids' defaults lie beyond the vocabulary.
MODERN |= {"num_hidden_layers": 4, "local_attention": 4}
MODERN |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
MODERN_BIASES = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)
MODERN_LAYERS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
ROTATIONS = {"full_attention": {"rope_type": "default", "rope_theta": 500.0}}
ROTATIONS |= {"sliding_attention": {"rope_type": "default", "rope_theta": 20.0}}
# Published DeBERTa-v3; distances of 5 and more share buckets, in rows of 11 tokens.
DEBERTA = SIZES | {"type_vocab_size": 0, "relative_attention": True, "position_buckets": 8, "max_relative_positions": 10}
DEBERTA |= {"position_biased_input": False, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm"}
# Published DeBERTa-v2 and what else its fields allow: maps of positions, a convolution, absolute positions, types.
DEBERTA_V2 = {"share_att_key": False, "conv_kernel_size": 3, "conv_groups": 2, "conv_act": "gelu", "norm_rel_ebd": "none"}
DEBERTA_V2 |= {"position_buckets": -1, "max_relative_positions": 4, "position_biased_input": True, "type_vocab_size": TYPES}
DEBERTA_V2 |= {"embedding_size": 20, "pooler_hidden_act": "tanh"}
SHARED = {"num_hidden_layers": 3, "num_hidden_groups": 2, "inner_group_num": 2}
# Beginning of the class names -> fields of the configuration. Epsilons and padding ids that are nobody's default.
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": SIZES | {"layer_norm_eps": 1e-3},
    "Roberta": SIZES | {"pad_token_id": 1, "layer_norm_eps": 1e-5},
    "XLMRoberta": SIZES | {"pad_token_id": 5, "hidden_act": "gelu_new"},
    "DistilBert": DISTIL | {"activation": "relu"},
    "Electra": SIZES | {"embedding_size": 20, "hidden_act": "silu"},
    "ModernBert": MODERN,
    "Camembert": SIZES | {"pad_token_id": 1},
    "MPNet": {name: value for name, value in SIZES.items() if name != "type_vocab_size"} | {"pad_token_id": 1},
    "Albert": SIZES | {"embedding_size": 20},
    "DebertaV2": DEBERTA,
    "NomicBert": SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "Gte": SIZES,
    "EuroBert": {name: value for name, value in SIZES.items() if name != "type_vocab_size"}
    | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 4},
}
HEADS = {
    "Model": None,
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "ForMaskedLM": "masked_lm",
}
# Family, class name, kind of head, changes to the configuration.
CASES: list[tuple[str, str, str | None, dict[str, Any]]] = [
    *(
        (name, name + end, kind, {"num_labels": 2} if kind == "question_answering" else {})
        for name in FAMILIES
        for end, kind in HEADS.items()
        if hasattr(transformers, name + end)
    ),
    *((name, f"{name}ForMaskedLM", "masked_lm", {"tie_word_embeddings": False}) for name in FAMILIES),
    (
        "EuroBert",
        "EuroBertForSequenceClassification",
        "sequence_classification",
        {"classifier_pooling": "mean", "mlp_bias": True},
    ),
    ("EuroBert", "EuroBertForSequenceClassification", "sequence_classification", {"classifier_pooling": "bos"}),
    ("EuroBert", "EuroBertForMaskedLM", "masked_lm", {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True}),
    ("Gte", "GteModel", None, {"type_vocab_size": 0, "hidden_act": "silu"}),
    ("Albert", "AlbertModel", None, SHARED),
    ("Albert", "AlbertModel", None, {"embedding_size": 32}),
    ("DebertaV2", "DebertaV2Model", None, DEBERTA_V2),
    ("DebertaV2", "DebertaV2Model", None, {"pos_att_type": "c2p", "position_buckets": 5, "max_relative_positions": -1}),
    ("DebertaV2", "DebertaV2Model", None, {"pos_att_type": ["p2c"], "share_att_key": False, "conv_kernel_size": 5}),
    ("DebertaV2", "DebertaV2ForMaskedLM", "masked_lm", {"legacy": False}),
    ("DebertaV2", "DebertaV2ForMaskedLM", "masked_lm", {"legacy": False, "tie_word_embeddings": False}),
    ("DebertaV2", "DebertaV2ForSequenceClassification", "sequence_classification", DEBERTA_V2),
    ("Electra", "ElectraForPreTraining", "replaced_token", {}),
    ("Electra", "ElectraModel", None, {"embedding_size": 32}),
    ("Bert", "BertModel", None, {"hidden_act": "gelu_pytorch_tanh", "type_vocab_size": 1}),
    ("ModernBert", "ModernBertModel", None, {"local_attention": 5}),
    ("ModernBert", "ModernBertModel", None, {"layer_types": MODERN_LAYERS, "rope_parameters": ROTATIONS}),
    ("ModernBert", "ModernBertForMaskedLM", "masked_lm", {"norm_bias": True, "decoder_bias": False}),
    ("ModernBert", "ModernBertForSequenceClassification", "sequence_classification", {"classifier_pooling": "mean"}),
    ("ModernBert", "ModernBertForTokenClassification", "token_classification", MODERN_BIASES),
    ("ModernBert", "ModernBertForTokenClassification", "token_classification", {"classifier_activation": "relu"}),
]


# Their heads are modules of other families, and of each family one is among the stored answers: compared where there is time.
SELDOM = [
    case
    for case in CASES
    if case[0] in ("Camembert", "MPNet", "Albert", "NomicBert", "Gte", "EuroBert") and case[2] is not None
]
SELDOM += [case for case in CASES if case[0] in ("Albert", "Gte") and case[3] not in ({}, SHARED)]
SELDOM += [case for case in CASES if case[0] == "DebertaV2" and {"pos_att_type", "legacy", "tie_word_embeddings"} & {*case[3]}]
SELDOM += [case for case in CASES if case[1] in ("DebertaV2ForTokenClassification", "DebertaV2ForQuestionAnswering")]


class Answer(NamedTuple):
    """hidden f[B, T, H], logits in the shape of the head's kind or None, pooled f[B, H] or None."""

    hidden: np.ndarray
    logits: np.ndarray | None
    pooled: np.ndarray | None


def name_of(case: tuple[str, str, str | None, dict[str, Any]]) -> str:
    _, cls, _, changes = case
    shown = {
        key: "" if isinstance(value, list | dict) else f" {value}" for key, value in changes.items() if key != "num_labels"
    }
    return cls + "".join(f", {key}{value}" for key, value in shown.items())


def reference(family: str, cls: str, changes: dict[str, Any], seed: int = 0) -> Any:
    """A random model of transformers. Norms and biases are random too, because 1 and 0 hide mistakes."""
    torch.manual_seed(seed)
    fields = FAMILIES[family] | changes
    if not cls.endswith("Model"):  # blocks are compared under the bare model; under a head fewer of them compile sooner
        layers = "n_layers" if "n_layers" in fields else "num_hidden_layers"
        fields |= {layers: fields[layers] // 2}
    config = getattr(transformers, f"{family}Config")(**fields, attn_implementation="eager")
    model = getattr(transformers, cls)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def batch(config: Any) -> dict[str, np.ndarray]:
    """Rows that are full, padded on the right, full of holes, and padded on the left."""
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(6, VOCAB, (4, 11)), np.ones((4, 11), np.int64)
    mask[1, 7:] = 0
    mask[2, 2:9:3] = 0
    mask[3, :3] = 0
    ids[1, 7:] = ids[3, :3] = config.pad_token_id
    inputs = {"input_ids": ids, "attention_mask": mask}
    types = getattr(config, "type_vocab_size", 0)
    return inputs | ({"token_type_ids": rng.integers(0, types, ids.shape)} if types else {})


def theirs(model: Any, inputs: dict[str, np.ndarray]) -> Answer:
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.no_grad():
        base, out = model.base_model(**tensors), model(**tensors)
    logits = out.get("logits")
    if "start_logits" in out:
        logits = torch.stack([out["start_logits"], out["end_logits"]], -1)
    pooled = out.get("pooler_output")
    return Answer(base.last_hidden_state.numpy(), *(None if x is None else x.numpy() for x in (logits, pooled)))


def ours(checkpoint: pretrained.Checkpoint, inputs: dict[str, np.ndarray]) -> Answer:
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(checkpoint.model.apply, compiler_options=QUICKLY)
        out = apply({"params": checkpoint.params}, **inputs)
    return Answer(*(None if x is None else np.asarray(x) for x in (out.hidden, out.logits, out.pooled)))


def difference(found: Answer, expected: Answer, mask: np.ndarray) -> float:
    """The largest difference at real tokens; a row's own logits count where its first token is real."""
    real = mask.astype(bool)
    largest = [np.abs(found.hidden - expected.hidden)[real].max()]
    assert (found.logits is None) == (expected.logits is None)
    if found.logits is not None:
        assert found.logits.shape == expected.logits.shape
        per_token = found.logits.shape[:2] == mask.shape
        largest.append(np.abs(found.logits - expected.logits)[real if per_token else real[:, 0]].max())
    if expected.pooled is not None:
        largest.append(np.abs(found.pooled - expected.pooled)[real[:, 0]].max())
    return float(max(largest))


def opened_without_a_word(folder: Path, cls: str) -> Any:
    """Their model from our directory; no key missing, unexpected or of another shape."""
    model, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    return model.eval()


def same(a: pretrained.Checkpoint, b: pretrained.Checkpoint) -> bool:
    """Whether two checkpoints are equal bit for bit."""
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    return a.config == b.config and jax.tree.all(jax.tree.map(np.array_equal, a.params, b.params))


class Differences(NamedTuple):
    inwards: float
    outwards: float


def both_ways(case: tuple[str, str, str | None, dict[str, Any]], folder: Path) -> Differences:
    """Their model to ours, and ours back to theirs, on the way asserting everything that is no number."""
    family, cls, kind, changes = case
    model = reference(family, cls, changes)
    model.save_pretrained(folder / "theirs")
    inputs = batch(model.config)
    loaded = pretrained.load(str(folder / "theirs"))
    assert (loaded.head, loaded.unused, loaded.initialized) == (kind, (), ())
    found = ours(loaded, inputs)
    inwards = difference(found, theirs(model, inputs), inputs["attention_mask"])
    pretrained.save(folder / "ours", loaded)
    back = opened_without_a_word(folder / "ours", cls)
    outwards = difference(found, theirs(back, inputs), inputs["attention_mask"])
    assert same(pretrained.load(str(folder / "ours")), loaded)
    return Differences(inwards, outwards)


if __name__ == "__main__":
    print("| transformers class | largest difference in | out |\n|---|---|---|")
    for one in CASES:
        with tempfile.TemporaryDirectory() as at:
            print(f"| {name_of(one)} | {' | '.join(f'{number:.1e}' for number in both_ways(one, Path(at)))} |", flush=True)
