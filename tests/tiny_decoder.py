"""A Llama of a few thousand parameters with the tokenizer of tiny.py, and sources for it."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [*tiny.WORDS, "[USER]", "[BOT]", "[END]"]
SIZES = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64}
TEMPLATE = (
    "{% for m in messages %}{{ '[USER]' if m.role == 'user' else '[BOT]' }} {{ m.content }} [END] {% endfor %}"
    "{% if add_generation_prompt %}[BOT]{% endif %}"
)


def write_llama(folder: Path, chat: bool = True, **changes: object) -> None:
    """A checkpoint directory; texts begin with [CLS] and end with [SEP] in answers only."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict = SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True} | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rng = np.random.default_rng(0)
    H, F, kv = 16, 24, 8

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.2, shape).astype(np.float32)

    tensors = {"model.embed_tokens.weight": normal(config["vocab_size"], H), "model.norm.weight": 1 + normal(H)}
    for layer in range(SIZES["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes = {"self_attn.q_proj": (H, H), "self_attn.k_proj": (kv, H), "self_attn.v_proj": (kv, H)}
        shapes |= {"self_attn.o_proj": (H, H), "mlp.gate_proj": (F, H), "mlp.up_proj": (F, H), "mlp.down_proj": (H, F)}
        tensors |= {f"{at}{name}.weight": normal(*shape) for name, shape in shapes.items()}
        tensors |= {f"{at}{name}.weight": 1 + normal(H) for name in ("input_layernorm", "post_attention_layernorm")}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.add_special_tokens(["[USER]", "[BOT]", "[END]"])
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", 2)])
    words.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    settings |= {"chat_template": TEMPLATE} if chat else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def rows(count: int = 60, seed: int = 0) -> list[dict[str, object]]:
    """A text, its answer of one or two words, which are in it, and a label."""
    rng, made, seen = np.random.default_rng(seed), [], set()
    while len(made) < count:
        words = rng.choice(tiny.GOOD + tiny.BAD + tiny.OTHER, rng.integers(2, 7)).tolist()
        marked = [word for word in words if word in tiny.GOOD + tiny.BAD][:2]
        if marked and " ".join(words) not in seen:
            seen.add(" ".join(words))
            label = "good" if marked[0] in tiny.GOOD else "bad"
            made.append({"text": " ".join(words), "answer": " ".join(marked), "label": label})
    return made


def conversations(count: int = 40) -> list[dict[str, object]]:
    """The same as messages; in every fourth row an earlier turn stands before."""
    earlier = [{"role": "user", "content": "who ?"}, {"role": "assistant", "content": "the man"}]
    return [
        {"messages": [*(earlier if number % 4 == 0 else []), *_turn(row)]} for number, row in enumerate(rows(count, seed=1))
    ]


def _turn(row: dict[str, object]) -> list[dict[str, object]]:
    return [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["answer"]}]
