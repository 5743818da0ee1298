"""Random tiny encoder-decoders of transformers beside ours: the same numbers in, and the same numbers back out.

python tests/pretrained/parity_seq2seq.py prints the table: class x largest difference in both directions.
"""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from parity import Differences, opened_without_a_word, same

from mtl_jax import pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, PAD, START, EOS = 60, 1, 2, 3
BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 20,
    "init_std": 0.2,
    "pad_token_id": PAD,
    "decoder_start_token_id": START,
    "eos_token_id": EOS,
    "forced_eos_token_id": EOS,
}
T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 7,
    "initializer_factor": 0.4,
    "decoder_start_token_id": START,
}
SWISH = {"activation_function": "swish", "scale_embedding": True}
UNSHARED = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 50}


class Case(NamedTuple):
    """A class of transformers and fields of its configuration; own_output is an output matrix that only the file tells of."""

    cls: str
    config: str
    fields: dict[str, Any]
    own_output: bool = False


CASES = {
    "Marian": Case("MarianMTModel", "MarianConfig", BART | SWISH | {"encoder_layers": 2, "decoder_layers": 3}),
    "Marian, untied": Case("MarianMTModel", "MarianConfig", BART | {"tie_word_embeddings": False}),
    "Marian, two tables": Case("MarianMTModel", "MarianConfig", BART | UNSHARED),
    "Marian, two tables, untied": Case("MarianMTModel", "MarianConfig", BART | UNSHARED | {"tie_word_embeddings": False}),
    "BART": Case("BartForConditionalGeneration", "BartConfig", BART),
    "BART, untied": Case(
        "BartForConditionalGeneration", "BartConfig", BART | {"tie_word_embeddings": False, "scale_embedding": True}
    ),
    "BART, untied by its file": Case("BartForConditionalGeneration", "BartConfig", BART, own_output=True),
    "BART, rows": Case("BartForSequenceClassification", "BartConfig", BART | {"num_labels": 4}),
    "mBART": Case(
        "MBartForConditionalGeneration", "MBartConfig", BART | {"activation_function": "relu", "scale_embedding": True}
    ),
    "Pegasus": Case("PegasusForConditionalGeneration", "PegasusConfig", BART | SWISH | {"decoder_layers": 2}),
    "Pegasus, untied": Case("PegasusForConditionalGeneration", "PegasusConfig", BART | {"tie_word_embeddings": False}),
    "M2M100": Case(
        "M2M100ForConditionalGeneration", "M2M100Config", BART | {"activation_function": "relu", "decoder_layers": 2}
    ),
    "M2M100, untied": Case(
        "M2M100ForConditionalGeneration",
        "M2M100Config",
        BART | {"tie_word_embeddings": False, "scale_embedding": False, "pad_token_id": 0, "d_model": 20},
    ),
    "T5": Case("T5ForConditionalGeneration", "T5Config", T5),
    "T5 1.1": Case(
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1},
        own_output=True,
    ),
    "T5 1.1, tied": Case(
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | {"num_layers": 1, "feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
    ),
    "mT5": Case("MT5ForConditionalGeneration", "MT5Config", T5 | {"num_layers": 1}, own_output=True),
    "mT5, tied": Case("MT5ForConditionalGeneration", "MT5Config", T5 | {"num_layers": 1}),
    "UMT5": Case("UMT5ForConditionalGeneration", "UMT5Config", T5 | {"num_decoder_layers": 1}, own_output=True),
}


class Answer(NamedTuple):
    """hidden f[B, T, H] of encoder and decoder, and logits f[B, U, V], or f[B, num_labels]."""

    hidden: np.ndarray
    decoder_hidden: np.ndarray
    logits: np.ndarray


def reference(case: Case) -> Any:
    """A random model of transformers; norms and biases are random too, because 1 and 0 hide mistakes."""
    torch.manual_seed(0)
    model = getattr(transformers, case.cls)(getattr(transformers, case.config)(**case.fields)).eval()
    if case.own_output:
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(model.lm_head.weight.shape))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim == 1 or name == "final_logits_bias":
                tensor.add_(0.2 * torch.randn(tensor.shape))
    return model


def batch(case: Case) -> dict[str, np.ndarray]:
    """Rows that are full, padded on the right, and full of holes; longer than what T5 tells distances apart."""
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(4, 50, (3, 12)), np.ones((3, 12), np.int64)
    mask[1, 8:] = 0
    mask[2, [0, 4, 5, 9]] = 0
    ids[1, 8:] = PAD
    if case.cls.endswith("Classification"):
        ids[0, 11] = ids[1, 7] = ids[2, 10] = EOS
        return {"input_ids": ids, "attention_mask": mask}
    targets, target_mask = rng.integers(4, 50, (3, 10)), np.ones((3, 10), np.int64)
    target_mask[0, 6:] = 0
    target_mask[2, [2, 3]] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | {"decoder_input_ids": targets, "decoder_attention_mask": target_mask}


def theirs(model: Any, inputs: dict[str, np.ndarray]) -> Answer:
    with torch.no_grad():
        out = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}, output_hidden_states=True)
    return Answer(out.encoder_last_hidden_state.numpy(), out.decoder_hidden_states[-1].numpy(), out.logits.numpy())


def ours(checkpoint: pretrained.Checkpoint, inputs: dict[str, np.ndarray]) -> Answer:
    with jax.default_matmul_precision("highest"):
        out = jax.jit(checkpoint.model.apply)({"params": checkpoint.params}, **inputs)
    return Answer(np.asarray(out.hidden), np.asarray(out.decoder_hidden), np.asarray(out.logits))


def difference(found: Answer, expected: Answer, inputs: dict[str, np.ndarray]) -> float:
    """The largest difference at real tokens."""
    real = inputs["attention_mask"].astype(bool)
    # Without decoder ids the decoder reads the source, and sees all of it.
    targets = inputs.get("decoder_attention_mask", np.ones_like(real)).astype(bool)
    assert found.logits.shape == expected.logits.shape
    largest = [
        np.abs(found.hidden - expected.hidden)[real].max(),
        np.abs(found.decoder_hidden - expected.decoder_hidden)[targets].max(),
        np.abs(found.logits - expected.logits)[targets if found.logits.ndim == 3 else slice(None)].max(),
    ]
    return float(max(largest))


def both_ways(case: Case, folder: Path) -> Differences:
    """Their model to ours, and ours back to theirs, on the way asserting everything that is no number."""
    model, inputs = reference(case), batch(case)
    model.save_pretrained(folder / "theirs")
    loaded = pretrained.load(str(folder / "theirs"))
    assert (loaded.unused, loaded.initialized) == ((), ())
    found = ours(loaded, inputs)
    inwards = difference(found, theirs(model, inputs), inputs)
    pretrained.save(folder / "ours", loaded)
    back = opened_without_a_word(folder / "ours", case.cls)
    outwards = difference(found, theirs(back, inputs), inputs)
    assert same(pretrained.load(str(folder / "ours")), loaded)
    return Differences(inwards, outwards)


if __name__ == "__main__":
    print("| model | transformers class | largest difference in | out |\n|---|---|---|---|")
    for name, one in CASES.items():
        with tempfile.TemporaryDirectory() as at:
            print(f"| {name} | {one.cls} | {' | '.join(f'{number:.1e}' for number in both_ways(one, Path(at)))} |", flush=True)
