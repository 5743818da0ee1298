"""A user's trunks: how a module must be called, and which keep the examples of a packed row apart."""

import dataclasses
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mtl_jax import Phase, RDrop, Regression, Seq2Seq, trunks
from mtl_jax.core import parts
from mtl_jax.core.errors import UserError
from mtl_jax.data.batches import Batch
from mtl_jax.models.encoder import Encoder, EncoderConfig
from mtl_jax.training.forward import encode_tokens
from mtl_jax.training.setup import prepare
from mtl_jax.transfer.adapters import Adapter, merge_adapters
from mtl_jax.trunks import EncoderOutput, TrunkConfig

TEXTS = ["good film", "bad film", "a song of the city"]
H = 8


@dataclasses.dataclass(frozen=True)
class Made(TrunkConfig):
    """A trunk around any of the modules below."""

    network: str = "Words"

    def module(self, vocab_size, dtype):
        return MODULES[self.network](vocab_size)


class Words(nn.Module):
    """A table, and what a subclass makes of its vectors."""

    vocab_size: int

    def mixed(self, x, mask, positions, segments):
        return x

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, *, position_ids=None, segment_ids=None, deterministic=True):
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = jnp.zeros_like(input_ids) if position_ids is None else position_ids
        segments = mask if segment_ids is None else segment_ids
        x = nn.Embed(self.vocab_size, H)(input_ids)
        return EncoderOutput(self.mixed(x, mask, positions, segments))


class Tables(Words):
    """Parameters with the names of our token tables, which are none."""

    def mixed(self, x, mask, positions, segments):
        return nn.Dense(H, name="word")(x) + self.param("embeddings", nn.initializers.zeros, (H,))


class Positions(Words):
    def mixed(self, x, mask, positions, segments):
        return x + nn.Embed(64, H)(positions)


class PlacesInTheRow(Words):
    def mixed(self, x, mask, positions, segments):
        return x + nn.Embed(64, H)(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))


class BiLSTM(Words):
    def mixed(self, x, mask, positions, segments):
        return nn.Bidirectional(nn.RNN(nn.OptimizedLSTMCell(H)), nn.RNN(nn.OptimizedLSTMCell(H)))(x, seq_lengths=mask.sum(1))


class Forwards(Words):
    def mixed(self, x, mask, positions, segments):
        return nn.RNN(nn.GRUCell(H))(x)


class Convolution(Words):
    def mixed(self, x, mask, positions, segments):
        return nn.Conv(H, (3,))(x * mask[..., None])


class Padding(Words):
    """A mean over the row, padding included, that a layer of zeros hides at first."""

    def mixed(self, x, mask, positions, segments):
        return x + nn.Dense(H, kernel_init=nn.initializers.zeros)(x.mean(axis=1, keepdims=True))


class Attention(Words):
    keep_apart = False

    def mixed(self, x, mask, positions, segments):
        seen = (mask[:, None, None, :] > 0) & (mask[:, None, :, None] > 0)
        if self.keep_apart:
            seen &= (segments[:, :, None] == segments[:, None, :])[:, None]
        return nn.MultiHeadDotProductAttention(2)(x, mask=seen)


class AttentionApart(Attention):
    keep_apart = True


class LowPrecision(AttentionApart):
    def mixed(self, x, mask, positions, segments):
        return super().mixed(x, mask, positions, segments).astype(jnp.bfloat16)


def of_ours(vocab_size):
    return Encoder(EncoderConfig(vocab_size, H, 1, 2, 16, 64))


APART = (Words, Tables, Positions, AttentionApart, LowPrecision)
MIXED = (PlacesInTheRow, BiLSTM, Forwards, Convolution, Padding, Attention)
MODULES = {"of_ours": of_ours} | {kind.__name__: kind for kind in (*APART, *MIXED)}


@pytest.mark.parametrize("kind", ["of_ours", *(kind.__name__ for kind in APART[1:])])
def test_examples_that_are_kept_apart(kind):
    trunk = trunks.build(Made(kind), TEXTS, np.float32)
    trunks.check_packed(trunk, 24)
    assert trunks.facts(trunk).table == ((len(trunk.tokenizer), H) if kind == "of_ours" else (0, 0))


