"""Translation with a model of opus-mt's size: sentences and tokens per second, and those of transformers and CTranslate2.

    pip install -e ".[peers]"
    python benchmarks/decoding.py                    # --threads 1 --batches 1 16 --beams 1 for less

Six and six layers, 512 wide, a vocabulary of 59,514, random weights that never end a sentence: every source has 32 tokens and
every answer 32, so that all programs do the same work. The programs take turns, on the same threads (or the same GPU), in
float32; CTranslate2 in int8 is included for information only, since it computes something else. A row's numbers are medians
over the turns. "same" is the share of mtl_jax's tokens that transformers generates, too; "compiling" is the time of the first
call minus that of a later one, which occurs once for a batch shape and a set of options. Lines of mixed lengths: the number of
programs that a file of 3,000 lines needs, counted with a tiny model that ends its sentences. Results go to
benchmarks/results/decoding.json and .md, or decoding-gpu.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

SOURCE = TARGET = 32  # tokens of a source, tokens generated
REPEATS = 5
VOCABULARY, END = 59_514, 0
SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 512,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
    "max_position_embeddings": 512,
    "activation_function": "swish",
    "scale_embedding": True,
    "pad_token_id": VOCABULARY - 1,
    "eos_token_id": END,
    "decoder_start_token_id": VOCABULARY - 1,
    "forced_eos_token_id": None,
    "init_std": 0.05,
}
Translate = Callable[[np.ndarray, int], Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    return parser.parse_args()


def make_model(folder: Path) -> Any:
    """A random Marian that never ends a sentence, saved in the folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.MarianMTModel(transformers.MarianConfig(**SIZES)).eval()
    model.final_logits_bias[0, [END, VOCABULARY - 1]] = -1e9
    model.save_pretrained(folder)
    return model


def with_transformers(model: Any, gpu: bool) -> Translate:
    import torch

    model = model.to("cuda") if gpu else model

    def translate(ids: np.ndarray, beams: int) -> np.ndarray:
        with torch.inference_mode():
            sources = torch.from_numpy(ids).to(model.device)
            mask = torch.ones_like(sources)
            return model.generate(sources, attention_mask=mask, num_beams=beams, max_new_tokens=TARGET).cpu().numpy()

    return translate


def with_ctranslate2(model: Any, folder: Path, kind: str, threads: int, gpu: bool) -> Translate:
    import ctranslate2
    from ctranslate2.converters.transformers import MarianMTLoader

    if not (folder / "model.bin").exists():
        spec = MarianMTLoader().get_model_spec(model.cpu())
        words = ["</s>", *(str(number) for number in range(1, VOCABULARY - 1))]
        spec.register_source_vocabulary(words)
        spec.register_target_vocabulary(words)
        spec.config.eos_token = spec.config.bos_token = spec.config.decoder_start_token = "</s>"
        spec.config.unk_token = words[1]
        spec.config.add_source_eos = False
        spec.validate()
        spec.optimize()
        folder.mkdir(exist_ok=True)
        spec.save(str(folder))
    device = "cuda" if gpu else "cpu"
    translator = ctranslate2.Translator(str(folder), device=device, compute_type=kind, inter_threads=1, intra_threads=threads)

    def translate(ids: np.ndarray, beams: int) -> list:
        lengths = {"max_decoding_length": TARGET, "min_decoding_length": TARGET}
        return translator.translate_batch([[str(i) for i in row] for row in ids.tolist()], beam_size=beams, **lengths)

    return translate


def with_ours(folder: Path) -> Translate:
    from mtl_jax import pretrained
    from mtl_jax.decoding import generate, prepare

    checkpoint = pretrained.load(str(folder))
    vocabulary = prepare(checkpoint.model, checkpoint.params)

    def translate(ids: np.ndarray, beams: int) -> np.ndarray:
        return generate(checkpoint, ids, vocabulary=vocabulary, num_beams=beams, max_new_tokens=TARGET)[0]

    return translate


def seconds(translate: Translate, ids: np.ndarray, beams: int) -> float:
    start = time.perf_counter()
    translate(ids, beams)
    return time.perf_counter() - start


