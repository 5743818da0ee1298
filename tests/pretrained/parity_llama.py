"""Random tiny decoder-only models of transformers beside ours, in the way of parity.py.

python tests/pretrained/parity_llama.py prints the table: family x head x largest difference in both directions.
"""

import tempfile
from pathlib import Path
from typing import Any

import parity

SIZES = {name: value for name, value in parity.SIZES.items() if name != "type_vocab_size"}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GEMMA = SIZES | {"num_hidden_layers": 4, "sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 11}
FAMILIES = {
    "Llama": SIZES | {"rms_norm_eps": 1e-3},
    "Qwen2": SIZES | {"hidden_act": "gelu"},
    "Qwen3": SIZES | {"head_dim": 16},
    "Gemma3Text": GEMMA,
}
parity.FAMILIES |= FAMILIES
# The short wavelengths, those between and the long ones all occur.
STRETCHED = {"rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STRETCHED |= {"original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
CAP = {"final_logit_softcapping": 3.0}
BIASES = {"attention_bias": True, "mlp_bias": True}
WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
ENDS = {
    "Model": None,
    "ForCausalLM": "causal_lm",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
}
Case = tuple[str, str, str | None, dict[str, Any]]
ALL: list[Case] = [
    *((name, name + end, kind, {}) for name in ("Llama", "Qwen2", "Qwen3") for end, kind in ENDS.items()),
    ("Gemma3Text", "Gemma3TextModel", None, {}),
    ("Gemma3Text", "Gemma3ForCausalLM", "causal_lm", {}),
    ("Gemma3Text", "Gemma3TextForSequenceClassification", "sequence_classification", {}),
]
# Those that the tests compare: every family, every head, and every option of a config.
CASES: list[Case] = [
    ("Llama", "LlamaForCausalLM", "causal_lm", {"rope_parameters": STRETCHED, **BIASES}),
    ("Llama", "LlamaForSequenceClassification", "sequence_classification", {"rope_parameters": LINEAR}),
    ("Qwen2", "Qwen2Model", None, WINDOW),
    ("Qwen3", "Qwen3ForTokenClassification", "token_classification", {"attention_bias": True}),
    ("Gemma3Text", "Gemma3ForCausalLM", "causal_lm", CAP),
]

if __name__ == "__main__":
    print("| transformers class | largest difference in | out |\n|---|---|---|")
    for case in (*ALL, *CASES):
        with tempfile.TemporaryDirectory() as at:
            numbers = parity.both_ways(case, Path(at))
            print(f"| {parity.name_of(case)} | {' | '.join(f'{number:.1e}' for number in numbers)} |", flush=True)
