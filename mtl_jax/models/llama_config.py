"""Sizes and constants of Llama and its relatives, and the wavelengths of their rotary positions.

Shapes in names: H hidden size, N query heads, M heads of keys and values, D size of a head, F feed-forward size.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """Wavelengths of rotary positions (Su et al. 2021), and how they are stretched for long texts.

    Attributes:
        theta: Base of the wavelengths.
        kind: default; linear: all are `factor` times as long; llama3: the long ones are, the short ones stay, and between them
            the change is gradual; dynamic: as default up to the model's length, beyond which rows are refused.
        factor: See kind.
        low_factor: For llama3: wavelengths above original_length / low_factor are long.
        high_factor: For llama3: those below original_length / high_factor are short.
        original_length: For llama3: tokens of the texts before the stretching.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_length: int = 8192

    def frequencies(self, head_size: int) -> np.ndarray:
        """f32[D / 2], radians a token; rounded where torch rounds."""
        exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
        frequencies = np.float32(1) / np.power(self.theta, exponents, dtype=np.float64).astype(np.float32)
        if self.kind == "linear":
            return frequencies / np.float32(self.factor)
        if self.kind != "llama3":
            return frequencies
        wavelengths = np.float32(2 * np.pi) / frequencies
        stretched = frequencies / np.float32(self.factor)
        share = (np.float32(self.original_length) / wavelengths - self.low_factor) / (self.high_factor - self.low_factor)
        between = (1 - share) * stretched + share * frequencies
        long = wavelengths > self.original_length / self.low_factor
        short = wavelengths < self.original_length / self.high_factor
        return np.where(long, stretched, np.where(short, frequencies, between)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants, read from a checkpoint's config.json.

    Attributes:
        vocab_size: Rows of the token embedding table.
        hidden_size: H, the width of the residual stream.
        num_heads: N, heads of queries.
        kv_heads: M, heads of keys and values; divides num_heads.
        head_size: D.
        intermediate_size: F, the width inside the feed-forward part.
        global_layers: One entry a layer: True if a token sees all of its example before it, False if the nearest only.
        window: In local layers, the tokens that one sees, itself included.
        rope: Positions in global layers.
        local_rope: Positions in local layers.
        max_length: The longest example in tokens that the checkpoint was trained for.
        activation: A key of ACTIVATIONS.
        norm_eps: Epsilon inside every norm.
        norm_offset: Added to the norms' scales: 1 in Gemma, else 0.
        query_key_norm: Whether each head's queries and keys are normed.
        post_norms: Whether the output of attention and feed-forward is normed, too.
        attention_bias: Whether the maps to queries, keys and values have biases.
        output_bias: Whether attention's output map has one.
        feed_forward_bias: Whether the feed-forward part's maps have biases.
        embedding_scale: Factor on the embedded tokens.
        attention_scale: Factor on the queries; None: D ** -0.5.
        logit_cap: c of the soft cap c tanh(x / c) on the logits over the vocabulary; None: none.
        attention_dropout: Rate on the attention probabilities.
        head_dropout: Rate in front of the checkpoint's own head over tokens' labels.
        initializer_range: Standard deviation of freshly initialised weights.
        num_labels: Outputs of heads over labels.
        tied: Whether the LM head multiplies with the token table.
        pad_token_id: Padding, which the head over rows skips; None: it is not known.
    """

    vocab_size: int
    hidden_size: int
    num_heads: int
    kv_heads: int
    head_size: int
    intermediate_size: int
    global_layers: tuple[bool, ...]
    window: int = 4096
    rope: Rope = Rope()
    local_rope: Rope = Rope()
    max_length: int = 2048
    activation: str = "silu"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    query_key_norm: bool = False
    post_norms: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    feed_forward_bias: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    logit_cap: float | None = None
    attention_dropout: float = 0.0
    head_dropout: float = 0.1
    initializer_range: float = 0.02
    num_labels: int = 2
    tied: bool = False
    pad_token_id: int | None = None
