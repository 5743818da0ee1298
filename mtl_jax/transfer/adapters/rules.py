"""Parameter rules for adapters, and for the one that adds nothing."""

from __future__ import annotations

from mtl_jax.transfer.freezing import ParamRule


def adapters_only() -> tuple[ParamRule, ...]:
    """The adapters and the heads train; the trunk itself stays as it is."""
    return (ParamRule("trunk/adapters/.*"), ParamRule("trunk/.*", train=False), ParamRule("heads/.*"))


def bitfit() -> tuple[ParamRule, ...]:
    """Of the trunk only the biases train, those of norms included (Zaken et al. 2022, BitFit); heads train whole.

    T5 has no biases, and ModernBERT usually none: there the rules are refused, as any that match nothing.
    """
    return (ParamRule("trunk/(.*/)?bias"), ParamRule("trunk/.*", train=False), ParamRule("heads/.*"))
