"""The commands mtl-jax ablate and mtl-jax take: train many runs in one program; copy one of them to its own workdir."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import tyro

from mtl_jax.cli import scripts
from mtl_jax.core import name_options
from mtl_jax.core.errors import UserError

if TYPE_CHECKING:
    from mtl_jax.ablation.plan import Program


def ablate(
    script: Annotated[str, tyro.conf.Positional],
    /,
    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    methods: str = "",
    seeds: int = 1,
    samples: str = "",
    workdir: str = "",
    own_order: bool = False,
    at_once: int = 0,
    memory: float = 0.0,
    dry_run: bool = False,
) -> None:
    """Trains every combination of the varied fields of an experiment, in as few compiled programs as possible.

    Runs that differ only in numbers (weights, rates, decay, regularisers, options of a rule, seeds) share one program and are
    trained at once, on one pass over the data; every other varied field needs a program for each of its values. The same
    command, started again, resumes. Several hosts share the runs: start the same command with the same --workdir on each, and
    with --distributed among the script's flags.

    Args:
        script: A script that calls mtl_jax.main; its own flags come after --.
        vary: FIELD=VALUES, may be repeated: every combination is trained. FIELD is a flag without its dashes, such
            as optimizer.learning-rate, weights, weights.TASK, phases.0.steps. VALUES are 1e-5,3e-5, grid:LOW:HIGH:N,
            loggrid:LOW:HIGH:N, uniform:LOW:HIGH, loguniform:LOW:HIGH; for weights simplex:N, simplex:lattice:M, or A/B/C,A/B/C.
        methods: Weighting rules, such as equal,pcgrad,cagrad:c=0.4. Varied weights belong to fixed, which is added if needed.
        seeds: Number of seeds, from the experiment's seed on.
        samples: How all ranges are sampled together: sobol:N or random:N.
        workdir: The directory to write. Default: runs/NAME_ablation.
        own_order: Each seed has its own order of the data; else all runs see the same batches.
        at_once: Most runs in one program; 0: as many as fit into memory, which is measured.
        memory: GB of a device that may be used; 0: its free memory.
        dry_run: Compile, print the numbers of programs, runs, chunks, bytes and steps, and write nothing.
    """
    from mtl_jax.ablation import ablate as module

    called = scripts.read_call(script, "ablate")
    experiment = called.experiment
    rules = method_list(methods)
    if dry_run:
        planned = module.plan(experiment, vary, rules, seeds, samples, own_order)
        print(plan_table(planned, at_once, memory))
        return
    folder = workdir or f"runs/{experiment.name}_ablation"
    module.ablate(
        experiment,
        folder,
        vary,
        methods=rules,
        seeds=seeds,
        samples=samples,
        own_order=own_order,
        at_once=at_once,
        memory=memory,
        command=shlex.join(["mtl-jax", *sys.argv[1:]]),
        share=process_of(called.distributed),
    )
    print(f"everything is in {folder}")


def take(
    ablation: Annotated[str, tyro.conf.Positional],
    run: Annotated[str, tyro.conf.Positional],
    target: Annotated[str, tyro.conf.Positional],
    /,
) -> None:
    """Copies one run of an ablation to an ordinary workdir with checkpoints, to predict, evaluate, convert, merge or resume.

    Args:
        ablation: The ablation's workdir.
        run: The run's number, such as 0007.
        target: The directory to write.
    """
    from mtl_jax.ablation.extract import take as take_out

    take_out(ablation, run, target)
    print(f"everything is in {target}")


def process_of(distributed: str) -> tuple[int, int]:
    """The number of this process and how many there are, from a script's --distributed; nothing is connected.

    Raises:
        UserError: It is neither auto nor HOST:PORT,INDEX,COUNT, or no cluster is found.
    """
    from mtl_jax.training import mesh

    return mesh.process_of(distributed) if distributed else (0, 1)


def method_list(text: str) -> list[str]:
    """The rules of a list, each with its options: "equal,cagrad:c=0.4,db_mtl:a=1,b=2" has three.

    Raises:
        UserError: An option does not follow a method that has options.
    """
    methods: list[str] = []
    for part in filter(None, name_options.split(text, ",")):
        if not name_options.is_option(part):
            methods.append(part)
        elif methods and ":" in methods[-1]:
            methods[-1] += f",{part}"
        else:
            raise UserError(f"--methods {text}: {part!r} is an option without a method; write NAME:OPTION=VALUE")
    return methods


def plan_table(planned: list[Program], at_once: int, memory: float) -> str:
    """A table of the runs, steps and memory of an ablation's programs, which are compiled for it.

    Args:
        planned: The programs.
        at_once: As for ablate.
        memory: As for ablate, in GB.
    """
    import tabulate

    from mtl_jax.ablation.ablate import describe, steps_of
    from mtl_jax.ablation.prepare_program import make_ready
    from mtl_jax.ablation.remarks import weights_do_nothing

    rows, remarks, joint_steps, single_steps = [], [], 0, 0
    for program in planned:
        ready = make_ready(program, at_once, memory)
        values = ", ".join(f"{name} {value}" for name, value in describe(program)["fixed"].items())
        steps, machine = steps_of(program), ready.machine
        facts = [len(program.runs), machine.size, len(ready.chunks), steps, machine.weight / 1e9, machine.compile_seconds]
        rows.append([program.number, values, *facts])
        remark = weights_do_nothing(program, ready.prepared.plans)
        remarks += [f"program {program.number}: {remark}"] if remark else []
        joint_steps += len(ready.chunks) * steps
        single_steps += len(program.runs) * steps
    headers = ["program", "of", "runs", "at once", "chunks", "steps", "GB on a device", "compiling, s"]
    table = tabulate.tabulate(rows, headers=headers, tablefmt="github", floatfmt=".2f")
    runs = sum(len(program.runs) for program in planned)
    total = (
        f"programs: {len(planned)}, runs: {runs}, steps: {joint_steps:,} of many at once, in place of {single_steps:,} of one"
    )
    return "\n".join([table, total, *remarks])
