"""The input and output of a launcher: a job, the file that starts it, and templates with values quoted for a shell."""

from __future__ import annotations

import importlib.resources
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mtl_jax.core.errors import UserError
from mtl_jax.core.files import shown

FOLDER = "launch"  # of the files that are written
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PLAIN = re.compile(r"[\w.:/@%+=,\-]+", re.ASCII)
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


class Job(NamedTuple):
    """A job, which is started on every host.

    Attributes:
        name: Its name in the system: lower-case letters, digits and "-", a letter first, at most 40 characters.
        script: The experiment's script, relative to `folder`.
        flags: The script's flags, without --distributed.
        folder: The directory on the hosts in which the script is started; empty: the launcher chooses it.
        python: The Python that runs it.
        prepare: A line of shell that every host runs first, such as ". ~/venv/bin/activate"; empty: none.
        restarts: The most restarts of the hosts.
        output: The file to write; empty: launch/NAME with the launcher's ending.
        ablate: The words of mtl-jax ablate, such as "--vary seed=0,1"; empty: the script itself is run.
    """

    name: str
    script: str
    flags: tuple[str, ...] = ()
    folder: str = ""
    python: str = "python"
    prepare: str = ""
    restarts: int = 20
    output: str = ""
    ablate: str = ""

    @property
    def command(self) -> str:
        """The line of shell that runs or ablates the script with its flags, each word quoted. More flags may be appended."""
        if self.ablate:
            words_of_ablate = shlex.split(self.ablate)
            return shlex.join([self.python, "-m", "mtl_jax", "ablate", self.script, *words_of_ablate, "--", *self.flags])
        return shlex.join([self.python, self.script, *self.flags])

    @property
    def first(self) -> str:
        """`prepare`, or a line of shell that does nothing."""
        return self.prepare or ":"

    def path(self, ending: str) -> str:
        """The file to write.

        Args:
            ending: The ending of its name, such as ".sh".
        """
        return self.output or f"{FOLDER}/{self.name}{ending}"


class LaunchFile(NamedTuple):
    """The file that starts a job on a system, and how it is used.

    Attributes:
        path: The file to write, job.path(...).
        text: Its contents.
        command: The words of the command that starts the job with it.
        tool: The program that must be on PATH.
        install: How to get the tool, for the error if it is missing.
    """

    path: str
    text: str
    command: tuple[str, ...]
    tool: str
    install: str


def check(job: Job) -> None:
    """Checks the parts of a job.

    Raises:
        UserError: The name is not valid, a text has a line break or another control character, or restarts is below 0.
    """
    if not _NAME.fullmatch(job.name):
        raise UserError(
            f"--name {shown(job.name)!r}: use lower-case letters, digits and '-', a letter first, at most 40 characters"
        )
    texts = {"the script": job.script, "--folder": job.folder, "--python": job.python, "--prepare": job.prepare}
    try:
        shlex.split(job.ablate)
    except ValueError as error:
        raise UserError(f"--ablate {shown(job.ablate)!r}: {str(error).lower()}; write it as on a command line") from error
    texts |= {"--ablate": job.ablate} | {f"flag {number} of the script": flag for number, flag in enumerate(job.flags, start=1)}
    for place, text in texts.items():
        if _CONTROL.search(text):
            raise UserError(f"{place} {shown(text)!r} has a line break or another control character; write it in one line")
    if job.restarts < 0:
        raise UserError(f"--restarts is {job.restarts}; it must be at least 0")


def name_for(script: str) -> str:
    """A job's name that is made from the name of its script: "My_Run.py" gives my-run."""
    words = re.sub(r"[^a-z0-9]+", "-", Path(script).stem.lower()).strip("-")
    return (words if words[:1].isalpha() else f"run-{words}")[:40].strip("-")


def template(name: str) -> str:
    """The text of a template of mtl_jax.

    Args:
        name: Its file, such as "ssh.sh".
    """
    return (importlib.resources.files("mtl_jax.launching") / "templates" / name).read_text(encoding="utf-8")


def fill(text: str, values: Mapping[str, str | None]) -> str:
    """A template with its placeholders {{NAME}} replaced. A line with a placeholder whose value is None is left out.

    Args:
        text: The template.
        values: {NAME: text}, already quoted for its place; see shlex.quote, yaml_text and plain.

    Raises:
        KeyError: The template has a placeholder without a value.

    Examples:
        >>> from mtl_jax.launching import fill
        >>> fill("#SBATCH --time={{time}}\\n#SBATCH --account={{account}}\\n", {"time": "1:00:00", "account": None})
        '#SBATCH --time=1:00:00\\n'
    """
    lines = [line for line in text.splitlines(keepends=True) if all(values[name] is not None for name in _names(line))]
    return "".join(_PLACEHOLDER.sub(lambda match: values[match[1]] or "", line) for line in lines)


def _names(line: str) -> list[str]:
    return _PLACEHOLDER.findall(line)


def plain(option: str, text: str) -> str:
    """A text for a place where nothing can be quoted, such as a line of #SBATCH.

    Args:
        option: The name of the option, for the error.
        text: The text.

    Raises:
        UserError: It has characters other than letters, digits and some signs.
    """
    if not _PLAIN.fullmatch(text):
        raise UserError(f"{option} is {shown(text)!r}; it can have letters, digits and . : / @ % + = , - only")
    return text


def yaml_text(text: str) -> str:
    """A text in double quotes, as in YAML and JSON."""
    return json.dumps(text)


def words(texts: Sequence[str]) -> str:
    """Words for a shell, each quoted."""
    return " ".join(map(shlex.quote, texts))
