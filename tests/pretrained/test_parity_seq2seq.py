"""Marian, BART, mBART, Pegasus, M2M100, T5, mT5 and UMT5 against transformers, in both directions."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mtl_jax import pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.pretrained.families import BY_TYPE

torch = pytest.importorskip("torch")
parity = pytest.importorskip("parity_seq2seq", exc_type=ImportError)

CASES = parity.CASES
TOLERANCE = 1e-5
LONG = ("M2M100, untied",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in CASES])
def test_both_ways(name, tmp_path):
    differences = parity.both_ways(CASES[name], tmp_path)
    assert max(differences) <= TOLERANCE, differences


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(name of a case) -> its model, its directory, and what we load from there; made once."""
    made = {}

    def saved(name):
        if name not in made:
            model, folder = parity.reference(CASES[name]), tmp_path_factory.mktemp("model")
            model.save_pretrained(folder)
            made[name] = model, folder, pretrained.load(str(folder))
        return made[name]

    return saved


def rewritten(folder, to, change):
    """A copy of a checkpoint with {name: tensor} changed."""
    to.mkdir(exist_ok=True)
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(change(load_file(folder / "model.safetensors")), to / "model.safetensors")
    return pretrained.load(str(to))


def without_prefix(tensors):
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def with_copies(prefix, others):
    """What files from before safetensors hold beside: the tied table under all its names."""

    def change(tensors):
        names = ["lm_head.weight", f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight"]
        return tensors | dict.fromkeys(names, tensors[f"{prefix}shared.weight"]) | others

    return change


def only_encoder_table(tensors):
    return {name.replace("shared", "encoder.embed_tokens"): tensor for name, tensor in tensors.items()}


POSITIONS = {f"model.{side}.embed_positions.weight": np.zeros((20, 16)) for side in ("encoder", "decoder")}
CROSS_BIAS = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.zeros((8, 3))}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("BART", without_prefix),
        ("BART", with_copies("model.", {"model.encoder.version": np.ones(1)})),
        ("Marian", with_copies("model.", POSITIONS)),
        ("Marian, two tables", lambda t: t | {"lm_head.weight": t["model.decoder.embed_tokens.weight"]}),
        ("T5", with_copies("", CROSS_BIAS)),
        ("T5", only_encoder_table),
        ("mT5", lambda t: {f"module.{key}": tensor for key, tensor in t.items()}),
    ],
    ids=["bare model", "copies", "copies and positions", "copy of the decoder's table", "old T5", "one table", "wrapper"],
)
def test_other_names_load_to_the_same_parameters(saved, tmp_path, name, change):
    _, folder, expected = saved(name)
    found = rewritten(folder, tmp_path, change)
    assert parity.same(found, expected)
    assert found.unused == ()


@pytest.mark.parametrize("name", ["Marian", "Marian, two tables", "T5"])
def test_bin_files_hold_one_table_under_several_names(saved, tmp_path, name):
    model, folder, expected = saved(name)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = model.state_dict()
    assert "lm_head.weight" in tensors
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    found = pretrained.load(str(tmp_path))
    assert parity.same(found, expected)
    assert found.unused == ()


def test_without_a_bias_of_logits_it_is_zero(saved, tmp_path):
    _, folder, _ = saved("Marian")
    found = rewritten(folder, tmp_path, lambda t: {name: t[name] for name in t if name != "final_logits_bias"})
    np.testing.assert_array_equal(found.params["head"]["final_logits_bias"], np.zeros((1, parity.VOCAB)))


def test_an_older_untied_file_has_one_table_for_both_sides(saved, tmp_path):
    """transformers 4 kept encoder and decoder on one table where the output was not tied."""
    _, folder, _ = saved("BART, untied")
    parts = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    params = rewritten(folder, tmp_path, lambda t: {name: t[name] for name in t if name not in parts}).params
    tables = [params[side]["embeddings"]["word"]["embedding"] for side in ("trunk", "head")]
    np.testing.assert_array_equal(*tables)


@pytest.mark.parametrize("name", ["Marian", "T5 1.1"])
def test_half_precision_files(name, tmp_path):
    case = CASES[name]
    parity.reference(case).half().save_pretrained(tmp_path)
    model = type(parity.reference(case)).from_pretrained(tmp_path, dtype=torch.float32).eval()
    inputs = parity.batch(case)
    found = parity.ours(pretrained.load(str(tmp_path)), inputs)
    assert parity.difference(found, parity.theirs(model, inputs), inputs) <= TOLERANCE


