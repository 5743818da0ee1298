"""Encoders against transformers, in every form that their files come in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from mtl_jax import pretrained
from mtl_jax.models.disentangled import distance_buckets

torch = pytest.importorskip("torch")
parity = pytest.importorskip("parity", exc_type=ImportError)

TOLERANCE = 1e-5
CASES = [pytest.param(case, marks=pytest.mark.long) if case in parity.SELDOM else case for case in parity.CASES]


@pytest.mark.parametrize("case", CASES, ids=parity.name_of)
def test_in_and_out(case, tmp_path):
    differences = parity.both_ways(case, tmp_path)
    assert max(differences) <= TOLERANCE


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory):
    """A masked LM of transformers, its tensors as it saves them, our answer to them, and the inputs."""
    folder = tmp_path_factory.mktemp("masked_lm")
    model = parity.reference("Bert", "BertForMaskedLM", {})
    model.save_pretrained(folder)
    inputs = parity.batch(model.config)
    return model, load_file(folder / "model.safetensors"), parity.ours(pretrained.load(str(folder)), inputs), inputs


def as_half(kind):
    return lambda tensors: {name: tensor.astype(kind) for name, tensor in tensors.items()}


def old_norms(tensors):
    return {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for name, t in tensors.items()}


FORMS = {
    "no prefix": lambda tensors: {name.removeprefix("bert."): tensor for name, tensor in tensors.items()},
    "a wrapper's prefix": lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    "gamma and beta": old_norms,
    "position_ids": lambda tensors: tensors | {"bert.embeddings.position_ids": np.arange(24)[None]},
    "tied copies": lambda tensors: (
        tensors
        | {
            "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
            "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
        }
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_a_file_mean_the_same(masked_lm, tmp_path, form):
    model, tensors, expected, inputs = masked_lm
    model.config.save_pretrained(tmp_path)
    save_file(FORMS[form](tensors), tmp_path / "model.safetensors", {"format": "pt"})
    loaded = pretrained.load(str(tmp_path))
    assert (loaded.unused, loaded.initialized) == ((), ())
    np.testing.assert_array_equal(parity.ours(loaded, inputs).logits, expected.logits)


def test_two_different_tables_are_not_tied_whatever_the_configuration_says(masked_lm, tmp_path):
    model, tensors, _, inputs = masked_lm
    assert model.config.tie_word_embeddings
    other = {"cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"] + 0.1}
    untied = parity.reference("Bert", "BertForMaskedLM", {"tie_word_embeddings": False})
    untied.load_state_dict(
        {name: torch.from_numpy(t) for name, t in (tensors | other).items()}
        | {"cls.predictions.decoder.bias": torch.from_numpy(tensors["cls.predictions.bias"])}
    )
    model.config.save_pretrained(tmp_path / "in")
    save_file(tensors | other, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    loaded = pretrained.load(str(tmp_path / "in"))
    found = parity.ours(loaded, inputs)
    assert parity.difference(found, parity.theirs(untied, inputs), inputs["attention_mask"]) <= TOLERANCE
    pretrained.save(tmp_path / "out", loaded)
    back = parity.opened_without_a_word(tmp_path / "out", "BertForMaskedLM")
    assert not back.config.tie_word_embeddings
    assert parity.difference(found, parity.theirs(back, inputs), inputs["attention_mask"]) <= TOLERANCE


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "shards"])
def test_half_precision_files(tmp_path, form, kind):
    """Their model of rounded numbers, computed in float32, is what ours is."""
    model = parity.reference("Roberta", "RobertaForTokenClassification", {}).to(getattr(torch, kind))
    if form == "bin":
        model.config.architectures = ["RobertaForTokenClassification"]
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        model.save_pretrained(tmp_path, max_shard_size="10KB" if form == "shards" else "1GB")
    assert (len(list(tmp_path.glob("model-*"))) > 1) == (form == "shards")
    inputs = parity.batch(model.config)
    found = parity.ours(pretrained.load(str(tmp_path)), inputs)
    assert parity.difference(found, parity.theirs(model.float(), inputs), inputs["attention_mask"]) <= TOLERANCE


def test_our_shards_are_theirs(tmp_path):
    model = parity.reference("Electra", "ElectraForPreTraining", {})
    model.save_pretrained(tmp_path / "theirs")
    loaded = pretrained.load(str(tmp_path / "theirs"))
    pretrained.save(tmp_path / "ours", loaded, shard_size=10_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 3
    back = parity.opened_without_a_word(tmp_path / "ours", "ElectraForPreTraining")
    inputs = parity.batch(model.config)
    assert parity.difference(parity.ours(loaded, inputs), parity.theirs(back, inputs), inputs["attention_mask"]) <= TOLERANCE
    assert parity.same(pretrained.load(str(tmp_path / "ours")), loaded)


@pytest.mark.parametrize("auto", ["AutoModelForSequenceClassification", "AutoModelForTokenClassification"])
def test_a_new_head_with_named_labels_goes_out_whole(masked_lm, tmp_path, auto):
    model, tensors, _, inputs = masked_lm
    model.config.save_pretrained(tmp_path / "in")
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    kind = "sequence_classification" if "Sequence" in auto else "token_classification"
    loaded = pretrained.load(str(tmp_path / "in"), head=kind, labels=["no", "perhaps", "yes", "certainly"])
    assert "head/classifier/kernel" in loaded.initialized or "head/tags/kernel" in loaded.initialized
    assert "cls.predictions.transform.dense.weight" in loaded.unused
    pretrained.save(tmp_path / "out", loaded)
    back = parity.opened_without_a_word(tmp_path / "out", auto)
    assert back.config.id2label == {0: "no", 1: "perhaps", 2: "yes", 3: "certainly"}
    assert parity.difference(parity.ours(loaded, inputs), parity.theirs(back, inputs), inputs["attention_mask"]) <= TOLERANCE


def test_given_positions_and_packed_rows_are_those_of_an_example_alone(tmp_path):
    """RoBERTa's own positions begin after the padding id; ours are counted from 0 in every family."""
    model = parity.reference("XLMRoberta", "XLMRobertaModel", {})
    model.save_pretrained(tmp_path)
    loaded = pretrained.load(str(tmp_path))
    first, second = [7, 8, 9, 10], [11, 12, 13]
    packed = loaded.model.trunk.apply(
        {"params": loaded.params["trunk"]},
        np.array([[*first, *second, 5]]),
        np.array([[1] * 7 + [0]]),
        position_ids=np.array([[0, 1, 2, 3, 0, 1, 2, 0]]),
        segment_ids=np.array([[1] * 4 + [2] * 3 + [0]]),
    ).hidden[0]
    for ids, rows in ((first, packed[:4]), (second, packed[4:7])):
        with torch.no_grad():
            alone = model(torch.tensor([ids])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(rows, alone, atol=TOLERANCE)


def test_a_training_step_is_theirs(masked_lm, tmp_path):
    """One step of SGD on every weight, dropout off: cross-entropy at the real tokens."""
    model, _, _, inputs = masked_lm
    model = parity.reference("Bert", "BertForMaskedLM", {})
    model.save_pretrained(tmp_path / "before")
    loaded = pretrained.load(str(tmp_path / "before"))
    targets, real = np.roll(inputs["input_ids"], 1), inputs["attention_mask"].astype(bool)

    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    labels = torch.from_numpy(np.where(real, targets, -100))
    model(**tensors, labels=labels).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * parameter.grad
    model.save_pretrained(tmp_path / "after")

    def loss(params):
        logits = loaded.model.apply({"params": params}, **inputs).logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.where(real, losses, 0.0).sum() / real.sum()

    with jax.default_matmul_precision("highest"):
        gradients = jax.jit(jax.grad(loss), compiler_options=parity.QUICKLY)(loaded.params)
    stepped = jax.tree.map(lambda weight, gradient: weight - 0.5 * gradient, loaded.params, gradients)
    expected = pretrained.load(str(tmp_path / "after")).params
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), loaded.params, expected)
    assert min(jax.tree.leaves(moved)) > 0
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), stepped, expected)
    assert max(jax.tree.leaves(apart)) <= TOLERANCE


def test_distances_are_in_the_buckets_of_torch():
    """The ceiling of a logarithm: a last place more or less would be another bucket."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    for buckets, longest in ((256, 512), (256, 514), (8, 24), (5, 10), (2, 3), (32, 4096)):
        distances = np.arange(-longest - 9, longest + 10)
        expected = make_log_bucket_position(torch.from_numpy(distances), buckets, longest).to(torch.long).numpy()
        np.testing.assert_array_equal(distance_buckets(distances, buckets, longest), expected, err_msg=f"{buckets} {longest}")
