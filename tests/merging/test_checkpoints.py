"""mtl-jax merge over Hugging Face directories."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from mtl_jax import pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.merging import Method, merge
from mtl_jax.transfer import merge_methods

METHODS = [
    Method("soup"),
    Method("average", weights=(1.0, 3.0)),
    Method("arithmetic", scale=(0.5,)),
    Method("ties", keep=0.3),
    Method("dare", drop=0.5, seed=1),
    Method("dare_ties", drop=0.5, keep=0.3),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base; three classifiers made of it, two of them with the same labels; and a tagger."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny.write_bert(folder / "base")
    for seed, (name, labels) in enumerate({"one": ("bad", "good"), "two": ("bad", "good"), "other": ("no", "yes")}.items()):
        tiny.write_bert(folder / "trunk", tiny.bert_tensors(seed + 1))
        found = pretrained.load(str(folder / "trunk"), head="sequence_classification", labels=labels, seed=seed)
        pretrained.save(folder / name, found)
    tags = pretrained.load(str(folder / "base"), head="token_classification", labels=("O", "B"))
    pretrained.save(folder / "tagger", tags)
    shutil.rmtree(folder / "trunk")
    return folder


def params_of(path, **options):
    return jax.device_get(pretrained.load(str(path), **options).params)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_classifiers_of_one_kind(folder, tmp_path, method):
    """Heads, which the base does not have, are averaged."""
    needs_base = method.name not in ("soup", "average")
    base = str(folder / "base") if needs_base else ""
    merge(tmp_path / "merged", [str(folder / "one"), str(folder / "two")], method, base=base)
    found, one, two = (params_of(path) for path in (tmp_path / "merged", folder / "one", folder / "two"))
    start = params_of(folder / "base")
    parts = [{part: tree[part] for part in ("pooler", "trunk")} for tree in (start, one, two)]
    key = jax.random.key(method.seed or 0)
    expected = {
        "soup": lambda: merge_methods.average([one, two]),
        "average": lambda: merge_methods.average([one, two], [1, 3]),
        "arithmetic": lambda: merge_methods.arithmetic(parts[0], parts[1:], 0.5),
        "ties": lambda: merge_methods.ties(parts[0], parts[1:], 0.3),
        "dare": lambda: merge_methods.dare(parts[0], parts[1:], 0.5, key),
        "dare_ties": lambda: merge_methods.dare(parts[0], parts[1:], 0.5, key, keep=0.3),
    }[method.name]()
    same(found, expected if not needs_base else {**expected, "head": merge_methods.average([one["head"], two["head"]])})


def test_what_is_written_is_a_checkpoint(folder, tmp_path):
    sources = [str(folder / "one"), str(folder / "two")]
    merge(tmp_path / "soup", sources, Method("soup"))
    found = pretrained.load(str(tmp_path / "soup"))
    assert (found.head, found.labels) == ("sequence_classification", ("bad", "good"))
    assert (found.unused, found.initialized) == ((), ())
    assert found.tokenizer("good film")["input_ids"] == pretrained.load(sources[0]).tokenizer("good film")["input_ids"]
    record = json.loads((tmp_path / "soup" / "merge.json").read_text())
    for source, named in zip(sources, record["sources"], strict=True):
        digest = hashlib.sha256((folder / source / "model.safetensors").read_bytes()).hexdigest()
        assert named == {"path": source, "files": {"model.safetensors": digest}}
    assert record["parts"] == {"head": "soup", "pooler": "soup", "trunk": "soup"}


def test_transformers_opens_it(folder, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    merge(tmp_path / "soup", [str(folder / "one"), str(folder / "two")], Method("soup"))
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "soup", output_loading_info=True)
    assert not any(info.values()), info
    inputs = AutoTokenizer.from_pretrained(tmp_path / "soup")(["a good film", "who ?"], padding=True, return_tensors="np")
    found = pretrained.load(str(tmp_path / "soup"))
    ours = found.model.apply({"params": found.params}, **inputs).logits
    with torch.no_grad():
        theirs = model.eval()(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def test_wise_between_checkpoints(folder, tmp_path):
    merge(tmp_path / "wise", [str(folder / "one")], Method("wise", alpha=0.3), base=str(folder / "two"))
    found, one, two = (params_of(path) for path in (tmp_path / "wise", folder / "one", folder / "two"))
    same(found, merge_methods.interpolate(two, one, 0.3))
    merge(tmp_path / "from_base", [str(folder / "one")], Method("wise", alpha=0.3), base=str(folder / "base"))
    found = params_of(tmp_path / "from_base")
    same(found["trunk"], merge_methods.interpolate(params_of(folder / "base")["trunk"], one["trunk"], 0.3))
    same(found["head"], one["head"])


def test_other_heads_are_refused_but_their_trunks_can_be_merged(folder, tmp_path):
    sources = [str(folder / "one"), str(folder / "other")]
    message = r"other: its head is sequence_classification .no, yes., and that of .*one is sequence_classification .bad, good."
    with pytest.raises(UserError, match=message):
        merge(tmp_path / "soup", sources, Method("soup"))
    assert not list(tmp_path.iterdir())
    merge(tmp_path / "soup", sources, Method("soup"), trunk_only=True)
    found = pretrained.load(str(tmp_path / "soup"))
    assert found.head is None
    same(found.params["trunk"], merge_methods.average([params_of(path)["trunk"] for path in sources]))


def test_a_part_that_one_file_lacks_is_that_of_the_others(folder, tmp_path):
    """A tagger has no pooler: what is made up in its place must not be averaged."""
    merge(tmp_path / "soup", [str(folder / "tagger"), str(folder / "one")], Method("soup"), trunk_only=True)
    record = json.loads((tmp_path / "soup" / "merge.json").read_text())
    assert record["parts"] == {"trunk": "soup", "pooler": f"as in {folder / 'one'}"}
    same(params_of(tmp_path / "soup")["pooler"], params_of(folder / "one")["pooler"])


def test_what_is_refused(folder, workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "FEED_FORWARD", 64)
    tiny.write_bert(tmp_path / "wide")
    monkeypatch.undo()
    one = str(folder / "one")
    with pytest.raises(
        UserError, match=r"one: trunk/layer_0/feed_forward_in/bias is of shape \(32,\) there, and of shape \(64,\) in"
    ):
        merge(tmp_path / "x", [one], Method("wise"), base=str(tmp_path / "wide"))
    with pytest.raises(UserError, match="method greedy measures on dev, so its sources must be workdirs"):
        merge(tmp_path / "x", [one, str(folder / "two")], Method("greedy"))
    with pytest.raises(UserError, match="is a workdir, but the sources are checkpoints"):
        merge(tmp_path / "x", [one], Method("wise"), base=str(workdir))
    with pytest.raises(UserError, match="/nowhere: no such file or directory"):
        merge(tmp_path / "x", [one], Method("wise"), base="/nowhere")
    with pytest.raises(UserError, match="neither a workdir of a run nor a checkpoint"):
        merge(tmp_path / "x", [one, str(folder)], Method("soup"))
    assert not (tmp_path / "x").exists()