@pytest.mark.parametrize("name", ["mBART", "T5 1.1"])
def test_gradients(saved, name):
    """Of a loss over all logits, for every parameter that both have."""
    model, _, checkpoint = saved(name)
    inputs = parity.batch(CASES[name])
    weights = np.random.default_rng(1).normal(size=(3, 10, parity.VOCAB)).astype(np.float32)
    weights *= inputs["decoder_attention_mask"][..., None]

    model.zero_grad()
    out = model(**{key: torch.from_numpy(value) for key, value in inputs.items()})
    (out.logits * torch.from_numpy(weights)).sum().backward()
    expected = {key: tensor.grad.numpy() for key, tensor in model.named_parameters() if tensor.grad is not None}

    def loss(params):
        return (checkpoint.model.apply({"params": params}, **inputs).logits * weights).sum()

    family = BY_TYPE[checkpoint.raw["model_type"]]
    seen = 0
    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(checkpoint.params)):
        ours = jax.tree_util.keystr(path, simple=True, separator="/")
        names = [prefix + key for key in family.names(ours, checkpoint.config) for prefix in ("", family.prefix)]
        theirs = next((expected[key] for key in names if key in expected), None)
        if theirs is None:
            assert ours == "head/final_logits_bias"  # which torch does not train
            continue
        theirs = theirs.T if ours.endswith("kernel") else theirs
        np.testing.assert_allclose(gradient, theirs, rtol=1e-4, atol=1e-4 * max(1, np.abs(theirs).max()), err_msg=ours)
        seen += 1
    assert seen == len(expected)


def test_the_encoder_alone(saved, tmp_path):
    _, folder, whole = saved("T5")
    trunk = pretrained.load(str(folder), head=None)
    assert set(trunk.params) == {"trunk"}
    inputs = parity.batch(CASES["T5"])
    arguments = inputs["input_ids"], inputs["attention_mask"]
    hidden = jax.jit(trunk.model.apply)({"params": trunk.params}, *arguments).hidden
    np.testing.assert_array_equal(hidden, jax.jit(whole.model.apply)({"params": whole.params}, *arguments).hidden)

    pretrained.save(tmp_path / "encoder", trunk)
    back = parity.opened_without_a_word(tmp_path / "encoder", "T5EncoderModel")
    with torch.no_grad():
        expected = back(*map(torch.from_numpy, arguments)).last_hidden_state.numpy()
    real = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(hidden[real], expected[real], atol=TOLERANCE)

    _, folder, _ = saved("BART")
    with pytest.raises(UserError, match="no class for a bart model without a head"):
        pretrained.save(tmp_path / "bart", pretrained.load(str(folder), head=None))


def test_a_new_head_over_labels_keeps_the_decoder(saved, tmp_path):
    _, folder, lm = saved("BART")
    rows = pretrained.load(str(folder), head="sequence_classification", labels=["no", "yes", "perhaps", "never"])
    jax.tree.map(
        np.testing.assert_array_equal,
        rows.params["head"]["decoder"],
        {name: leaf for name, leaf in lm.params["head"].items() if name != "final_logits_bias"},
    )
    assert sorted({path.split("/")[1] for path in rows.initialized}) == ["classifier", "dense"]
    pretrained.save(tmp_path / "rows", rows)
    back = parity.opened_without_a_word(tmp_path / "rows", "BartForSequenceClassification")
    inputs = parity.batch(CASES["BART, rows"])
    assert parity.difference(parity.ours(rows, inputs), parity.theirs(back, inputs), inputs) <= TOLERANCE


def test_an_output_that_is_the_table_after_all_is_tied(saved, tmp_path):
    """config.json of T5 1.1 says untied; the file decides, and the missing scale stays missing."""
    _, folder, _ = saved("T5 1.1, tied")
    raw = json.loads((folder / "config.json").read_text())
    del raw["scale_decoder_outputs"]
    (tmp_path / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    older = pretrained.load(str(tmp_path))
    assert "lm_head" not in older.params["head"]
    pretrained.save(tmp_path / "again", older)
    assert parity.same(pretrained.load(str(tmp_path / "again")), older)
    inputs = parity.batch(CASES["T5"])
    back = parity.opened_without_a_word(tmp_path / "again", "T5ForConditionalGeneration")
    assert parity.difference(parity.ours(older, inputs), parity.theirs(back, inputs), inputs) <= TOLERANCE
