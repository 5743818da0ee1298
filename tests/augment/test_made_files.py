"""mtl-jax augment: rows with their provenance in a file, and a run that trains on those of its own training rows."""

import dataclasses
import json
from collections import Counter

import own_parts
import pytest

from mtl_jax import Classification, Source, UserError
from mtl_jax.augment import Aeda, Eda, Written, made_files
from mtl_jax.data import corpus, made_rows
from mtl_jax.data.row_keys import digest, key

ROWS = "text,label\n" + "".join(f"word{n} is {'good' if n % 2 else 'bad'} and w{n % 7} is fine,{n % 2}\n" for n in range(40))
TASK = Classification(name="c", source="s", column="label")


def test_a_script_writes_rows_and_trains_on_them(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text(ROWS, encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(
        "from mtl_jax import *\nfrom mtl_jax.augment import Aeda\n"
        f"source = Source('s', {str(tmp_path / 'rows.csv')!r}, augment=(Aeda(share=1.0),))\n"
        "task = Classification(name='c', source='s', column='label')\n"
        "main(Experiment('e', Embedding(), (source,), (task,), (Phase('p', 1),)))\n",
        encoding="utf-8",
    )
    output = tmp_path / "made.jsonl"
    own_parts.command("augment", str(script), "--output", str(output), "--copies", "2")
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if line.startswith("Aeda of ")]) >= 10
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert printed[-1] == f"Aeda made {len(lines)} rows; everything is in {output}"
    declared = Source("s", str(tmp_path / "rows.csv"))
    data = corpus.read_sources([declared], [TASK])
    train = {row.where: row for row in data["s"].rows["train"]}
    for line in lines:
        made = line["augmented"]
        origin = train[made["from"]]  # of dev or test there is none
        assert made["key"] == digest(key(declared, origin)).hex()
        assert made["by"] == "Aeda"
        assert made["fields"] == {"share": 1.0, "added": 2, "seed": 0, "most": 0.3333}
        assert line["label"] == origin.columns["label"]
        words = [word for word in line["text"].split() if word not in ".;?:!,"]
        assert words == origin.columns["text"].split()
    # A run with other splits trains on the rows that were made of its own training rows.
    other = dataclasses.replace(declared, cut_seed=1, augment=(Written(path=str(output), added=2),))
    data = corpus.read_sources([other], [TASK])
    keys = {digest(key(other, row)).hex() for row in data["s"].rows["train"]}
    added = made_rows.add([other], [TASK], data).data["s"].rows["train"][len(keys) :]
    assert len(added) == sum(line["augmented"]["key"] in keys for line in lines) < len(lines)
    assert added[0].columns.keys() == {"text", "label"}


def test_all_that_is_written_is_added_and_the_rest_is_counted(tmp_path, caplog):
    (tmp_path / "rows.csv").write_text(ROWS, encoding="utf-8")
    file, output = str(tmp_path / "rows.csv"), str(tmp_path / "made.jsonl")
    made = made_files.of_file(file, Aeda(share=1.0), copies=3)  # of all rows, also of those that are dev and test here
    made_files.write(made, output)
    number = Counter(json.loads(line)["augmented"]["key"] for line in made.lines)
    declared = Source("s", file)
    data = corpus.read_sources([declared], [TASK])
    train = [number[digest(key(declared, row)).hex()] for row in data["s"].rows["train"]]
    assert max(train) == 3
    others = f"{len(made.lines) - sum(train)} made from rows that are not training rows of this run"
    for added in (1, 2, 3):
        caplog.clear()
        used = dataclasses.replace(declared, augment=(Written(path=output, added=added),))
        result = made_rows.add([used], [TASK], data)
        taken = sum(min(count, added) for count in train)
        assert result.counts["s"]["Written"]["made"] == taken == len(result.data["s"].rows["train"]) - len(train)
        more = f"{sum(train) - taken} because added is {added} (up to 3 were made from a row: set added to that)"
        reasons = others if added == 3 else f"{others}; {more}"
        (line,) = [record.message for record in caplog.records]
        assert line == f"source s: Written: of {len(made.lines)} rows in {output} these are left out: {reasons}"


def test_files_and_bad_input(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text(ROWS, encoding="utf-8")
    (tmp_path / "dev.csv").write_text("text,label\nword1 is good and w1 is fine,1\n", encoding="utf-8")
    file, output = str(tmp_path / "rows.csv"), str(tmp_path / "made.jsonl")
    own_parts.command("augment", file, "--output", output, "--by", "Eda", "--options", "swap", "0", "delete", "0.5")
    assert "Eda made " in capsys.readouterr().out
    assert len((tmp_path / "made.jsonl").read_text(encoding="utf-8").splitlines()) > 30
    made = made_files.of_file(file, Eda(share=1.0), held_out=[str(tmp_path / "dev.csv")], copies=3)
    assert all(line.where.endswith(f"(Eda {made.rows[n].number + 1})") for n, line in enumerate(x.row for x in made.rows))
    for arguments, line in (
        ((file, "--output", output), "--by is needed for a file: one of Aeda, "),
        ((file, "--output", output, "--by", "Edaa"), "unknown --by 'Edaa' (did you mean 'Eda'?)"),
        ((file, "--output", output, "--by", "Eda", "--options", "swop", "1"), "unknown field of Eda in --options: 'swop'"),
        ((file, "--output", output, "--by", "Eda", "--options", "swap", "x"), "--options swap: 'x' cannot be read as float"),
        ((file, "--output", output, "--by", "Eda", "--options", "swap", "2"), "Eda: swap is 2.0; it must be at least 0 and"),
        ((file, "--output", str(tmp_path / "no" / "x"), "--by", "Eda"), "name a file in a directory that exists"),
        ((file, "--output", output, "--by", "Eda", "--labels", "tags"), "unknown column of"),
        ((file, "--output", output, "--by", "Eda", "--source", "s"), "--source is for a script; a file is one source"),
    ):
        with pytest.raises(SystemExit):
            own_parts.command("augment", *arguments)
        assert line in capsys.readouterr().err
    source = Source("s", file, augment=(Written(path=str(tmp_path / "none.jsonl")),))
    with pytest.raises(UserError, match=r"none\.jsonl is not a file; mtl-jax augment writes one"):
        source.augment[0].check("x")
    written = Written(path=str(tmp_path / "rows.jsonl"), added=1)
    (tmp_path / "rows.jsonl").write_text('{"text": "a b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"rows.jsonl:1: there is no augmented.key: not a file that mtl-jax augment wrote"):
        made_files.of_file(file, written)
    with pytest.raises(UserError, match="copies is 0; it must be at least 1"):
        made_files.of_file(file, Aeda(), copies=0)
