"""Parameter rules of the literature: layer-wise decay, discriminative rates, top layers, adapters or biases only.

Rules by depth take the number of layers, so that they are plain rules, which can be read and changed. A number that does not
fit the trunk is refused when the rules are applied: the error names a rule that matches nothing or a layer that no rule covers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from mtl_jax.core.errors import UserError, there_are
from mtl_jax.transfer.freezing import ParamRule

ULMFIT_FACTOR = 2.6
LORA_PLUS_RATIO = 16.0


def layerwise(decay: float, layers: int, decoder_layers: int = 0) -> tuple[ParamRule, ...]:
    """Layer-wise decay of the learning rate: each layer has `decay` times the rate of the layer above it; heads have it all.

    For every trunk with numbered layers: BERT and its family, ModernBERT, DeBERTa, the encoder of Marian, BART and T5, and
    `Transformer`. As in BEiT (Bao et al., 2022), after ELECTRA (Clark et al., 2020).

    Args:
        decay: Above 0, 1 at most.
        layers: Number of layers of the trunk. A layer that several depths share has one rate, and counts once: in ALBERT there
            are num_hidden_groups times inner_group_num.
        decoder_layers: Number of layers of the decoders among the heads, which count as layers above the trunk: a decoder's
            embeddings belong to its lowest layer, and its output layer has the full rate. 0: decoders have the full rate, as
            other heads.

    Returns:
        Rules that cover every parameter. The top layer's rate is `decay`, the lowest's decay ** layers, the embeddings' (and
        T5's position biases) decay ** (layers + 1). Heads, adapters and norms after the last layer have the full rate.

    Raises:
        UserError: A number is out of range.
    """
    _check(layers, decoder_layers)
    return top_layers(1 + layers + decoder_layers, layers, decoder_layers, decay)


def discriminative(layers: int, factor: float = ULMFIT_FACTOR, decoder_layers: int = 0) -> tuple[ParamRule, ...]:
    """Discriminative fine-tuning (Howard and Ruder, 2018, ULMFiT): top down, the rate is divided by `factor` with each layer.

    Args:
        layers: As for layerwise.
        factor: At least 1.
        decoder_layers: As for layerwise.

    Raises:
        UserError: A number is out of range.
    """
    if not factor >= 1:
        raise UserError(f"factor is {factor}; a rate is divided by it from layer to layer, so it must be at least 1")
    return layerwise(1 / factor, layers, decoder_layers)


def top_layers(count: int, layers: int, decoder_layers: int = 0, decay: float = 1.0) -> tuple[ParamRule, ...]:
    """Heads, adapters and the topmost layers train; the layers below are frozen and cost no backward pass.

    Args:
        count: Number of layers that train; one more than all layers: the embeddings train, too; 0: no layer trains, nor the
            norm after the last layer.
        layers: As for layerwise.
        decoder_layers: As for layerwise.
        decay: As for layerwise, for the layers that train.

    Raises:
        UserError: A number is out of range.
    """
    _check(layers, decoder_layers)
    if not 0 < decay <= 1:
        raise UserError(f"decay is {decay}; it must be above 0, and 1 at most")
    total = decoder_layers + layers
    if not 0 <= count <= total + 1:
        raise UserError(f"count is {count}; {there_are(total, 'layer')}, and {total + 1} stands for the embeddings, too")
    # A rule that matches nothing is refused, so parts that only some families have share a rule with a part that all have.
    decoder = [rf"heads/[^/]+/layer_{number}/.*" for number in reversed(range(decoder_layers))]
    heads = "heads/.*"
    if decoder:
        decoder[-1] = r"heads/[^/]+/(layer_0|embeddings|relative_bias)/.*"
        heads = r"heads/[^/]+/(?!layer_|embeddings/|relative_bias/).*"
    encoder = [rf"trunk/layer_{number}/.*" for number in reversed(range(layers))]
    if count:
        full_rate, lowest = "trunk/(adapters|norm|final_norm)/.*", "trunk/(embeddings|relative_bias)/.*"
    else:
        full_rate, lowest = "trunk/adapters/.*", "trunk/(embeddings|relative_bias|norm|final_norm)/.*"
    below = [*decoder, *encoder, lowest]
    training = [ParamRule(pattern, rate=decay**depth) for depth, pattern in enumerate(below[:count], 1)]
    return (ParamRule(f"{heads}|{full_rate}"), *training, *(ParamRule(pattern, train=False) for pattern in below[count:]))


def _check(layers: int, decoder_layers: int) -> None:
    for name, number, least in (("layers", layers, 1), ("decoder_layers", decoder_layers, 0)):
        if number < least:
            raise UserError(f"{name} is {number}; it must be at least {least}")


def adapters_only(decoders: Sequence[str] = (), trunk: bool = True) -> tuple[ParamRule, ...]:
    """The adapters and the heads train; the trunk itself is frozen.

    Args:
        decoders: Seq2Seq tasks whose decoders have adapters: of these heads, too, only the adapters train.
        trunk: Whether the trunk has adapters; a rule that matches nothing would be refused.

    Examples:
        >>> phase = mtl_jax.Phase("lora", steps=200, rules=mtl_jax.adapters_only())
    """
    inside = [
        rule
        for name in map(re.escape, decoders)
        for rule in (ParamRule(f"heads/{name}/adapters/.*"), ParamRule(f"heads/{name}/.*", train=False))
    ]
    added = (ParamRule("trunk/adapters/.*"),) if trunk else ()
    return (*inside, *added, ParamRule("trunk/.*", train=False), ParamRule("heads/.*"))


def lora_plus(ratio: float = LORA_PLUS_RATIO) -> tuple[ParamRule, ...]:
    """As adapters_only(), and the matrix B of every Lora has `ratio` times the learning rate (Hayou et al. 2024, LoRA+).

    For Lora, RsLora, Dora and Pissa, whose B is the parameter named b. The rate of the phase is that of A.

    Args:
        ratio: Above 0; the paper finds about 16 good, and suits it to the task.

    Raises:
        UserError: ratio is out of range.

    Examples:
        >>> phase = mtl_jax.Phase("lora", steps=200, rules=mtl_jax.lora_plus())
    """
    if not 0 < ratio < math.inf:
        raise UserError(f"ratio is {ratio}; it is the rate of B over that of A, so it must be above 0")
    return (ParamRule("trunk/adapters/.*/b", rate=ratio), *adapters_only())


def bitfit() -> tuple[ParamRule, ...]:
    """In the trunk only the biases train, those of norms included (Zaken et al. 2022, BitFit); heads train in full.

    T5 has no biases, and ModernBERT usually none: for them the rules are refused, as all rules that match nothing.

    Examples:
        >>> phase = mtl_jax.Phase("biases", steps=200, rules=mtl_jax.bitfit())
    """
    return (ParamRule("trunk/(.*/)?bias"), ParamRule("trunk/.*", train=False), ParamRule("heads/.*"))