def measure(peers: dict[str, Translate], batch: int, beams: int) -> dict[str, Any]:
    """A row of the table."""
    ids = np.random.default_rng(batch).integers(1, VOCABULARY - 1, (batch, SOURCE))
    first = seconds(peers["mtl_jax"], ids, beams)
    same = float(np.mean(peers["mtl_jax"](ids, beams) == peers["transformers"](ids, beams)))
    for name in peers:
        seconds(peers[name], ids, beams)
    times: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(REPEATS):
        for name, translate in peers.items():
            times[name].append(seconds(translate, ids, beams))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "beams": beams,
        "batch": batch,
        "sentences_per_second": {name: batch / median for name, median in medians.items()},
        "tokens_per_second": {name: batch * TARGET / median for name, median in medians.items()},
        "seconds": times,
        "compiling": first - medians["mtl_jax"],
        "same": same,
    }


def programs() -> int:
    """Programs that 3,000 lines of mixed lengths need, with beam search and a limit of 512 tokens."""
    import jax

    from mtl_jax.decoding import GenerationConfig, generate_all, logits, search
    from mtl_jax.models.encoder_decoder import Seq2Seq, Seq2SeqEncoder
    from mtl_jax.models.seq2seq_decoder import Decoder
    from mtl_jax.models.seq2seq_layers import Seq2SeqConfig

    tiny = Seq2SeqConfig(200, 200, 8, 1, 1, 2, 2, 8, 8, 512, initializer_range=0.3)
    model = Seq2Seq(Seq2SeqEncoder(tiny), Decoder(tiny))
    ids = np.ones((1, 4), np.int32)
    params = model.init(jax.random.key(0), ids, ids, ids)["params"]
    params["head"]["final_logits_bias"] = params["head"]["final_logits_bias"].at[0, 2].set(3.0)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.2, 0.7, 3000), 3, 500).astype(int)
    sources = [rng.integers(3, 200, length).astype(np.int32) for length in lengths]
    config = GenerationConfig(max_length=512, num_beams=2, decoder_start_token_id=1, eos_token_id=(2,), pad_token_id=0)

    def compiled() -> int:
        return sum(function._cache_size() for function in (logits.prepare, search.begin, search.pad_source, search.resume))

    before = compiled()
    answers = sum(1 for _ in generate_all(model, params, sources, config, rows=64))
    assert answers == len(sources)
    return compiled() - before


def main() -> None:
    args = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import jax
    import torch

    torch.set_num_threads(args.threads)
    device = jax.devices()[0]
    gpu = device.platform == "gpu"
    jax.config.update("jax_default_matmul_precision", "highest")  # else GPUs compute in TF32
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "marian")
        peers = {"mtl_jax": with_ours(Path(folder) / "marian")}
        for kind in ("float32", "int8"):
            name = "CTranslate2" if kind == "float32" else "CTranslate2 int8"
            peers[name] = with_ctranslate2(model, Path(folder) / "ctranslate2", kind, args.threads, gpu)
        peers["transformers"] = with_transformers(model, gpu)
        rows = []
        for beams in args.beams:
            for batch in args.batches:
                rows.append(measure(peers, batch, beams))
                print(rows[-1], flush=True)
    from mtl_jax.core.errors import count  # imported late, as all that needs jax

    needed = programs()
    kind = device.device_kind if gpu else f"CPU, {count(args.threads, 'thread')}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "transformers", "ctranslate2"))
    host = f"{kind}, {platform.machine()}, Python {platform.python_version()}, {packages}"
    results, stem = Path(__file__).parent / "results", "decoding-gpu" if gpu else "decoding"
    values = {"host": host, "rows": rows, "programs_for_3000_lines": needed}
    (results / f"{stem}.json").write_text(json.dumps(values, indent=2) + "\n")
    names = list(peers)
    shown = []
    for row in rows:
        ours = row["sentences_per_second"]["mtl_jax"]
        faster = (ours / row["sentences_per_second"][name] for name in ("transformers", "CTranslate2"))
        shown.append(
            [
                *(row["beams"], row["batch"], *(f"{row['sentences_per_second'][name]:.1f}" for name in names)),
                *(f"{row['tokens_per_second']['mtl_jax']:,.0f}", *(f"{ratio:.2f}" for ratio in faster)),
                *(f"{row['same']:.2%}", f"{row['compiling']:.1f} s"),
            ]
        )
    head = ["beams", "batch", *(f"{name}, sentences/s" for name in names), "mtl_jax, tokens/s"]
    head += ["times transformers", "times CTranslate2", "same", "compiling"]
    table = tabulate(shown, head, "github", disable_numparse=True)
    text = (
        f"`python benchmarks/decoding.py` on {host}; {SOURCE} source tokens, {TARGET} generated; median of {REPEATS} turns.\n"
    )
    text += f"\n{table}\n\nA file of 3,000 lines of mixed lengths needs {count(needed, 'compiled program')}.\n"
    (results / f"{stem}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
