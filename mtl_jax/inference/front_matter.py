"""The front matter of a model card, which hubs read: licence, languages, base model, library.

Licence and languages are those of the base model's own card. Nothing is invented: what that card does not say is left out, and
an unknown licence is called so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from mtl_jax.core.files import to_json
from mtl_jax.inference import card_snippets
from mtl_jax.pretrained.locate import HUB_ID
from mtl_jax.training.restore import TrainedRun
from mtl_jax.trunks import CARD, Pretrained

_VALUE = r"[A-Za-z0-9][\w.+-]*"  # of a field that is taken over from another card


class Base(NamedTuple):
    """What is known of the checkpoint that a run started from.

    Attributes:
        name: Its name on the hub, or that of its directory; "" for a trunk from scratch.
        hub_id: Its name on the hub, or that of the model that its own card names; "" where it is not known.
        licence: What its card names; "" where it is not known.
        languages: Codes that its card names.
    """

    name: str
    hub_id: str
    licence: str
    languages: tuple[str, ...]


def base_of(run: TrainedRun, workdir: Path) -> Base:
    """What is known of the checkpoint of a run's trunk; its card is in the workdir, or in its directory."""
    path = run.experiment.trunk.path if isinstance(run.experiment.trunk, Pretrained) else ""
    if not path:
        return Base("", "", "", ())
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in _cards(path, workdir) if file.is_file()]
    fields = fields_of(texts[0]) if texts else {}
    is_hub_id = HUB_ID.fullmatch(path) is not None and not Path(path).expanduser().exists()
    hub_id = path.partition("@")[0] if is_hub_id else next(iter(fields.get("base_model", ())), "")
    name = path if is_hub_id or path.startswith("pip:") else Path(path).name  # a path of this machine is nobody's business
    licences = fields.get("license", ())
    return Base(name, hub_id, licences[0] if licences and licences[0] != "unknown" else "", fields.get("language", ()))


def _cards(path: str, workdir: Path) -> list[Path]:
    local = [] if path.startswith("pip:") else [Path(path).expanduser() / CARD]
    return [workdir / "trunk" / CARD, *local]


def fields_of(text: str) -> dict[str, tuple[str, ...]]:
    """The plain values of license, language and base_model in the front matter of a model card; {} where it has none.

    Examples:
        >>> fields_of("---\\nlanguage:\\n- en\\n- de\\nlicense: mit\\n---\\n# A model\\n")
        {'language': ('en', 'de'), 'license': ('mit',)}
    """
    block = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    fields: dict[str, tuple[str, ...]] = {}
    if block is None:
        return fields
    for name in ("language", "license", "base_model"):
        value = rf"{_VALUE}(?:/{_VALUE})?" if name == "base_model" else _VALUE
        entry = re.search(rf"^{name}: *(?:\[([^\]\n]*)\]|(\S+))? *\r?((?:\n *- *\S+ *\r?$)*)", block[1], re.MULTILINE)
        if entry is not None:
            words = re.findall(
                r"[^\s,\[\]'\"]+", f"{entry[1] or ''} {entry[2] or ''} {re.sub(r'^ *- ', ' ', entry[3], flags=re.M)}"
            )
            fields[name] = tuple(word for word in words if re.fullmatch(value, word))
    return {name: values for name, values in fields.items() if values}


def of(run: TrainedRun, base: Base, usage: card_snippets.Usage, hides: bool) -> str:
    """The front matter of the card of an export.

    Args:
        run: The run.
        base: The checkpoint that it started from.
        usage: How the export is used.
        hides: Whether its data sets are not named.
    """
    sets = [source.path.removeprefix("hf:") for source in run.experiment.sources if source.path.startswith("hf:")]
    names = [re.split("[#:]", name)[0] for name in sets if not name.startswith((".", "/", "~"))]
    fields: dict[str, Any] = {
        "license": base.licence or "unknown",
        "language": list(base.languages),
        "base_model": base.hub_id,
        "library_name": usage.library,
        "pipeline_tag": usage.tag,
        "datasets": [] if hides else list(dict.fromkeys("/".join(name.split("/")[:2]) for name in names)),
        "tags": ["mtl_jax"],
    }
    lines = []
    for name, value in fields.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"- {_scalar(element)}" for element in value)] if value else []
        elif value:
            lines.append(f"{name}: {_scalar(value)}")
    return "\n".join(["---", *lines, "---\n"])


def _scalar(value: str) -> str:
    """A text in YAML; one that YAML could take for something else, such as the language "no", is quoted."""
    return (
        value
        if re.fullmatch(r"[a-z][a-z0-9/_.-]{2,}", value) and value not in ("null", "true", "false", "yes", "off")
        else to_json(value)
    )
