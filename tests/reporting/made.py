"""An ablation made by hand: the files that the engine writes, with numbers that follow from the settings."""

import json
import math
from pathlib import Path

TASKS = {"tweets": "pearson", "movies": "accuracy", "sms": "accuracy"}
POINTS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0), (0.2, 0.2, 0.6), (0.4, 0.3, 0.3))
SEEDS = (0, 1)
STEPS, EVERY = 40, 10


def entries(points=POINTS, seeds=SEEDS, tasks=tuple(TASKS), rates=(1e-3,), methods=("equal", "pcgrad")):
    """The runs of ablation.json: weights on the simplex, then methods, each with every seed; one diverges, one still runs."""
    settings = [{"weighting": "fixed", "weights": dict(zip(tasks, point, strict=True))} for point in points]
    settings += [{"weighting": method} for method in methods]
    settings = [{"optimizer.learning_rate": rate, **setting} for rate in rates for setting in settings]
    found = [
        {
            "run": f"{number:04d}",
            "values": {**values, "seed": seed},
            "program": int(values["weighting"] != "fixed"),
            "status": "done",
        }
        for number, (values, seed) in enumerate((values, seed) for values in settings for seed in seeds)
    ]
    found[1]["status"] = f"diverged at step 37: the loss of task {tasks[0]!r} is nan"
    found[-1]["status"] = "running"
    return found


def score(entry, task, split="test"):
    """The metric that run has: more weight is better, up to a point; methods are a little better; seeds differ."""
    values = entry["values"]
    weights = values.get("weights", {})
    share = weights.get(task, 1 / 3)
    start = 0.55 + 0.1 * list(weights or TASKS).index(task) if task in (weights or TASKS) else 0.6
    bonus = 0.02 * (values["weighting"] == "pcgrad") + 0.2 * math.sqrt(share)
    return round(start + bonus + 0.004 * values.get("seed", 0) - 0.01 * (split == "dev"), 6)


def write_ablation(folder: Path, found=None, tasks=TASKS, steps=STEPS, name="made by hand") -> Path:
    """Writes ablation.json and the workdirs of its runs."""
    found = entries() if found is None else found
    index = {
        "name": name,
        "command": "mtl-jax ablate experiments/made.py --vary weights=simplex:6 --methods equal,pcgrad --seeds 2",
        "axes": [{"fields": ["weights"], "values": [list(point) for point in POINTS]}],
        "runs": found,
        "programs": [
            {
                "program": number,
                "fixed": {"weighting": method},
                "runs": sum(entry["program"] == number for entry in found),
                "chunks": 1,
                "steps": steps,
                "compile_seconds": 12.3,
                **({"seconds": 240.1} if number == 0 else {}),  # the other is not done
            }
            for number, method in enumerate(("fixed", "equal, pcgrad"))
        ],
        "devices": "1 x cpu, 2 CPU cores",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ablation.json").write_text(json.dumps(index))
    for entry in found:
        if entry["status"] != "waiting":
            write_run(folder / "runs" / entry["run"], entry, tasks, steps)
    return folder


def write_run(folder: Path, entry, tasks=TASKS, steps=STEPS, **changes) -> Path:
    """Writes an ordinary workdir; results.json only of a run that is done."""
    folder.mkdir(parents=True, exist_ok=True)
    values = entry["values"]
    config = {
        "name": "made",
        "tasks": [{"name": task, "metric": metric} for task, metric in tasks.items()],
        "phases": [{"name": "heads", "steps": steps // 4}, {"name": "everything", "steps": steps - steps // 4}],
        "weighting": values["weighting"],
        "weights": values.get("weights", {}),
        "optimizer": {"learning_rate": values.get("optimizer.learning_rate", 1e-3)},
        "evaluation": {"criterion": "mean"},
        "seed": values.get("seed", 0),
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in _records(entry, tasks, steps)))
    if entry["status"] == "done":
        (folder / "results.json").write_text(json.dumps(_results(entry, tasks, steps)))
    return folder


def _records(entry, tasks, steps):
    for step in range(1, steps + 1):
        if entry["status"].startswith("diverged") and step > 37 * steps // 40:
            return
        record = {"kind": "train", "step": step, "phase": int(step > steps // 4)}
        for number, task in enumerate(tasks):
            done = step / steps
            record[f"loss/{task}"] = (
                2 * math.exp(-3 * done) + 0.1 * number + 0.05 * math.sin(7 * step + entry["values"].get("seed", 0))
            )
            record[f"weight/{task}"] = entry["values"].get("weights", {}).get(task, 1.0)
            if entry["values"]["weighting"] == "pcgrad":
                record[f"weight/{task}"] = 1 + 0.4 * math.sin(number + 5 * done)
        if entry["values"]["weighting"] == "pcgrad":
            record |= {"cosine_mean": 0.4 - 0.3 * done + 0.05 * math.sin(3 * step), "conflicts": 0.1 + 0.3 * done}
        yield record
        if step % EVERY == 0:
            dev = {
                f"{task}/{metric}": score(entry, task, "dev") * (1 - math.exp(-5 * step / steps))
                for task, metric in tasks.items()
            }
            yield {"kind": "dev", "step": step, **dev, "phase": record["phase"]}


def _results(entry, tasks, steps):
    return {
        "experiment": "made",
        "seed": entry["values"].get("seed", 0),
        "weighting": entry["values"]["weighting"],
        "steps": steps,
        "best_step": steps,
        "best_criterion": 0.7,
        "seconds": 20.5,
        "tasks": {
            task: {
                "metric": metric,
                "dev": {"loss": 0.4, metric: score(entry, task, "dev")},
                "test": {"loss": 0.5, metric: score(entry, task)},
                "baselines": {"constant": {metric: 0.5}, "probe": {metric: 0.6}},
            }
            for task, metric in tasks.items()
        },
        "versions": {"python": "3.11", "jax": "0.10.2", "devices": "1 x cpu, 2 CPU cores"},
    }


def change_score(folder: Path, task: str, value: float, split: str = "test") -> None:
    """Writes another metric into a run's results."""
    results = json.loads((folder / "results.json").read_text())
    results["tasks"][task][split][results["tasks"][task]["metric"]] = value
    (folder / "results.json").write_text(json.dumps(results))
