"""Launch files: valid for their shells, with flags that arrive unchanged, run by stubs of the tools on PATH."""

import doctest
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import mtl_jax
from mtl_jax.cli import main
from mtl_jax.core import parts
from mtl_jax.core.errors import UserError
from mtl_jax.launching import Job, LaunchFile, job
from mtl_jax.launching.systems import LAUNCHERS, launch_file

ODD = ("--name", 'it\'s $HOME `id` "x" \\ {{name}} $(id) !  *', "--workdir", "/shared/a b", "")
TARGETS = {
    "ssh:me@one,two": "ssh.sh",
    "slurm:nodes=2,gpus=8,time=4:00:00,partition=long": "sbatch",
    "gcloud:zone=us-central2-b,type=v4-16,spot=true,pause=0": "gcloud.sh",
    "skypilot:accelerators=H100:8,nodes=2,bucket=s3://runs": "yaml",
    "xpk:cluster=ours,type=v5litepod-16,image=image": "xpk.sh",
}
# A Python that writes its arguments, and ends with the next code of the file "codes".
PYTHON = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "args-$$"
until mkdir lock 2> /dev/null; do sleep .01; done
code=$(head -n 1 codes)
sed -i 1d codes
rmdir lock
[ "$code" = wait ] && { trap 'exit 75' TERM; while :; do sleep .05; done; }
exit "${code:-0}"
"""
TOOLS = {
    # The remote shell gets all words after the host, joined by spaces.
    "ssh": 'while [ "$1" = -o ]; do shift 2; done; echo "$1" >> hosts; shift; cd /; exec sh -c "$*"',
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$*" >> requeued; fi',
    "srun": 'while [[ $1 = --* ]]; do shift; done; SLURM_PROCID=1 SLURM_NTASKS=2 exec "$@"',
    "gcloud": """echo "$4 $5" >> calls
case $4 in
  describe) cat state ;;
  create) echo READY > state ;;
  ssh) for word in "$@"; do case $word in --command=*) cd "$TPU"; exec bash -c "${word#--command=}" ;; esac; done ;;
  scp) cp "$5" "$TPU/launch.tar.gz" ;;
