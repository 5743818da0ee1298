"""The doors for parts of one's own: what is refused, and that nothing is imported because a file asks for it."""

import dataclasses
import hashlib
import json
import sys
import textwrap

import own_parts
import processes
import pytest
import tiny

from mtl_jax import Classification, UserError, train, weighting
from mtl_jax.cli import scripts
from mtl_jax.core import parts
from mtl_jax.inference import predict
from mtl_jax.tasks import Task
from mtl_jax.training.experiment_json import check_functions, check_metrics, from_json, to_json
from mtl_jax.transfer import Regulariser

IMPORTS = """
    import dataclasses
    from mtl_jax import weighting
    from mtl_jax.tasks import Classification, Task
    from mtl_jax.transfer import Regulariser
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a file of a user's and imports it as --import does; afterwards its parts are forgotten."""
    modules, path = set(sys.modules), list(sys.path)

    def write(text, name="mine.py"):
        file = tmp_path / name
        file.write_text(textwrap.dedent(IMPORTS) + textwrap.dedent(text), encoding="utf-8")
        scripts.import_parts([str(file)])
        return file

    with parts.forgotten():
        yield write
    for name in {name for name in set(sys.modules) - modules if name.partition(".")[0] != "mtl_jax"}:
        del sys.modules[name]
    sys.path[:] = path


def line_of(own, text, **files):
    with pytest.raises(UserError) as caught:
        own(text, **files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_parts_of_the_package_stay_where_those_of_a_user_are_forgotten(own):
    """The package's own are registered when their module is imported, which happens once."""
    with parts.forgotten():
        own("@weighting.register('mine_for_a_while')\ndef mine(): return weighting.make('equal')\n", "while.py")
        assert "mine_for_a_while" in weighting.RULES

        @weighting.register("of_the_package")
        def imported():
            return weighting.make("equal")

        imported.__module__ = "mtl_jax.later"
        parts._ORIGINS.pop(imported)
    assert "mine_for_a_while" not in weighting.RULES
    assert "of_the_package" in weighting.RULES
    del weighting.RULES._functions["of_the_package"]


def test_a_class_without_what_its_door_needs(own):
    own("""
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Half(Task):
            outputs = 1
            def parse(self, row): return 0
    """)
    with pytest.raises(UserError, match="class Half lacks loss, metrics, which every task needs"):
        parts._KINDS[Task]["Half"](name="a", source="b")
    assert "Half" not in parts.kinds(Task)


def test_a_class_that_is_no_dataclass(own):
    own("""
        class Plain(Classification):
            grades: int = 3
    """)
    with pytest.raises(UserError, match="class Plain is not a dataclass: put @"):
        parts.kinds(Task)["Plain"](name="a", source="b")


def test_a_regulariser_needs_one_of_its_two_methods(own, bert, data, tmp_path):
    own("""
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Empty(Regulariser):
            name: str = "empty"
    """)
    experiment = tiny.experiment(bert, data, regularisers=(parts.kinds(Regulariser)["Empty"](),))
    with pytest.raises(UserError, match=r"class Empty has neither penalty\(\) nor output_loss\(\)"):
        train(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Regression(Classification): pass", "the name 'Regression' is taken by mtl_jax's own task"),
        ("@weighting.register('cagrad')\ndef rule(): pass", "the name 'cagrad' is taken by mtl_jax's own weighting rule"),
        ("@weighting.register('a b')\ndef rule(): pass", "weighting rule 'a b': use letters, digits and '_'"),
        ("class Odd(Classification):\n    x: Unknown = 3", "class Odd: the type of x, 'Unknown', is unknown"),
    ],
)
def test_names_that_are_refused(own, text, message):
    text = ("from __future__ import annotations\n" if "Unknown" in text else "") + text
    with pytest.raises(UserError, match=message):
        own(text) if "__future__" not in text else exec(compile(text, "mine.py", "exec"), {"Classification": Classification})


def test_another_file_may_not_take_a_name_and_the_same_file_may(own):
    text = "@dataclasses.dataclass(frozen=True)\nclass Mine(Classification):\n    grades: int = 3\n"
    own(text)
    first = parts.kinds(Task)["Mine"]
    own(text)
    assert parts.kinds(Task)["Mine"] is not first
    assert "taken by the task of" in line_of(own, text, name="other.py")


def test_a_rule_that_is_none(own):
    own("@weighting.register('nothing')\ndef nothing(): return 3")
    with pytest.raises(UserError, match=r"weighting 'nothing' returned a int; its function must return a weighting\.Rule"):
        weighting.make("nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1 / 0",
            r"--import .*mine\.py: ZeroDivisionError: division by zero \(.*mine\.py:6\); it was imported because of --import",
        ),
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("def (", r"SyntaxError: invalid syntax \(.*mine\.py:6\); it was"),
        ("import sys\nsys.exit(3)", r"SystemExit: 3 \(.*mine\.py:7\); it was imported because of --import"),
    ],
)
def test_a_file_that_fails_to_import(own, text, message):
    with pytest.raises(UserError, match=message):
        own(text)