@pytest.mark.parametrize("kind", [kind.__name__ for kind in MIXED])
def test_examples_that_are_not_kept_apart(kind):
    trunk = trunks.build(Made(kind), TEXTS, np.float32)
    message = r"the trunk Made of .*: the vectors of an example change .* segment_ids.* \(--batch.no-packed\)"
    with pytest.raises(UserError, match=message):
        trunks.check_packed(trunk, 24)
    trunks.check_packed(trunk, 2)  # there is no room for two examples and padding


def test_a_teacher_that_does_not_keep_them_apart():
    with pytest.raises(UserError, match=r"^the teacher of x, Made of .*: the vectors"):
        trunks.check_packed(trunks.build(Made("Convolution"), TEXTS, np.float32), 6, "the teacher of x")


class Lacking(nn.Module):
    @nn.compact
    def __call__(self, input_ids, attention_mask=None, *, deterministic=True):
        return EncoderOutput(nn.Embed(10, H)(input_ids))


class Requiring(nn.Module):
    @nn.compact
    def __call__(self, input_ids, attention_mask, *, position_ids=None, segment_ids=None, deterministic):
        return EncoderOutput(nn.Embed(10, H)(input_ids))


class Bare(nn.Module):
    @nn.compact
    def __call__(self, input_ids, attention_mask=None, **kwargs):
        return nn.Embed(10, H)(input_ids)


class Pooled(nn.Module):
    @nn.compact
    def __call__(self, input_ids, attention_mask=None, **kwargs):
        return EncoderOutput(nn.Embed(10, H)(input_ids).mean(axis=1))


class Counting(nn.Module):
    @nn.compact
    def __call__(self, input_ids, attention_mask=None, **kwargs):
        return EncoderOutput(nn.BatchNorm(use_running_average=True)(nn.Embed(10, H)(input_ids)))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Lacking(), "the call of Lacking lacks position_ids, segment_ids; its arguments are input_ids, attention_mask"),
        (
            Requiring(),
            "the call of Requiring requires attention_mask, deterministic; give every argument but input_ids a default",
        ),
        (Bare(), "the call of Bare returns ShapeDtypeStruct without hidden"),
        (Pooled(), r"the call of Pooled returns hidden of shape \(2, 8\) for input_ids of shape \(2, 3\)"),
        (Counting(), "the call of Counting makes batch_stats; a trunk has only params"),
        (jnp.sin, "returned .*; it must return a flax.linen.Module"),
    ],
)
def test_modules_that_are_not_trunks(module, message, monkeypatch):
    monkeypatch.setitem(MODULES, "other", lambda vocab_size: module)
    with pytest.raises(UserError, match=f"^Made of .*: .*{message}"):
        trunks.build(Made("other"), TEXTS, np.float32)


def test_types_of_tokens_are_given_to_modules_that_read_them(monkeypatch):
    """Pairs have types; a module without the argument reads the tokens alone."""
    ids = np.array([[2, 3, 4]])
    batch = tiny_batch(ids, types=np.array([[0, 1, 1]]))
    for kind, differs in (("Words", False), ("of_ours", True)):
        trunk = trunks.build(Made(kind), TEXTS, np.float32)
        params = trunks.init_params(trunk, jax.random.key(0))
        encode = encode_tokens(trunk.module, ("tokens",))
        with_types, without = (encode(params, b, None, None).tokens for b in (batch, batch._replace(types=None)))
        assert np.allclose(with_types, without) != differs


def tiny_batch(ids, types):
    return Batch(ids, np.ones_like(ids), np.arange(ids.shape[1])[None], np.zeros((1, 1), np.int32), np.zeros(1), {}, types)


