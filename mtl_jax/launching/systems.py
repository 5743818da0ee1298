"""The launchers: for each system a function that fills a template for a job. Users can register their own."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mtl_jax.core import name_options
from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.core.files import shown
from mtl_jax.core.parts import Registry
from mtl_jax.launching.job import Job, LaunchFile, fill, plain, template, words, yaml_text

Launcher = Callable[..., LaunchFile]

SSH_FORM = "ssh:HOST,HOST"


def ssh(job: Job, hosts: Any = "", *, port: int = 8476) -> LaunchFile:
    """Hosts that ssh reaches, with the same directory on each. The first one is host 0."""
    names = [str(host).strip() for host in (hosts if isinstance(hosts, tuple) else str(hosts).split(","))]
    names = [plain("a host of --on ssh", name) for name in names if name]
    if not names:
        raise UserError(f"--on ssh needs the hosts: write {SSH_FORM}")
    repeated = [name for place, name in enumerate(names) if name in names[:place]]
    if repeated:
        raise UserError(f"--on ssh: {listed(repeated)} stands there twice; every host runs one process")
    start = (
        f'( echo $BASHPID > "$1"; shift; cd {_folder(job)} || exit 2; {{ {job.first}; }} || exit 2; exec {job.command} "$@" ); '
        'code=$?; rm -f "$1"; exit $code'
    )
    values = {"hosts": words(names), "port": str(port), "start": shlex.quote(start)}
    return _shell(job, "ssh.sh", values, "ssh", "install OpenSSH")


def slurm(
    job: Job,
    *,
    nodes: int = 1,
    time: str = "24:00:00",
    gpus: Any = None,
    cpus: Any = None,
    mem: Any = None,
    partition: Any = None,
    account: Any = None,
    qos: Any = None,
    constraint: Any = None,
    notice: int = 120,
) -> LaunchFile:
    """A Slurm job with one process a node, which is told to save its state `notice` seconds before the time limit."""
    path = job.path(".sbatch")
    directives = {
        "gpus": gpus,
        "cpus": cpus,
        "mem": mem,
        "partition": partition,
        "account": account,
        "qos": qos,
        "constraint": constraint,
    }
    values = {option: None if value is None else _plain("slurm", option, value) for option, value in directives.items()}
    values |= {
        "name": job.name,
        "nodes": _number("slurm", "nodes", nodes),
        "time": _plain("slurm", "time", time),
        "notice": _number("slurm", "notice", notice),
        "log": plain("the file", f"{path.removesuffix('.sbatch')}-%j.log"),
        "folder": _folder(job),
    }
    text = fill(template("slurm.sbatch"), _of_job(job) | values)
    return LaunchFile(path, text, ("sbatch", path), "sbatch", "run this on a login node of the cluster")


def gcloud(
    job: Job,
    *,
    zone: str,
    type: str,
    version: str = "tpu-ubuntu2204-base",
    project: Any = None,
    spot: bool = False,
    pause: int = 60,
) -> LaunchFile:
    """A TPU VM of Google Cloud, made if it does not exist; `pause` is the number of seconds before a restart."""
    folder = plain("--folder", job.folder or f"mtl_jax-{job.name}")
    pid_file = f"/tmp/mtl_jax-{job.name}.pid"
    start = (
        f"( cd {folder} || exit 2; {{ {job.first}; }} || exit 2; echo $BASHPID > {pid_file}; exec {job.command} "
        f'--distributed auto ); code=$?; rm -f {pid_file}; echo "launch: this host ended with code $code"'
    )
    values = {
        "tpu": job.name,
        "zone": shlex.quote(str(zone)),
        "type": shlex.quote(str(type)),
        "version": shlex.quote(str(version)),
        "project": None if project is None else shlex.quote(str(project)),
        "spot": "cheaper, and may be taken away" if spot else None,
        "folder": folder,
        "start": shlex.quote(start),
        "stop": shlex.quote(f'kill -TERM "$(cat {pid_file})"'),
        "pause": _number("gcloud", "pause", pause, least=0),
    }
    return _shell(job, "gcloud.sh", values, "gcloud", "install the Google Cloud CLI, cloud.google.com/sdk")


def skypilot(
    job: Job,
    *,
    accelerators: Any,
    nodes: int = 1,
    infra: Any = None,
    spot: bool = True,
    image: Any = None,
    bucket: Any = None,
    port: int = 8476,
) -> LaunchFile:
    """A managed job of SkyPilot, on any of its clouds; it copies the current directory to the machines."""
    _copied(job, "skypilot")
    path = job.path(".yaml")
    texts = {"accelerators": accelerators, "infra": infra, "image": image, "bucket": bucket}
    values = {option: None if value is None else yaml_text(str(value)) for option, value in texts.items()}
    values |= {
        "name": job.name,
        "nodes": _number("skypilot", "nodes", nodes),
        "spot": "true" if spot else "false",
        "port": _number("skypilot", "port", port),
    }
    text = fill(template("skypilot.yaml"), _of_job(job) | values)
    return LaunchFile(
        path, text, ("sky", "jobs", "launch", "--yes", path), "sky", "pip install 'skypilot[gcp]', or another cloud"
    )


def xpk(
    job: Job,
    *,
    cluster: str,
    type: str,
    slices: int = 1,
    project: Any = None,
    zone: Any = None,
    image: Any = None,
    storage: Any = None,
    notice: int = 120,
) -> LaunchFile:
    """A workload of xpk on TPUs of a GKE cluster; it copies the current directory into an image."""
    _copied(job, "xpk")
    texts = {"cluster": cluster, "type": type, "project": project, "zone": zone, "image": image, "storage": storage}
    values = {option: None if value is None else shlex.quote(str(value)) for option, value in texts.items()}
    values |= {
        "slices": _number("xpk", "slices", slices),
        "notice": _number("xpk", "notice", notice),
        "file": plain("--output", job.path(".xpk.sh")),
    }
    return _shell(job, "xpk.sh", values, "xpk", "pip install xpk")


LAUNCHERS: Registry[Launcher] = Registry(
    "launcher", {"gcloud": gcloud, "slurm": slurm, "skypilot": skypilot, "xpk": xpk, "ssh": ssh}
)


def register_launcher(name: str) -> Callable[[Launcher], Launcher]:
    """A decorator that registers a launcher: a function (job, **options) -> LaunchFile, chosen by --on NAME:OPTION=VALUE.

    Options without a default must be given. If the script exits with code 75, "start me again", the file starts it again, at
    most job.restarts times.

    Raises:
        UserError: The name is taken.

    Examples:
        >>> from mtl_jax.launching import Job, LaunchFile, fill
        >>> TEXT = "#BSUB -J {{name}} -q {{queue}} -Q 75\\n{{command}}\\n"
        >>> @mtl_jax.register_launcher("lsf")
        ... def lsf(job: Job, *, queue="normal"):
        ...     text = fill(TEXT, {"name": job.name, "queue": queue, "command": job.command})
        ...     return LaunchFile(job.path(".lsf"), text, ("bsub", job.path(".lsf")), "bsub", "ask the cluster's owners")
        >>> from mtl_jax.launching.systems import launch_file
        >>> launch_file("lsf:queue=night", Job("two-tasks", "two_tasks.py", ("--seed", "1"))).text
        '#BSUB -J two-tasks -q night -Q 75\\npython two_tasks.py --seed 1\\n'
    """
    return LAUNCHERS.register(name)


def launch_file(on: str, job: Job) -> LaunchFile:
    """The file that starts a job.

    Args:
        on: A launcher with its options: "slurm:nodes=2,time=4:00:00", "ssh:one,two".
        job: The job.

    Raises:
        UserError: The launcher or an option is unknown (lists them), an option is missing, or its value is refused.
    """
    name, arguments, options = name_options.parse(on, "--on", LAUNCHERS, form={"ssh": SSH_FORM}, arguments=True)
    launcher = LAUNCHERS[name]
    parameters = dict(list(inspect.signature(launcher).parameters.items())[1:])
    named = {option: parameter for option, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    if len(arguments) > len(parameters) - len(named):
        hint = f"write {SSH_FORM}" if name == "ssh" else f"give options as {name}:OPTION=VALUE,OPTION=VALUE"
        raise UserError(f"--on {shown(on)!r}: {hint}")
    for option in options:
        if option not in parameters:
            raise unknown(f"option of --on {name}:", option, parameters)
    missing = [option for option, parameter in named.items() if parameter.default is parameter.empty and option not in options]
    if missing:
        given = ",".join(f"{option}=VALUE" for option in missing)
        raise UserError(f"--on {name} needs {listed(missing)}: write {name}:{given}; its options are {listed(named)}")
    result = launcher(job, *arguments, **options)
    if not isinstance(result, LaunchFile):
        raise UserError(f"--on {name}: its function returned a {type(result).__name__}; it must return a launching.LaunchFile")
    return result


def _shell(job: Job, file: str, values: Mapping[str, str | None], tool: str, install: str) -> LaunchFile:
    """The launch file of a template that is a shell script."""
    path = job.path(f".{file}")
    text = fill(template(file), {**_of_job(job), **values})
    return LaunchFile(path, text, ("bash", path), tool, install)


def _of_job(job: Job) -> dict[str, str | None]:
    """The values that all templates share."""
    return {"name": job.name, "restarts": str(job.restarts), "first": job.first, "command": job.command}


def _folder(job: Job) -> str:
    """The directory of the script on machines that share this directory, or have it under the same path."""
    return shlex.quote(job.folder or str(Path.cwd()))


def _copied(job: Job, launcher: str) -> None:
    if job.folder:
        raise UserError(f"--folder {shown(job.folder)!r}: --on {launcher} itself chooses where it copies this directory to")


def _plain(launcher: str, option: str, value: Any) -> str:
    return plain(f"option {option} of --on {launcher}", str(value))


def _number(launcher: str, option: str, value: Any, least: int = 1) -> str:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"option {option} of --on {launcher} is {shown(str(value))!r}; it must be a whole number from {least}")
    return str(value)