def test_files_that_are_not_there():
    for name, message in (
        ("no.py", "no such file"),
        ("a/b", "a Python file, or a module"),
        ("no_module", "No module named 'no_module'; it"),
    ):
        with pytest.raises(UserError, match=f"--import {name}: .*{message}"):
            scripts.import_parts([name])
    with pytest.raises(UserError, match="--import needs a Python file"):
        scripts.divided_imports(["predict", "--import"])


def test_a_script_that_is_imported_does_not_train(own):
    file = own("import mtl_jax\nAFTER = False\nfrom tiny import experiment\nmtl_jax.main(experiment('a', 'b'))\nAFTER = True")
    (module,) = [module for module in list(sys.modules.values()) if getattr(module, "__file__", None) == str(file)]
    assert not module.AFTER


@pytest.mark.parametrize("name", ["evil.py", "evil"])
def test_nothing_is_imported_because_a_workdir_asks_for_it(workdir, tmp_path, monkeypatch, name):
    """A config.json may name any file and module: the line names it, and it does not run."""
    hostile = tmp_path / "run"
    hostile.mkdir()
    for path in workdir.iterdir():
        (hostile / path.name).symlink_to(path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = json.loads((workdir / "config.json").read_text())
    config["tasks"][0]["kind"] = "Evil"
    config["parts"] = {"Evil": {"door": "task", "file": name, "sha256": "0" * 64}}
    (hostile / "config.json").unlink()
    (hostile / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"the task Evil is a class of {name}, which is not imported"):
        predict.predict(hostile, "coarse", ["a film"])
    config["parts"] = {"Evil": ["anything"]}
    (hostile / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="not what mtl_jax wrote"):
        predict.predict(hostile, "coarse", ["a film"])
    assert not (tmp_path / "ran").exists()


def test_functions_that_a_run_needs_again(tmp_path):
    """To measure with its own metric, or to prepare it anew: the file is named before any work."""
    names = {"mine": "metric", "format mine": "format", "cagrad@0123": "weighting rule", "cagrad": "weighting rule"}
    record = {name: {"door": door, "file": "mine.py", "sha256": "0" * 64} for name, door in names.items()}
    (tmp_path / "config.json").write_text(json.dumps({"parts": record}))
    with pytest.raises(UserError, match=r"unknown metric 'mine': it is a function of mine\.py; add --import mine\.py"):
        check_metrics(tmp_path, [Classification(name="a", source="b", metric="mine")])
    check_metrics(tmp_path, [Classification(name="a", source="b", more_metrics=("macro_f1",))])
    with pytest.raises(UserError, match=r"unknown metric 'mine': it is defined in mine\.py; add --import mine\.py"):
        check_functions(tmp_path)
    del record["mine"]
    (tmp_path / "config.json").write_text(json.dumps({"parts": record}))
    with pytest.raises(UserError, match="unknown format 'mine'"):
        check_functions(tmp_path)
    del record["format mine"]
    (tmp_path / "config.json").write_text(json.dumps({"parts": record}))
    check_functions(tmp_path)


def test_a_rule_itself(bert, data, tmp_path):
    """Its program is part of config.json: another constant is another configuration."""
    experiment = tiny.experiment(bert, data, weighting=weighting.cagrad(c=0.3))
    values = json.loads(json.dumps(to_json(experiment)))
    assert values["weighting"].startswith("cagrad@")
    assert values == json.loads(json.dumps(to_json(dataclasses.replace(experiment, weighting=weighting.cagrad(c=0.3)))))
    assert values != json.loads(json.dumps(to_json(dataclasses.replace(experiment, weighting=weighting.cagrad(c=0.31)))))
    assert from_json(values).weighting == values["weighting"]
    with pytest.raises(UserError, match="is a Rule that a script made itself: run that script"):
        weighting.make(values["weighting"])


def test_a_users_class_may_have_negative_numbers(own):
    own("""
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Shifted(Classification):
            low: float = -3.0
    """)
    task = parts.kinds(Task)["Shifted"](name="a", source="b")
    from mtl_jax.core import configuration

    configuration.check(task)
    with pytest.raises(UserError, match="dropout is 1; it must be at least 0 and below 1"):
        configuration.check(dataclasses.replace(task, dropout=1))


def test_import_gives_a_script_a_rule_of_another_file(tmp_path):
    """Without an edit of the script: --import FILE --weighting NAME."""
    flags = ["--import", str(own_parts.FOLDER / "weighting.py"), "--weighting", "inverse_norm"]
    flags += [*own_parts.SMALL, *own_parts.data_flags(tmp_path / "data"), "--workdir", str(tmp_path / "run")]
    done = processes.run(own_parts.FOLDER / "two_tasks.py", *flags, "--phases.0.steps", "1", devices=8)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["parts"]["inverse_norm"]["file"].endswith("experiments/own/weighting.py")


def test_the_hash_of_a_part_is_that_of_its_definition(own):
    """A file that is edited while a run trains is not the file that was trained."""
    file = own("""
        @weighting.register("first")
        def first(): return weighting.equal()

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class First(Classification):
            grades: int = 3
    """)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text(file.read_text(encoding="utf-8") + "# edited", encoding="utf-8")
    assert parts.origin_of(weighting.RULES["first"]).sha256 == digest
    assert parts.origin_of(parts.kinds(Task)["First"]).sha256 == digest