esac""",
    "xpk": "printf '%s\\n' \"$@\" > xpk-args",
}


SCRIPT = """from mtl_jax import Classification, Embedding, Experiment, Phase, Source, main
source, task = Source("words", path="words.csv"), Classification(name="label", source="words")
main(Experiment("tiny", trunk=Embedding(), sources=(source,), tasks=(task,), phases=(Phase("all", steps=1),)))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project with a stub of Python and of each tool on PATH; the current directory."""
    folder = tmp_path / "the project"
    (folder / "bin").mkdir(parents=True)
    for name, text in {"a python": PYTHON, **{name: f"#!/usr/bin/env bash\n{text}\n" for name, text in TOOLS.items()}}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "two_tasks.py").write_text(SCRIPT)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return folder


def job_in(folder: Path, *flags: str, **fields) -> Job:
    return Job(
        **{"name": f"t-{os.getpid()}", "script": "two_tasks.py", "flags": flags, "python": str(folder / "bin" / "a python")}
        | fields
    )


def started(folder: Path, file: LaunchFile, *codes: object, **variables: str) -> subprocess.Popen:
    """The launch file, run by bash, where the runs end with the given codes."""
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    (folder / "file").write_text(file.text)
    return subprocess.Popen(["bash", "file"], env=os.environ | variables, stderr=subprocess.PIPE, text=True)


def arguments(folder: Path) -> list[list[str]]:
    """What the runs were called with."""
    return sorted(path.read_bytes().decode().split("\0")[:-1] for path in folder.rglob("args-*"))


@pytest.mark.parametrize("on", TARGETS)
def test_a_file_is_valid_for_its_reader_and_has_no_placeholder_left(folder, on):
    file = launch_file(on, job_in(folder, *ODD[:1]))
    assert file.path.endswith(TARGETS[on])
    assert "{{" not in file.text
    if file.path.endswith("yaml"):
        task = yaml.safe_load(file.text)
        assert task["resources"] == {
            "accelerators": "H100:8",
            "use_spot": True,
            "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]},
        }
        assert task["file_mounts"] == {"/bucket": {"source": "s3://runs", "mode": "MOUNT"}}
        text = task["run"]
    else:
        text = file.text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=True, stderr=subprocess.PIPE, stdout=None).stderr == ""


def test_ssh_starts_all_hosts_again_after_75_and_flags_arrive_unchanged(folder):
    file = launch_file("ssh:me@one,two", job_in(folder, *ODD, restarts=3))
    process = started(folder, file, 75, 137, 0, 0)
    assert process.communicate()[1].count("starting again, 1 of at most 3") == 1
    assert process.returncode == 0
    expected = [["two_tasks.py", *ODD, "--distributed", f"one:8476,{index},2"] for index in (0, 0, 1, 1)]
    assert arguments(folder) == expected
    assert sorted((folder / "hosts").read_text().split()) == ["me@one", "me@one", "two", "two"]


@pytest.mark.parametrize(
    ("codes", "code", "runs"), [((2, 75), 2, 2), ((1, 0), 1, 2), ((75,) * 4, 75, 4), ((75, 0, 0, 0), 0, 4)]
)
def test_ssh_ends_after_bad_input_another_error_and_the_last_restart(folder, codes, code, runs):
    process = started(folder, launch_file("ssh:one,two", job_in(folder, restarts=1)), *codes)
    process.communicate()
    assert process.returncode == code
    assert len(arguments(folder)) == runs


def test_a_signal_to_the_ssh_script_stops_the_hosts_and_nothing_starts_again(folder):
    process = started(folder, launch_file("ssh:one,two", job_in(folder)), "wait", "wait")
    deadline = time.monotonic() + 20
    while len(arguments(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)  # until the stubs listen
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert len(arguments(folder)) == 2


@pytest.mark.parametrize(("code", "restarted", "requeued"), [(0, 0, False), (75, 0, True), (137, 1, True), (75, 2, False)])
def test_slurm_requeues_after_75_until_the_last_restart(folder, code, restarted, requeued):
    file = launch_file("slurm:nodes=2,gpus=8", job_in(folder, *ODD, restarts=2))
    assert "#SBATCH --gpus-per-node=8\n" in file.text
    assert "--partition" not in file.text
    slurm = {"SLURM_JOB_ID": "40001", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_RESTART_COUNT": str(restarted)}
    process = started(folder, file, code, **slurm)
    process.communicate()
    assert process.returncode == code
    assert arguments(folder) == [["two_tasks.py", *ODD, "--distributed", "node7:20001,1,2"]]
    assert (folder / "requeued").exists() == requeued


def test_gcloud_makes_the_tpu_copies_the_folder_and_starts_again(folder, tmp_path):
    (tmp_path / "tpu").mkdir()
    (folder / "state").write_text("PREEMPTED\n")
    file = launch_file("gcloud:zone=z,type=v4-16,spot=true,pause=0", job_in(folder, *ODD, prepare="cp codes ../codes || :"))
    file = file._replace(text=file.text.replace("--exclude=./.git", "--exclude=./.git --exclude=./state"))
    process = started(folder, file, 75, 0, TPU=str(tmp_path / "tpu"))
    assert "starting again, 1 of" in process.communicate()[1]
    assert process.returncode == 0
    assert arguments(tmp_path / "tpu") == [["two_tasks.py", *ODD, "--distributed", "auto"]] * 2
    calls = [line.split()[0] for line in (folder / "calls").read_text().splitlines()]
    assert calls == ["describe", "describe", "delete", "create", "scp", "ssh", "ssh", "describe", "ssh"]


def test_xpk_gets_the_file_itself_as_command(folder):
    file = launch_file("xpk:cluster=ours,type=v5litepod-16", job_in(folder, *ODD, restarts=5))
    process = started(folder, file, 75)
    process.communicate()
    words = (folder / "xpk-args").read_text().splitlines()
    assert {"--max-restarts=5", "--restart-on-exit-codes=75", "--cluster=ours"} < set(words)
    assert words[-2:] == ["--command", f"exec bash {file.path} host"]
    assert subprocess.run(["bash", "file", "host"], check=False).returncode == 75
    assert arguments(folder) == [["two_tasks.py", *ODD, "--distributed", "auto"]]


@pytest.mark.parametrize(("nodes", "codes", "code", "runs"), [(1, (75, 137, 0), 0, 3), (2, (2,), 2, 1), (1, (75,) * 3, 1, 3)])
def test_the_run_of_skypilot_starts_again_where_it_is(folder, nodes, codes, code, runs):
    file = launch_file("skypilot:accelerators=H100:8", job_in(folder, *ODD, restarts=2))
    text = yaml.safe_load(file.text)["run"]
    sky = {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    process = started(folder, file._replace(text=text), *codes, **sky)
    process.communicate()
    assert process.returncode == code
    together = ["--distributed", "10.0.0.1:8476,1,2"] if nodes == 2 else []
    assert arguments(folder) == [["two_tasks.py", *ODD, *together]] * runs


def test_dry_run_prints_and_writes_nothing_and_yes_runs(folder, capfd):
    launched = mtl_jax.launch("two_tasks.py", "ssh:one", ["--seed", "3"], dry_run=True)
    assert launched == ("launch/two-tasks.ssh.sh", "bash launch/two-tasks.ssh.sh", None)
    assert "python two_tasks.py --seed 3" in capfd.readouterr().out
    assert not (folder / "launch").exists()
    python = str(folder / "bin" / "a python")
    (folder / "codes").write_text("3\n")
    assert mtl_jax.launch("two_tasks.py", "ssh:one", ["--seed", "3"], python=python, yes=True).code == 3
    assert arguments(folder) == [["two_tasks.py", "--seed", "3"]]
    assert mtl_jax.launch("two_tasks.py", "ssh:one").code is None  # nobody can be asked
    assert "nothing is started: give --yes" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("on", "fields", "line"),
    [
        ("slrm", {}, r"unknown --on 'slrm' \(did you mean 'slurm'\?\); choices: gcloud, slurm, skypilot, xpk, ssh"),
        ("ssh", {}, "--on ssh needs the hosts: write ssh:HOST,HOST"),
        ("ssh:", {}, "--on ssh needs the hosts"),
        ("ssh:one,one", {}, "one stands there twice"),
        ("ssh:one;reboot", {}, "a host of --on ssh is 'one;reboot'; it can have letters"),
        ("slurm:node=2", {}, r"unknown option of --on slurm: 'node' \(did you mean 'nodes'\?\)"),
        ("slurm:nodes=0", {}, "option nodes of --on slurm is '0'; it must be a whole number from 1"),
        ("slurm:account=a b", {}, "option account of --on slurm is 'a b'"),
        ("gcloud:zone=z", {}, "--on gcloud needs type: write gcloud:type=VALUE"),
        ("gcloud:v4-8", {}, "give options as gcloud:OPTION=VALUE"),
        ("xpk:cluster=a,type=b", {"folder": "there"}, "--folder 'there': --on xpk itself chooses"),
        ("ssh:one", {"restarts": -1}, "--restarts is -1; it must be at least 0"),
        ("ssh:one", {"prepare": "a\nb"}, "--prepare .* has a line break"),
        ("ssh:one", {"flags": ("--name", "a\nb")}, "flag 2 of the script .* has a line break"),
        ("ssh:one", {"ablate": "--vary 'a"}, '--ablate "--vary \'a": no closing quotation; write it as on a command line'),
        ("ssh:one", {"name": "Upper"}, "--name 'Upper': use lower-case letters"),
        ("ssh:one", {"flags": ("--sed", "3")}, "unknown flag"),
        ("ssh:one", {"flags": ("--distributed", "auto")}, "--distributed: "),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(folder, on, fields, line):
    with pytest.raises(UserError, match=line):
        mtl_jax.launch("two_tasks.py", on, **{"dry_run": True, **fields})
    assert not (folder / "launch").exists()


def test_scripts_and_files_that_are_elsewhere_and_a_tool_that_is_not_there(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"none\.py: no such script"):
        mtl_jax.launch("none.py", "ssh:one")
    (tmp_path / "other.py").write_text("")
    with pytest.raises(UserError, match=r"other\.py: not in this directory"):
        mtl_jax.launch("../other.py", "ssh:one")
    with pytest.raises(UserError, match=r"--output two_tasks\.py: this file is not one of mtl-jax launch"):
        mtl_jax.launch("two_tasks.py", "ssh:one", output="two_tasks.py")
    (folder / "bin" / "xpk").unlink()
    with pytest.raises(UserError, match=r"--on xpk: xpk is not on PATH; pip install xpk, or look at --dry-run"):
        mtl_jax.launch("two_tasks.py", "xpk:cluster=a,type=b")
    mtl_jax.launch("two_tasks.py", "xpk:cluster=a,type=b", dry_run=True)


def test_a_launcher_of_ones_own_stands_beside_ours(folder):
    with parts.forgotten():

        @mtl_jax.register_launcher("lsf")
        def lsf(job: Job, *, queue: str = "normal") -> LaunchFile:
            return LaunchFile(job.path(".lsf"), f"#BSUB -q {queue}\n{job.command}\n", ("sh", job.path(".lsf")), "sh", "")

        python = str(folder / "bin" / "a python")
        launched = mtl_jax.launch("two_tasks.py", "lsf:queue=night", ["--seed", "1"], python=python, yes=True)
        assert launched.code == 0
        assert Path(launched.file).read_text().startswith("#BSUB -q night\n")
        assert mtl_jax.launch("two_tasks.py", "lsf", ["--seed", "1"], python=python, yes=True).code == 0
        lsf_twice = LAUNCHERS["lsf"]
        mtl_jax.register_launcher("bad")(lambda job: None)
        with pytest.raises(UserError, match="must return a launching"):
            launch_file("bad", job_in(folder))
    assert "lsf" not in LAUNCHERS
    assert lsf_twice is lsf


def test_the_examples_of_the_public_names(folder):
    with parts.forgotten():
        for function in (mtl_jax.launch, mtl_jax.register_launcher):
            (test,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs={"mtl_jax": mtl_jax})
            assert not doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed


def test_the_command_passes_the_flags_after_the_dashes(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mtl-jax", "launch", "two_tasks.py", "--on", "ssh:a,b", "--dry-run", "--", "--seed", "5"])
    main.console()
    assert "exec python two_tasks.py --seed 5" in capsys.readouterr().out


def test_names_of_jobs():
    assert job.name_for("experiments/My_Run.2.py") == "my-run-2"
    assert job.name_for("7.py") == "run-7"
    job.check(Job(job.name_for("x" * 90 + ".py"), "x.py"))
    assert shlex.split(Job("a", "b c.py", ("$x",)).command) == ["python", "b c.py", "$x"]
    ablation = Job("a", "b.py", ("--seed", "1"), ablate="--vary 'seed=1, 2'").command
    assert shlex.split(ablation) == ["python", "-m", "mtl_jax", "ablate", "b.py", "--vary", "seed=1, 2", "--", "--seed", "1"]
