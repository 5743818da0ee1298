"""adapter_config.json of a PEFT directory: what it says about the adapters, and the modules of a model that it names.

Every field that changes what a model computes is read or refused by name; none is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mtl_jax.core.errors import NOT_A_PATTERN, UserError, unknown
from mtl_jax.core.files import shown
from mtl_jax.pretrained.family import Fields, brief, finite

FILE, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
LORA, IA3, PREFIX, PROMPT = KINDS = ("LORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING")
# Fields without an effect on what a trained adapter computes. The linear maps of these families are torch's Linear, for which
# PEFT sets fan_in_fan_out to false itself; which layers have tensors, the file of tensors says.
WITHOUT_EFFECT = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("fan_in_fan_out", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "init_ia3_weights"),
    *("ensure_weight_tying", "init_weights", "tokenizer_kwargs", "tokenizer_name_or_path", "prompt_tuning_init"),
    *("prompt_tuning_init_text", "encoder_hidden_size", "prefix_projection"),
}
READ = {
    LORA: {
        *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
        *("modules_to_save", "use_rslora", "use_dora", "init_lora_weights"),
    },
    IA3: {"target_modules", "feedforward_modules", "exclude_modules", "modules_to_save"},
    PREFIX: {
        *("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"),
        "modules_to_save",
    },
}
READ[PROMPT] = READ[PREFIX]
EMPTY: tuple[Any, ...] = (None, False, "", "none", {}, [])
# Ways to begin a LoRA that leave the base as it is; and PiSSA, which is known here, too.
STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "pissa")


class PeftConfig(NamedTuple):
    """The fields of adapter_config.json.

    Attributes:
        kind: One of KINDS.
        fields: The parsed file.
        target: target_modules, a list of names or an expression; [] where the kind has none.
        exclude: exclude_modules, the same.
        rank_patterns: {expression: rank}.
        alpha_patterns: {expression: alpha}.
        modules_to_save: Names of modules that are stored whole.
    """

    kind: str
    fields: Fields
    target: list[str] | str
    exclude: list[str] | str
    rank_patterns: Mapping[str, int]
    alpha_patterns: Mapping[str, float]
    modules_to_save: list[str]

    @property
    def where(self) -> str:
        """The file's name, for errors."""
        return self.fields.where

    def targets(self, module: str) -> bool:
        """Whether PEFT puts an adapter at a linear map of this name."""
        if any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in self.modules_to_save):
            return False
        if self.exclude and named(self.exclude, module):
            return False
        return self.target == ALL_LINEAR or named(self.target, module)

    def rank(self, module: str) -> int:
        """The rank of a LoRA at a module."""
        return self.rank_patterns.get(first_pattern(self.rank_patterns, module), self.fields.integer("r", 8))

    def alpha(self, module: str) -> float:
        """The alpha of a LoRA at a module."""
        return self.alpha_patterns.get(first_pattern(self.alpha_patterns, module), self.fields.number("lora_alpha", 8))


def parse(raw: Mapping[str, Any], where: str) -> PeftConfig:
    """Reads and checks the fields.

    Args:
        raw: The parsed file.
        where: Its name, for errors.

    Raises:
        UserError: A field is missing or wrong, or asks for what is not supported; the line names it.
    """
    fields = Fields(raw, where)
    kind = fields.get("peft_type")
    if kind not in KINDS:
        raise unknown(f"peft_type in {where}:", kind if isinstance(kind, str) else brief(kind), KINDS)
    for name, value in raw.items():
        if name not in WITHOUT_EFFECT | READ[kind] and value not in EMPTY:
            raise UserError(f"{where}: {name} is {brief(value)}, a feature of PEFT that is not supported here")
    if kind == LORA and raw.get("init_lora_weights", True) not in STARTS:
        raise UserError(
            f"{where}: init_lora_weights is {brief(raw['init_lora_weights'])}, which changes the base in a way that is not "
            "known here; save the adapter in PEFT with path_initial_model_for_weight_conversion"
        )
    return PeftConfig(
        kind,
        fields,
        _names(raw, "target_modules", where),
        _names(raw, "exclude_modules", where),
        _patterns(raw, "rank_pattern", where),
        _patterns(raw, "alpha_pattern", where),
        list(dict.fromkeys(_names(raw, "modules_to_save", where))),
    )


def check_patterns(config: PeftConfig, modules: Iterable[str]) -> None:
    """Checks that each rank and alpha pattern, and each target, matches one of the modules that have adapters.

    Raises:
        UserError: One matches nothing.
    """
    modules = list(modules)
    for field, patterns in (("rank_pattern", config.rank_patterns), ("alpha_pattern", config.alpha_patterns)):
        for pattern in patterns:
            if not any(first_pattern([pattern], module) for module in modules):
                raise UserError(
                    f"{config.where}: {field} {shown(pattern)!r} matches no module with an adapter; there are modules such as "
                    f"{modules[0] if modules else 'none'}"
                )


def named(target: list[str] | str, module: str) -> bool:
    """Whether target_modules, a list of names or of their ends, or an expression for whole names, names a module."""
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in target)


def first_pattern(patterns: Iterable[str], module: str) -> str:
    """The first pattern that matches the end of a module's name; "" for none."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), "")


def _names(raw: Mapping[str, Any], field: str, where: str) -> list[str] | str:
    value = raw.get(field)
    if isinstance(value, str) and field != "modules_to_save":
        _check_expression(value, field, where)
        return value
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{where}: {field} is {brief(value)}; it must be a list of names or, for target_modules, an expression")
    return value


def _patterns(raw: Mapping[str, Any], field: str, where: str) -> dict[str, Any]:
    value, whole = raw.get(field) or {}, field == "rank_pattern"
    if not isinstance(value, dict) or not all(
        finite(number) and number > 0 and (isinstance(number, int) or not whole) for number in value.values()
    ):
        kind = "positive whole numbers" if whole else "positive numbers"
        raise UserError(f"{where}: {field} is {brief(value)}; it must be an object of names and {kind}")
    for pattern in value:
        _check_expression(pattern, field, where)
    return value


def _check_expression(pattern: str, field: str, where: str) -> None:
    try:
        re.compile(pattern)
    except NOT_A_PATTERN as error:
        raise UserError(f"{where}: {field} {shown(pattern)!r} is not a regular expression ({error})") from error
