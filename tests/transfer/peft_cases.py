"""Adapters of PEFT on the small stored checkpoints of tests/pretrained/fixtures, and their answers; needs torch and peft."""

import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

CHECKPOINTS = Path(__file__).parents[1] / "pretrained" / "fixtures"
MAPS = ["query", "value"]
ROWS, TOKENS, TEXTS = "SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM"
CLASSES = {
    ROWS: transformers.AutoModelForSequenceClassification,
    TOKENS: transformers.AutoModelForTokenClassification,
    TEXTS: transformers.AutoModelForSeq2SeqLM,
}


def lora(task, r=2, **fields):
    return lambda: peft.LoraConfig(task_type=task, r=r, **fields)


def bart_lora(**fields):
    return lora(TEXTS, target_modules=["q_proj", "v_proj"], **fields)


def ia3(task, **fields):
    return lambda: peft.IA3Config(task_type=task, **fields)


# {name: (checkpoint, config)}; those of STORED are in tests/transfer/fixtures, too.
CASES = {
    "lora": (
        "bert_rows",
        lora(ROWS, target_modules=MAPS, rank_pattern={"self.query": 3}, alpha_pattern={"value": 5}, lora_dropout=0.1),
    ),
    "lora_pooler": ("bert_rows", lora(ROWS, target_modules=r".*\.(query|dense)")),
    "rslora": ("bert_rows", lora(ROWS, 3, target_modules=MAPS, use_rslora=True)),
    "dora": ("bert_rows", lora(ROWS, target_modules=MAPS, use_dora=True)),
    "dora_rslora": ("bert_rows", lora(ROWS, target_modules=MAPS, use_dora=True, use_rslora=True)),
    "pissa": ("bert_rows", lora(ROWS, target_modules=MAPS, init_lora_weights="pissa")),
    "ia3": ("bert_rows", ia3(ROWS)),
    "prefix": ("bert_rows", lambda: peft.PrefixTuningConfig(task_type=ROWS, num_virtual_tokens=3)),
    "prompt": ("bert_rows", lambda: peft.PromptTuningConfig(task_type=ROWS, num_virtual_tokens=3)),
    "lora_all": ("bert_rows", lora(ROWS, target_modules="all-linear")),
    "prompt_tokens": ("roberta_tokens", lambda: peft.PromptTuningConfig(task_type=TOKENS, num_virtual_tokens=3)),
    "prefix_tokens": ("roberta_tokens", lambda: peft.PrefixTuningConfig(task_type=TOKENS, num_virtual_tokens=3)),
    "fused_lora": ("modernbert_rows", lora(ROWS, target_modules=["Wqkv", "Wo"])),
    "fused_ia3": ("modernbert_rows", ia3(ROWS, target_modules=["Wqkv", "mlp.Wo"], feedforward_modules=["mlp.Wo"])),
    "bart_lora": ("bart", bart_lora()),
    "bart_dora": ("bart", bart_lora(use_dora=True)),
    "bart_pissa": ("bart", bart_lora(init_lora_weights="pissa")),
    "bart_ia3": ("bart", ia3(TEXTS)),
    "marian_rslora": ("marian", bart_lora(use_rslora=True)),
    "marian_prefix": ("", lambda: peft.PrefixTuningConfig(task_type=TEXTS, num_virtual_tokens=3)),
    "t5_lora": ("t5", lora(TEXTS, target_modules=["q", "v"])),
    "t5_ia3": ("t5", ia3(TEXTS)),
}
STORED = ("lora", "dora", "pissa", "ia3", "prefix", "prompt", "bart_lora", "t5_ia3")


def base_of(name, folder):
    """The directory of a case's base; one whose encoder and decoder have as many heads is made in the folder."""
    checkpoint, _ = CASES[name]
    if checkpoint:
        return CHECKPOINTS / checkpoint
    sizes = {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    sizes |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32, "vocab_size": 40}
    torch.manual_seed(1)
    model = transformers.MarianMTModel(transformers.MarianConfig(**sizes, pad_token_id=1, eos_token_id=2)).eval()
    moved(model.parameters())
    model.save_pretrained(folder / "base")
    return folder / "base"


def moved(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape))


def adapted(name, base):
    """The base in PEFT with an adapter that does something."""
    config = CASES[name][1]()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(loaded(config.task_type, base), config).eval()
    moved(parameter for parameter in model.parameters() if parameter.requires_grad)
    return model


def loaded(task, base):
    return CLASSES[task].from_pretrained(base).eval()


def reopened(name, base, folder):
    """The base in PEFT with the adapter of a directory."""
    return peft.PeftModel.from_pretrained(loaded(CASES[name][1]().task_type, base), folder).eval()


def inputs_of(task):
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(3, 40, (2, 6)), np.ones((2, 6), np.int64)
    mask[1, 4:] = 0
    inputs = {"input_ids": np.where(mask, ids, 1), "attention_mask": mask}
    return inputs | ({"decoder_input_ids": rng.integers(3, 40, (2, 4))} if task == TEXTS else {})


def answers(model):
    """The logits of a model in PEFT, in front of a text's tokens those of a prompt."""
    inputs = {name: torch.from_numpy(array) for name, array in inputs_of(model.peft_config["default"].task_type).items()}
    with torch.no_grad():
        return model(**inputs).logits.numpy()
