import csv
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import made
import pytest

import mtl_jax
from mtl_jax import reporting
from mtl_jax.cli import main
from mtl_jax.core import locks
from mtl_jax.core.errors import UserError
from mtl_jax.reporting import read, sections, statistics, tables

NASTY = {'<script>alert("x")</script>': "pearson", "a$b$ & 'c'": "accuracy", "_sms": "accuracy"}


class Page(HTMLParser):
    """Collects what a page consists of."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "path", "use", "rect", "wbr", "!doctype"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in ("path", "use", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def values(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.tags if name in attributes]


def test_the_tidy_table_holds_every_value_as_it_was(ablation):
    with (ablation / "ablation.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    weights = [f"weights.{task}" for task in made.TASKS]
    assert list(rows[0]) == ["run", "seed", "weighting", *weights, "status", "split", "task", "metric", "value"]
    for entry in made.entries():
        own = [row for row in rows if row["run"] == entry["run"]]
        assert {row["status"] for row in own} == {entry["status"]}
        assert {row["seed"] for row in own} == {str(entry["values"]["seed"])}
        told = [str(entry["values"].get("weights", {}).get(task, "")) for task in made.TASKS]
        assert [own[0][column] for column in weights] == told
        if entry["status"] != "done":
            assert [row["value"] for row in own] == [""]
            continue
        results = json.loads((ablation / "runs" / entry["run"] / "results.json").read_text())
        expected = {
            (split, task, metric): value
            for task, found in results["tasks"].items()
            for split in ("dev", "test")
            for metric, value in found[split].items()
        }
        assert {(row["split"], row["task"], row["metric"]): float(row["value"]) for row in own} == expected


def test_the_statistics(ablation):
    found = json.loads((ablation / "results.json").read_text())
    assert found["varied"] == ["weighting", "weights"]
    assert found["reference"] == "the method equal"
    assert len(found["groups"]) == 8
    best = found["groups"][0]
    assert best["values"] == {"weighting": "pcgrad"}
    assert [run["status"] for run in best["runs"]] == ["done", "running"]
    assert best["test"]["tweets"]["pearson"]["n"] == 1
    assert found["methods"][0]["method"] == "pcgrad"
    criteria = [group["criterion"]["mean"] for group in found["groups"]]
    assert criteria == sorted(criteria, reverse=True)


def test_a_field_is_told_where_the_shown_settings_share_its_value(tmp_path):
    """Only runs with the lower learning rate have come to an end; a rule's option has its name, weights are numbers."""
    found = made.entries(rates=(1e-3, 3e-3), methods=("equal", "cagrad"))
    for entry in found:
        if entry["values"]["weighting"] == "cagrad":
            entry["values"]["weighting_options"] = {"c": 0.4}
        entry["status"] = "done" if entry["values"]["optimizer.learning_rate"] == 1e-3 else "waiting"
    study = read([made.write_ablation(tmp_path, found)])
    groups = statistics.groups(study)
    best, _, methods, *_ = sections.sections(study, groups, statistics.compare(study, groups))
    table = best.parts[1]
    place = [name for name, _ in table.head].index("optimizer.learning_rate")
    assert [row[place].text for row in table.rows] == ["0.001"] * 5
    table = methods.parts[1]
    assert {row[0].text: row[-1].text for row in table.rows} == {
        "fixed": "0.4 / 0.3 / 0.3, learning_rate 0.001",
        "equal": "learning_rate 0.001",
        "cagrad": "learning_rate 0.001, c=0.4",
    }


