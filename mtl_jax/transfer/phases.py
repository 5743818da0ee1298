"""Stretches of a run, and those that the literature describes: gradual unfreezing, linear probing before fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import UserError, listed, there_are
from mtl_jax.core.errors import count as number_of
from mtl_jax.transfer.freezing import ParamRule
from mtl_jax.transfer.param_rules import top_layers


@dataclasses.dataclass(frozen=True)
class Phase(Configuration):
    """A stretch of steps with its own trainable part, weights and learning rate; schedules run over the phase.

    Attributes:
        name: Shown in the progress bar and the logs.
        steps: Length of the phase.
        rules: Which parameters train, and how: the first rule whose pattern matches a parameter's path decides.
        learning_rate: Peak rate; None: optimizer.learning_rate.
        weights: Loss weights of this phase, numbers or schedules of the run's step, as they stand, without combinators; empty:
            the experiment's weighting.
        mixture: How often each source is seen in this phase, as in batch.mixture; empty: as batch.mixture says.
        shares: For the mixture fixed: a number for each source.
        cache_features: Where the rules freeze the whole trunk, compute its output for every example once; not where a
            task labels tokens.
    """

    name: str
    steps: int
    rules: tuple[ParamRule, ...] = (ParamRule(".*"),)
    learning_rate: float | None = None
    weights: dict[str, float | str] = dataclasses.field(default_factory=dict)
    mixture: str = ""
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    cache_features: bool = True


def unfreezing(
    steps: int,
    at: Sequence[int],
    layers: int,
    *,
    decoder_layers: int = 0,
    decay: float = 1.0,
    learning_rate: float | None = None,
) -> tuple[Phase, ...]:
    """Gradual unfreezing from the top (Howard and Ruder, 2018, ULMFiT): heads first, then one layer more at each step of `at`.

    Each phase has its own schedule, as ULMFiT has; moments of what goes on training are kept.

    Args:
        steps: Of all these phases together.
        at: The steps after which the next layer trains, too, in order, such as range(100, 700, 100). The number after that of
            the lowest layer is the embeddings'; what has no number stays frozen. Layers with the same number come together.
        layers: As for layerwise.
        decoder_layers: As for layerwise.
        decay: As for layerwise: 1 / 2.6 are ULMFiT's discriminative rates.
        learning_rate: Of each phase.

    Returns:
        The phases "heads", "top_1", "top_2" ...: as many layers train.

    Raises:
        UserError: A step lies outside, steps are out of order or too many, or a number makes no sense.
    """
    at = list(at)
    for count, step in enumerate(at, 1):
        if not 0 <= step < steps:
            raise UserError(
                f"unfreezing: layer {count} from the top is to train after step {step}, but {there_are(steps, 'step')}"
            )
    if at != sorted(at):
        raise UserError(f"unfreezing: steps go up from layer to layer, but at is {listed(at)}")
    if len(at) > layers + decoder_layers + 1:
        raise UserError(
            f"unfreezing: at has {number_of(len(at), 'step')}; {number_of(layers + decoder_layers, 'layer')} and the "
            f"embeddings take {layers + decoder_layers + 1} at most"
        )
    starts = {0: 0} | {step: count for count, step in enumerate(at, 1)}
    phases = []
    for (start, count), end in zip(starts.items(), [*list(starts)[1:], steps], strict=True):
        rules = top_layers(count, layers, decoder_layers, decay)
        phases.append(Phase(f"top_{count}" if count else "heads", end - start, rules, learning_rate))
    return tuple(phases)


def probe_then_finetune(
    probe_steps: int,
    steps: int,
    probe_rate: float,
    rate: float,
    rules: tuple[ParamRule, ...] = (ParamRule(".*"),),
) -> tuple[Phase, ...]:
    """Linear probing, then fine-tuning (Kumar et al., 2022, LP-FT): features are not bent by a head that is still random.

    The heads of the first phase see a frozen trunk, whose features are computed once where tasks read pooled vectors only.

    Args:
        probe_steps: Steps in which heads alone train.
        steps: Steps after them.
        probe_rate: Learning rate of the first phase.
        rate: Of the second; it must be lower.
        rules: Of the second, such as layerwise(0.9, layers=6).

    Returns:
        The phases "probe" and "finetune".

    Raises:
        UserError: The second rate is not the lower one.
    """
    if not rate < probe_rate:
        raise UserError(f"probe_then_finetune: rate is {rate}; it must be lower than probe_rate, which is {probe_rate}")
    heads_only = (ParamRule("heads/.*"), ParamRule("trunk/.*", train=False))
    return Phase("probe", probe_steps, heads_only, probe_rate), Phase("finetune", steps, rules, rate)
