"""Adapters of PEFT and ours, live: PEFT opens ours and gives our logits, ours opens theirs."""

import numpy as np
import pytest
from jitted import apply

from mtl_jax import pretrained
from mtl_jax.transfer.adapters import load_peft, save_peft

pytest.importorskip("torch")
pytest.importorskip("peft")
peft_cases = pytest.importorskip("peft_cases", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft, about themselves
TOLERANCE = 1e-5
QUICK = ("lora_pooler", "dora_rslora", "prompt_tokens", "fused_lora", "bart_pissa", "marian_prefix")


def ours(checkpoint, task):
    return np.asarray(apply(checkpoint.model, checkpoint.params, **peft_cases.inputs_of(task)).logits)


def real(logits, task):
    """Without the answers at padding."""
    if task != peft_cases.TOKENS:
        return logits
    mask = peft_cases.inputs_of(task)["attention_mask"].astype(bool)
    prompt = np.ones((len(mask), logits.shape[1] - mask.shape[1]), bool)
    return logits[np.concatenate([prompt, mask], axis=1)]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in peft_cases.CASES]
)
def test_both_ways(name, tmp_path):
    base = peft_cases.base_of(name, tmp_path)
    model = peft_cases.adapted(name, base)
    task, theirs = model.peft_config["default"].task_type, peft_cases.answers(model)
    model.save_pretrained(tmp_path / "theirs")
    checkpoint = load_peft(tmp_path / "theirs", pretrained.load(str(base)))
    found = ours(checkpoint, task)
    into_ours = np.abs(real(found, task) - real(theirs, task)).max()
    save_peft(tmp_path / "ours", checkpoint)
    again = peft_cases.answers(peft_cases.reopened(name, base, tmp_path / "ours"))
    into_theirs = np.abs(real(again, task) - real(found, task)).max()
    print(f"{name}: {into_ours:.1e} {into_theirs:.1e}")
    assert max(into_ours, into_theirs) <= TOLERANCE
