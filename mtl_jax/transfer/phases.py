"""Phases of a run, and the sequences of phases of the literature: gradual unfreezing, linear probing before fine-tuning."""

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
    """A number of steps with their own trainable parameters, weights and learning rate; schedules run over the phase.

    Attributes:
        name: The name in the progress bar and the logs.
        steps: Number of steps of the phase.
        rules: Which parameters train, and how: the first rule whose pattern matches a parameter's path decides.
        learning_rate: Peak rate; None: optimizer.learning_rate.
        weights: Loss weights of this phase, numbers or schedules of the run's step, used without combinators; empty: the
            experiment's weighting.
        mixture: How often each source is seen in this phase, as in batch.mixture; empty: as batch.mixture says.
        shares: For the mixture fixed: a number for each source.
        cache_features: If the rules freeze the whole trunk, compute its output once for every example; not if a task labels
            tokens.

    Examples:
        >>> mtl_jax.Phase("heads", steps=300, rules=(mtl_jax.ParamRule("trunk/.*", train=False), mtl_jax.ParamRule(".*"))).steps
        300
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
    """Gradual unfreezing from the top (Howard and Ruder, 2018, ULMFiT): heads first, then one more layer at each step of `at`.

    Each phase has its own schedule, as in ULMFiT; parameters that continue to train keep their moments.

    Args:
        steps: Steps of all phases together.
        at: The steps after which the next layer trains, too, in order, such as range(100, 700, 100). The step after the lowest
            layer's is for the embeddings; layers without a step stay frozen, and layers with the same step start together.
        layers: As for layerwise.
        decoder_layers: As for layerwise.
        decay: As for layerwise: 1 / 2.6 are ULMFiT's discriminative rates.
        learning_rate: The peak rate of each phase.

    Returns:
        The phases "heads", "top_1", "top_2" ..., named after the number of layers that train.

    Raises:
        UserError: A step is not one of the run, steps are out of order or too many, or a number is out of range.
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


def setfit(
    contrastive: str,
    classifier: str,
    steps: int,
    head_steps: int,
    *,
    rate: float,
    head_rate: float,
    rules: tuple[ParamRule, ...] = (ParamRule(".*"),),
) -> tuple[Phase, ...]:
    """Contrastive training on few labels, then a classifier on the frozen vectors (Tunstall et al., 2022, SetFit).

    Both tasks are of one source: a Contrastive that compares its texts by their labels, so that n rows give n (n - 1) / 2
    pairs, and a Classification of the same labels. Set evaluation.criterion to the classifier: its head is random until the
    second phase.

    Args:
        contrastive: The name of the Contrastive task.
        classifier: The name of the task whose head trains in the second phase.
        steps: Steps of the first phase.
        head_steps: Steps of the second phase.
        rate: Learning rate of the first phase.
        head_rate: Learning rate of the second phase.
        rules: Parameter rules of the first phase, such as layerwise(0.9, layers=6).

    Returns:
        The phases "contrast" and "head".

    Raises:
        UserError: Both names are the same.
    """
    if contrastive == classifier:
        raise UserError(f"setfit: contrastive and classifier are both {classifier!r}; name two tasks of one source")
    heads_only = (ParamRule("heads/.*"), ParamRule("trunk/.*", train=False))
    pairs, labels = {contrastive: 1.0, classifier: 0.0}, {contrastive: 0.0, classifier: 1.0}
    return (
        Phase("contrast", steps, rules, rate, weights=dict(pairs)),
        Phase("head", head_steps, heads_only, head_rate, weights=dict(labels)),
    )


def probe_then_finetune(
    probe_steps: int,
    steps: int,
    probe_rate: float,
    rate: float,
    rules: tuple[ParamRule, ...] = (ParamRule(".*"),),
) -> tuple[Phase, ...]:
    """Linear probing, then fine-tuning (Kumar et al., 2022, LP-FT), so that a random head does not distort the features.

    The trunk is frozen in the first phase; its features are computed once if all tasks read pooled vectors.

    Args:
        probe_steps: Steps of the first phase, in which only heads train.
        steps: Steps of the second phase.
        probe_rate: Learning rate of the first phase.
        rate: Learning rate of the second phase; it must be lower.
        rules: Parameter rules of the second phase, such as layerwise(0.9, layers=6).

    Returns:
        The phases "probe" and "finetune".

    Raises:
        UserError: The second rate is not lower than the first.
    """
    if not rate < probe_rate:
        raise UserError(f"probe_then_finetune: rate is {rate}; it must be lower than probe_rate, which is {probe_rate}")
    heads_only = (ParamRule("heads/.*"), ParamRule("trunk/.*", train=False))
    return Phase("probe", probe_steps, heads_only, probe_rate), Phase("finetune", steps, rules, rate)