@pytest.mark.parametrize(
    ("tweets", "dev", "bold", "note"),
    [
        # of two seeds each, with deviations of 0.0028 on dev
        (
            {"equal": 0.189, "pcgrad": -0.289},
            {"equal": 0.6, "pcgrad": 0.6},
            ["equal", "pcgrad"],
            "2 settings tie for the best: they are within",
        ),
        ({"equal": 0.189, "pcgrad": -0.289}, {"equal": 0.6, "pcgrad": 0.5}, ["equal"], "The others are more than one standard"),
        (
            {"equal": -0.3, "pcgrad": -0.289},
            {"equal": -0.301, "pcgrad": -0.3},
            ["equal", "pcgrad"],
            "2 settings tie for the best",
        ),
        (
            {"equal": -0.3, "pcgrad": -0.289},
            {"equal": -0.5, "pcgrad": -0.3},
            ["pcgrad"],
            "The others are more than one standard",
        ),
    ],
)
def test_settings_within_a_deviation_of_the_best_are_said_to_tie(tmp_path, tweets, dev, bold, note):
    """Also of negative numbers; and among the best on dev nothing is said to be better by its test metrics."""
    folders = []
    for method, seed in itertools.product(("equal", "pcgrad"), (0, 1)):
        entry = {"values": {"weighting": method, "seed": seed}, "status": "done"}
        folders.append(made.write_run(tmp_path / f"{method}{seed}", entry, {"tweets": "pearson"}))
        made.change_score(folders[-1], "tweets", tweets[method] + 0.004 * seed)
        made.change_score(folders[-1], "tweets", dev[method] + 0.004 * seed, "dev")
    study = read(folders)
    groups = statistics.groups(study)
    best, settings, *_ = sections.sections(study, groups, statistics.compare(study, groups))
    assert note in best.parts[0]
    tops = [
        {row[0].text: "top" in row[place].kind.split() for row in part.parts[1].rows}
        for part in (best, settings)
        for place in (1, 2)
    ]
    assert [sorted(name for name, top in column.items() if top) for column in tops[:3]] == [bold, [], bold]
    highest = max(tweets, key=tweets.get)
    assert [name for name, top in tops[3].items() if top] == [highest]  # on test they lie far from each other
    found = tables.to_json(study, groups, None)
    assert sorted(group["values"]["weighting"] for group in found["groups"] if group["ties_with_the_best"]) == bold


def test_of_one_seed_only_equal_numbers_tie(tmp_path):
    folders = []
    for method, dev in (("equal", 0.6), ("pcgrad", 0.6), ("cagrad", 0.5999)):
        folders.append(made.write_run(tmp_path / method, {"values": {"weighting": method}, "status": "done"}, {"a": "f1"}))
        made.change_score(folders[-1], "a", dev, "dev")
    study = read(folders)
    best, *_ = sections.sections(study, statistics.groups(study), None)
    assert best.parts[0].endswith("One seed has no deviation, so only equal numbers tie: 2 settings tie for the best.")
    assert [row[1].kind for row in best.parts[1].rows] == ["n top", "n top", "n"]


def test_a_report_from_python(ablation, tmp_path):
    """Paths may be texts, as for mtl_jax.train; to import mtl_jax does not take the time to import matplotlib."""
    found = mtl_jax.report(str(ablation / "runs" / "0000"), output=str(tmp_path / "one"))
    assert found == tmp_path / "one" / "report.html"
    mtl_jax.report(str(ablation / "runs" / "0000"), ablation / "runs" / "0002", output=str(tmp_path / "two"))
    assert (tmp_path / "two" / "ablation.csv").exists()
    code = "import sys, mtl_jax; mtl_jax.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_needs_nothing_else(ablation):
    text = (ablation / "report.html").read_text()
    page = Page(text)
    assert page.values("src") == []
    assert all(address.startswith("#") for address in page.values("href"))
    assert "http" not in text.replace("http-equiv", "")
    assert not re.search(r"@import|url\((?!#)", text)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    anchors = {address[1:] for address in page.values("href")} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert anchors <= set(ids)


