"""The files of a workdir, damaged in many ways: one line that says which, or all goes well; never anything else."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from mtl_jax import Regression, reporting
from mtl_jax.ablation import ablation_dir as folders
from mtl_jax.core import files
from mtl_jax.core.errors import UserError
from mtl_jax.inference.predict import predict
from mtl_jax.training import results, results_table
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.experiment_json import from_json, to_json, with_defaults
from mtl_jax.training.metrics_log import Logger, read_metrics
from mtl_jax.training.restore import open_run


def edited(content: bytes, **changes: object) -> bytes:
    return json.dumps({**json.loads(content), **changes}).encode()


def flipped(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 0xFF]) + content[len(content) // 2 + 1 :]


# What may have become of any file.
DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "flipped": flipped,
    "{}": lambda content: b"{}",
    "[]": lambda content: b"[]",
    "null": lambda content: b"null",
    "text": lambda content: b'"x"',
    "number": lambda content: b"17",
    "deep": lambda content: b"[" * 100_000,
    "wrong values": lambda content: json.dumps(wrong(json.loads(content))).encode(),
    "lists for objects": lambda content: json.dumps({name: [] for name in json.loads(content)}).encode(),
    "nulls": lambda content: json.dumps(dict.fromkeys(json.loads(content))).encode(),
    "texts": lambda content: json.dumps(dict.fromkeys(json.loads(content), "x")).encode(),
}


def wrong(value: object) -> object:
    """The same with a number for each text, and a text for each number, at the ends of all branches."""
    if isinstance(value, dict):
        return {name: wrong(each) for name, each in value.items()}
    if isinstance(value, list):
        return [wrong(each) for each in value]
    return 3 if isinstance(value, str) else "x"


def goes_well(action) -> bool:
    """Whether it does; if not, one line of moderate length says why. Whatever else is raised fails the test."""
    try:
        action()
    except UserError as error:
        line = str(error)
    else:
        return True
    assert "\n" not in line
    assert len(line) < 700, line
    return False


@pytest.fixture
def copy(workdir, tmp_path) -> Path:
    shutil.copytree(workdir, tmp_path / "run")
    return tmp_path / "run"


def of_training(folder: Path, bert: Path, data: Path):
    """What a training looks at before it prepares anything, and when it ends."""
    experiment = tiny.experiment(bert, data)
    config = to_json(dataclasses.replace(experiment, phases=experiment.phases[1:]))
    workdirs.config_changed(folder, config, True, with_defaults)
    workdirs.read_json(folder / "data.json")
    workdirs.read_json(folder / "baselines.json")
    if (folder / "results.json").exists():
        results_table.table([results.read(folder)])


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_file_is_one_line_wherever_it_is_read(copy, bert, data, damage):
    """Training, the table, the report and predictions; the line names the file."""
    for name in ("config.json", "data.json", "results.json", "baselines.json"):
        file, before = copy / name, (copy / name).read_bytes()
        file.write_bytes(DAMAGES[damage](before))
        well = [goes_well(lambda: of_training(copy, bert, data)), goes_well(lambda: reporting.read([copy]))]
        if name in ("config.json", "data.json"):
            well.append(goes_well(lambda: open_run(copy)))
        assert all(well) == ((name, damage) == ("baselines.json", "{}")), name  # a table without rows
        if not all(well):
            with pytest.raises(UserError, match=f"{name}: not what mtl_jax wrote"):
                open_run(copy) if name in ("config.json", "data.json") else workdirs.read_json(file)
        file.write_bytes(before)
    assert goes_well(lambda: of_training(copy, bert, data))
    assert goes_well(lambda: reporting.read([copy]))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda value: value["trunk"].update(kind="Other"), "config.json: not what mtl_jax wrote"),
        ("config.json", lambda value: value["trunk"].update(kind=[]), "config.json: not what mtl_jax wrote"),
        ("config.json", lambda value: value.update(extra=1), r"not what mtl_jax wrote \(extra fields found \(extra"),
        ("config.json", lambda value: value["optimizer"].update(eps="high"), "expected float at optimizer.eps"),
        ("config.json", lambda value: value["batch"].update(row_length=-3), "batch.row_length is -3"),
        ("config.json", lambda value: value["tasks"].pop(), "data.json: not what mtl_jax wrote .its tasks are not those of"),
        ("data.json", lambda value: value["tasks"]["coarse"].update(labels=["HUM"]), "do not fit together .heads/coarse"),
        ("data.json", lambda value: value["tasks"]["coarse"].update(kind="Other"), "data.json: not what mtl_jax wrote"),
        ("trunk/config.json", lambda value: value.update(hidden_size=32), r"do not fit together \(heads/"),
        ("trunk/config.json", lambda value: value.update(num_hidden_layers=2), r"do not fit together \(trunk/layer_1/"),
        ("trunk/config.json", lambda value: value.update(vocab_size=7), r"do not fit together \(trunk/embeddings/"),
    ],
)
def test_a_changed_value_is_found_before_a_prediction(copy, name, change, message):
    value = json.loads((copy / name).read_text())
    change(value)
    (copy / name).write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        predict(copy, "coarse", ["who is good"])


def test_a_trunk_from_scratch_has_sizes_of_the_right_kind(tmp_path):
    from mtl_jax import trunks
    from mtl_jax.trunks import Embedding

    trunk = trunks.build(Embedding(dimension=4), ["good film", "bad film"], np.float32)
    trunks.save(trunk, tmp_path)
    trunks.reopen(Embedding(dimension=4), tmp_path, np.float32)
    for wrong_sizes in ({}, {"vocab_size": "many", "dimension": 4}, {"vocab_size": None, "dimension": 4}, {"other": 1}):
        (tmp_path / "trunk.json").write_text(json.dumps(wrong_sizes))
        with pytest.raises(UserError, match=r"trunk\.json: not what mtl_jax wrote"):
            trunks.reopen(Embedding(dimension=4), tmp_path, np.float32)


ABLATION = {
    "name": "a",
    "command": "",
    "axes": [{"fields": ["seed"], "values": [[0]]}],
    "runs": [{"run": "0000", "values": {"seed": 0, "weighting": "equal"}, "program": 0, "status": "done"}],
    "programs": [{"program": 0}],
    "devices": "",
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_record_of_an_ablation_or_a_merge_is_one_line(copy, tmp_path, damage):
    folder = tmp_path / "ablation"
    (folder / "runs").mkdir(parents=True)
    (copy).rename(folder / "runs" / "0000")
    (folder / "ablation.json").write_text(json.dumps(ABLATION))
    assert goes_well(lambda: (folders.read(folder), reporting.read([folder])))
    (folder / "ablation.json").write_bytes(DAMAGES[damage](json.dumps(ABLATION).encode()))
    with pytest.raises(UserError, match=r"ablation\.json: not what mtl_jax wrote"):
        folders.read(folder)
    assert not goes_well(lambda: reporting.read([folder]))
    (folder / "merge.json").write_bytes(DAMAGES[damage](b'{"written": ["merge.json"]}'))
    if damage not in ("{}", "lists for objects"):  # which a record may be
        with pytest.raises(UserError, match=r"merge\.json: not what mtl_jax wrote"):
            workdirs.read_json(folder / "merge.json")


RECORDS = [{"kind": "train", "step": step, "loss/a": 0.5, "cosines": [[1.0]]} for step in range(1, 7)]
LINES = [json.dumps(record).encode() for record in RECORDS]


@pytest.mark.parametrize(
    "line",
    [b"", b"null", b"[]", b"3", b'"x"', b"{}", LINES[2][:20], b"\xff" + LINES[2][1:], b"[" * 100_000, b'{"kind": "train"}']
    + [edited(LINES[2], step=value) for value in ("3", -1, 10**30)]
    + [edited(LINES[2], **{"loss/a": value}) for value in ("low", {})]
    + [edited(LINES[2], cosines=value) for value in (1, [[{}]], {"a": 1})],
)
def test_a_damaged_log_is_reported_and_holds_nothing_up(tmp_path, caplog, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*LINES[:2], line, *LINES[3:], LINES[0][:10]]))  # the last one was not written to its end
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 4, 5, 6]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 1 line not what mtl_jax wrote, from line 3 on; left out"
    ]
    logger = Logger(tmp_path, 5)
    logger.write("train", 6, {"loss/a": math.nan, "perplexity/a": math.inf, "least": -math.inf, "cosines": [[math.nan]]})
    logger.close()
    assert caplog.records[-1].getMessage() == f"{path}: 1 of the 5 steps so far are not in it: curves are short, nothing else"
    lines = path.read_text().splitlines()
    assert json.loads(lines[-1], parse_constant=pytest.fail)["loss/a"] is None
    last = read_metrics(tmp_path)[-1]
    assert math.isnan(last["loss/a"])
    assert (last["perplexity/a"], last["least"]) == (math.inf, -math.inf)
    assert len(lines) == 5


def test_an_empty_or_missing_log_of_a_run_that_resumes_is_told(tmp_path, caplog):
    Logger(tmp_path, 0).close()
    assert not caplog.records
    Logger(tmp_path, 4).close()
    assert "4 of the 4 steps so far are not in it" in caplog.text


def test_an_unbounded_regression_is_strict_json_and_old_workdirs_open(bert, data, tmp_path):
    task = Regression(name="rating", source="ratings", column="rating")
    experiment = tiny.experiment(bert, data, tasks=(task,))
    config = to_json(experiment)
    workdirs.write_json(tmp_path / "config.json", config)
    text = (tmp_path / "config.json").read_text()
    assert from_json(json.loads(text, parse_constant=pytest.fail)) == experiment
    assert '"minimum": "-inf"' in text
    earlier = text.replace('"-inf"', "-Infinity").replace('"inf"', "Infinity")
    (tmp_path / "config.json").write_text(earlier)
    assert from_json(workdirs.read_json(tmp_path / "config.json")) == experiment
    assert not workdirs.config_changed(tmp_path, config, False, with_defaults)
    tasks = {"rating": {"name": "rating", "minimum": -math.inf}}
    (tmp_path / "data.json").write_text(json.dumps({"sources": {}, "tasks": tasks}))
    workdirs.check_data(
        tmp_path, {"sources": {}, "tasks": {"rating": {"name": "rating", "minimum": "-inf"}}}, lambda values: values
    )


def test_a_report_of_runs_with_infinities_in_their_files(copy, tmp_path):
    """As earlier versions wrote them, beside a run that differs in another field."""
    shutil.copytree(copy, tmp_path / "other")
    for number, folder in enumerate((copy, tmp_path / "other")):
        config = json.loads((folder / "config.json").read_text())
        config["tasks"][0]["minimum"], config["seed"], config["batch"]["rows"] = -math.inf, number, 8 + number
        (folder / "config.json").write_text(json.dumps(config))
        found = json.loads((folder / "results.json").read_text())
        found["tasks"]["rating"]["test"]["pearson"] = math.nan
        (folder / "results.json").write_text(json.dumps(found))
    page = reporting.write([copy, tmp_path / "other"], tmp_path / "report")
    assert page.exists()
    json.loads((tmp_path / "report" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results.read(copy)["tasks"]["rating"]["test"]["pearson"] is None


def test_json_of_ours_is_what_any_reader_takes():
    value = {"a": [math.nan, math.inf, -math.inf, (1.5, {"b": math.nan})], "c": "inf", "d": True, "e": None, "f": 3}
    strict = json.loads(files.to_json(value), parse_constant=pytest.fail)
    assert strict == {"a": [None, "inf", "-inf", [1.5, {"b": None}]], "c": "inf", "d": True, "e": None, "f": 3}
    assert files.parse_json(json.dumps(value)) == strict
    assert [files.number_of(one) for one in ("inf", "-inf", 2)] == [math.inf, -math.inf, 2]