def test_dropout_that_no_field_names(data, monkeypatch):
    """R-Drop looks for it in the module itself."""

    class Dropped(Words):
        @nn.compact
        def __call__(self, input_ids, attention_mask=None, *, position_ids=None, segment_ids=None, deterministic=True):
            return EncoderOutput(nn.Dropout(0.1)(nn.Embed(self.vocab_size, H)(input_ids), deterministic=deterministic))

    monkeypatch.setitem(MODULES, "dropped", Dropped)
    assert trunks.draws_dropout(trunks.build(Made("dropped"), TEXTS, np.float32))
    assert not trunks.draws_dropout(trunks.build(Made("Words"), TEXTS, np.float32))
    tasks = (Regression(name="rating", source="ratings", column="rating"),)
    setting = {"tasks": tasks, "regularisers": (RDrop(weight=1.0),), "phases": (Phase("all", 1),)}
    prepare(tiny.experiment("", data, trunk=Made("dropped"), **setting))
    with pytest.raises(UserError, match="there is no dropout"):
        prepare(tiny.experiment("", data, trunk=Made("Words"), **setting))


def test_a_class_without_module():
    @dataclasses.dataclass(frozen=True)
    class Nothing(TrunkConfig):
        width: int = 3

    with pytest.raises(UserError, match="class Nothing lacks module, which every trunk needs"):
        Nothing()


def test_a_field_that_config_json_has_already():
    with pytest.raises(UserError, match=r"class Clash: .* give the field kind another name"):

        @dataclasses.dataclass(frozen=True)
        class Clash(TrunkConfig):
            kind: str = "cnn"


def test_a_decoder_needs_sizes(data):
    """It is refused before training."""

    @dataclasses.dataclass(frozen=True)
    class Ending(Made):
        """Its tokenizer ends texts, and its table has the name that decoders look for."""

        def tokenizer(self, texts):
            return trunks.Transformer(vocabulary=400).tokenizer(texts)

        def module(self, vocab_size, dtype):
            return Named(vocab_size)

    class Named(nn.Module):
        vocab_size: int

        @nn.compact
        def __call__(self, input_ids, attention_mask=None, *, position_ids=None, segment_ids=None, deterministic=True):
            return EncoderOutput(nn.Embed(self.vocab_size, H, name="word")(input_ids))

    task = Seq2Seq(name="answer", source="questions", column="fine", target_length=8)
    with pytest.raises(UserError, match=r"task 'answer' writes texts, which needs the sizes of the trunk: .* module of Ending"):
        prepare(tiny.experiment("", data, trunk=Ending(), tasks=(task,)))


def example_of(page):
    """What the first block of Python on a page defines."""
    text = (Path(__file__).parents[1] / "docs" / "parts" / page).read_text(encoding="utf-8")
    names = {"__name__": "example"}
    exec(compile(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1), page, "exec"), names)
    return names


def test_the_examples_of_the_guides(data, monkeypatch):
    """The trunk keeps examples apart; the adapter, its parameters moved, is the same merged, each source its own."""
    for door in (TrunkConfig, Adapter):
        monkeypatch.setitem(parts._KINDS, door, dict(parts._KINDS[door]))
    trunk, gate = example_of("trunk.md")["Attention"](width=H), example_of("adapter.md")["Gate"]
    adapters = (gate(name="gate", strength=0.5, target="MultiHead.*|Dense.*|.*/query", per="source"),)
    with pytest.raises(UserError, match="adapter 'gate' finds no place in this trunk"):
        prepare(tiny.experiment("", data, trunk=trunk, adapters=adapters))
    monkeypatch.setitem(MODULES, "dense", Mapped)
    prepared = prepare(tiny.experiment("", data, trunk=Made("dense"), adapters=adapters))
    params = prepared.params["trunk"]
    moved = {**params, "adapters": jax.tree.map(lambda leaf: leaf + jnp.arange(leaf.size) * 0.1, params["adapters"])}
    adapted, ids = prepared.trunk.module, np.array([[2, 3, 4]])
    expected = adapted.apply({"params": moved}, ids, source=jnp.array([1])).hidden
    merged = adapted.base.apply({"params": merge_adapters(adapted, moved, source=1)}, ids).hidden
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(expected, adapted.apply({"params": params}, ids, source=jnp.array([1])).hidden)


class Mapped(Words):
    def mixed(self, x, mask, positions, segments):
        return nn.Dense(H, bias_init=nn.initializers.ones)(x)