def test_every_figure_is_there_with_text_as_text_and_as_png(ablation):
    text = (ablation / "report.html").read_text()
    sections = re.findall(r'<section id="([^"]*)"', text)
    assert sections == [
        *(
            "best",
            "settings",
            "methods",
            "against-weights",
            "pareto",
            "simplex",
            "learning",
            "loss",
            "weights",
            "cosines",
            "tried",
        ),
    ]
    drawn = {path.stem for path in (ablation / "figures").glob("*.png")}
    assert drawn == set(sections) - {"best", "settings", "tried"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (ablation / "figures").glob("*.png"))
    svgs = re.findall(r"<svg role.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 1 + 3 + 3 + 4 + 3 + 3 + 1 + 2  # in the order of the sections; of Pareto fronts, all three pairs
    assert all(
        "<text" in svg and "#0" not in svg.replace('="#', "") for svg in svgs if "viridis" not in svg and "simplex" not in svg
    )


def test_what_was_tried_and_how_long_it_took(ablation):
    texts = [text.strip() for text in Page((ablation / "report.html").read_text()).texts if text.strip()]
    facts = dict(reversed(list(itertools.pairwise(texts))))  # what stands first on the page
    assert [facts[what] for what in ("runs", "done", "diverged", "unfinished")] == ["16", "14", "1", "1"]
    assert facts["time"] == "4 min 25 s"  # 240.1 + 2 * 12.3
    assert "diverged at step 37: the loss of task 'tweets' is nan" in texts


def test_the_same_runs_give_the_same_bytes(ablation, tmp_path):
    reporting.write(ablation, tmp_path)
    files = ["report.html", "ablation.csv", "results.json", *(f"figures/{p.name}" for p in (ablation / "figures").iterdir())]
    assert len(files) == 11
    for name in files:
        assert (tmp_path / name).read_bytes() == (ablation / name).read_bytes(), name


def test_names_are_text_whatever_they_hold(tmp_path):
    tasks = tuple(NASTY)
    entries = made.entries(points=((1, 0, 0), (0, 1, 0), (0, 0, 1)), seeds=(0, 1), tasks=tasks, methods=("equal",))
    entries[1]["status"] = "diverged at step 37: </td><img src=x onerror=alert(1)>"
    made.write_ablation(tmp_path, entries, NASTY, name="</title><script>alert(2)</script>")
    page = Page(reporting.write(tmp_path, tmp_path).read_text())
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in [tag for tag, _ in page.tags]
    for name in tasks:
        assert any(name in text for text in page.texts)


def test_one_run_is_shown_by_itself(tmp_path):
    folder = made.write_run(tmp_path / "one", {"values": {"weighting": "equal"}, "status": "done"})
    text = reporting.write(folder, tmp_path / "report").read_text()
    assert re.findall(r'<section id="([^"]*)"', text) == ["result", "learning", "loss", "tried"]
    assert "majority / mean" in text
    assert (
        (tmp_path / "report" / "ablation.csv")
        .read_text()
        .startswith("run,seed,status,split,task,metric,value\none,0,done,dev,")
    )


def test_nothing_is_finished_yet(tmp_path):
    """The tasks are then read from the configuration; as the engine writes it, before the first run ends."""
    entries = [entry | {"status": "waiting"} for entry in made.entries()]
    made.write_ablation(tmp_path, entries)
    text = reporting.write(tmp_path, tmp_path).read_text()
    assert re.findall(r'<section id="([^"]*)"', text) == ["settings", "tried"]


def test_a_workdir_is_not_overwritten(tmp_path):
    folder = made.write_run(tmp_path / "one", {"values": {"weighting": "equal"}, "status": "done"})
    with pytest.raises(
        UserError, match=r"one: the workdir of a run, whose results.json would be lost; choose another --output"
    ):
        reporting.write(folder, folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written"):
        reporting.write(folder, tmp_path / "file")


def test_the_command(tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        made.write_run(tmp_path / f"run{seed}", {"values": {"weighting": "equal", "seed": seed}, "status": "done"})
    (tmp_path / "run.log").write_text("")
    monkeypatch.chdir(tmp_path)
    main.report(("run*",))
    assert capsys.readouterr().out == "the report is report/report.html\n"
    assert "Mean and standard deviation over 2 seeds" in (tmp_path / "report" / "report.html").read_text()
    main.report(("run0",), output="alone")
    assert (tmp_path / "alone" / "report.html").exists()
    with pytest.raises(UserError, match=r"no\*: no workdir of a run matches"):
        main.report(("no*",))
    ablation = made.write_ablation(tmp_path / "ablation")
    assert reporting.default_output([ablation]) == ablation
    assert reporting.default_output([Path("run0")]) == Path("report")


def test_two_processes_do_not_write_one_report(tmp_path):
    made.write_ablation(tmp_path, [entry | {"status": "waiting"} for entry in made.entries()])
    with (
        locks.report(tmp_path),
        pytest.raises(UserError, match=r"process .* has been writing it since .*choose another --output"),
    ):
        reporting.write(tmp_path, tmp_path)
    assert not (tmp_path / "report.html").exists()
    with locks.workdir(tmp_path):  # the ablation itself may be under way
        assert reporting.write(tmp_path, tmp_path).exists()
