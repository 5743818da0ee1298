import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.core.errors import UserError
from mtl_jax.data.formats import READERS, lines, text_files
from mtl_jax.data.formats.json_files import parse
from mtl_jax.data.formats.records import columns
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import Source
from mtl_jax.data.splits import read


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def rows(path, **options):
    """What a reader gives: (columns, line) of rows, the message of errors, paths left out."""
    source = Source(name="a", path=path, **options)
    return [
        (item.columns, item.where.rpartition(":")[2]) if isinstance(item, Row) else str(item).rpartition("/")[2]
        for item in READERS[source.format](path, source)
    ]


# Lines


@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]))), st.booleans(), st.booleans())
def test_lines_are_those_between_newlines(tmp_path_factory, texts, bom, packed):
    data = ("\n".join(texts) + "\n").encode()
    data = b"\xef\xbb\xbf" + data if bom else data
    path = tmp_path_factory.mktemp("lines") / ("a.txt.gz" if packed else "a.txt")
    path.write_bytes(gzip.compress(data) if packed else data)
    expected = data.decode("utf-8-sig").split("\n")[:-1]
    assert [line.text for line in lines.lines(str(path))] == [text.removesuffix("\r") for text in expected]
    assert [line.number for line in lines.lines(str(path))] == list(range(1, len(expected) + 1))


def test_a_line_without_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10)
    path = write(tmp_path / "a.txt", "x" * 10 + "\n" + "y" * 95 + "\nshort")
    first, second, third = lines.lines(path)
    assert (first.text, first.error) == ("x" * 10, None)
    assert str(second.error).endswith("a.txt:2: the line is longer than 10 bytes; is it one text?")
    assert second.text == ""
    assert third.text == "short"


@pytest.mark.parametrize("data", [b"no gzip at all", gzip.compress(b"cut off" * 100, mtime=0)[:-20]], ids=["none", "short"])
def test_broken_gzip_names_the_file(tmp_path, data):
    with pytest.raises(UserError, match=r"a\.gz: cannot be read"):
        list(lines.lines(write(tmp_path / "a.gz", data)))


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(UserError, match="a directory; a source needs a file"):
        list(lines.lines(str(tmp_path)))


# csv and tsv


def test_names_stand_in_for_a_header(tmp_path):
    path = write(tmp_path / "a.csv", 'A man.,"One, two",5.0\r\n')
    assert rows(path, columns=("text", "second", "score")) == [({"text": "A man.", "second": "One, two", "score": "5.0"}, "1")]
    path = write(tmp_path / "a.tsv", '\ufeffone\t1\r\n\r\n"two\t0\n')
    assert rows(path, format="tsv", columns=("text", "label")) == [
        ({"text": "one", "label": "1"}, "1"),
        ({"text": '"two', "label": "0"}, "3"),
    ]


def test_a_bad_csv_row_does_not_spoil_the_next(tmp_path):
    path = write(tmp_path / "a.csv", b'text,label\n"a"b,1\n"caf\xe9\nx",1\nc\n"d\nd",1\n')
    assert rows(path) == [
        "a.csv:2: ',' expected after '\"'",
        "a.csv:3: not UTF-8 (invalid continuation byte); convert the file to UTF-8",
        "a.csv:5: 1 column, but there are 2 names: text, label",
        ({"text": "d\nd", "label": "1"}, "7"),
    ]


def test_a_long_csv_line_may_have_opened_a_quote(tmp_path):
    path = write(tmp_path / "a.csv", 'text\n"' + "x" * 1_000_001 + '\nend"\n')
    with pytest.raises(UserError, match=r"a\.csv:2: the line is longer"):
        rows(path)
    path = write(tmp_path / "a.csv", 'text\n"' + ("x" * 999 + "\n") * 1100 + '"\n')
    with pytest.raises(UserError, match=r"field larger .* is a quote not closed in the row that begins on line 2"):
        rows(path)


def test_a_header_that_is_not_utf8(tmp_path):
    for format in ("csv", "tsv"):
        with pytest.raises(UserError, match="a:1: not UTF-8"):
            rows(write(tmp_path / "a", b"caf\xe9\nx\n"), format=format)


# jsonl


def test_jsonl_values(tmp_path):
    line = {"text": "é", "n": 3, "ok": True, "no": None, "deep": {"er": {"x": "y"}}, "words": ["a", "b"], "tags": ["O", None]}
    text = json.dumps(line)[:-1] + ', "score": 3.80, "big": 1e-07, "numbers": [1, 2.50], "odd": [{"a": 1.5}, [2]]}'
    path = write(tmp_path / "a.jsonl", text + "\r\n\r\n")
    assert rows(path, format="jsonl") == [
        (
            {
                "text": "é",
                "n": "3",
                "ok": "true",
                "no": None,
                "deep.er.x": "y",
                "words": ["a", "b"],
                "tags": ["O", None],
                "score": "3.80",
                "big": "1e-07",
                "numbers": ["1", "2.50"],
                "odd": '[{"a": 1.5}, [2]]',
            },
            "1",
        )
    ]


@pytest.mark.parametrize(
    "answers",
    [
        '{"text": ["b"], "answer_start": [2]}',
        '[{"text": "b", "answer_start": 2}]',
        '[{"text": "b", "start": 2}]',
    ],
)
def test_answers_as_squad_and_the_hub_write_them(answers):
    assert columns({"answers": json.loads(answers)}) == {"answers": [{"text": "b", "start": 2}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "a:2: not JSON (Expecting ',' delimiter at column 13)"),
        ('["a"]', "a:2: not a JSON object"),
        ('{"text": NaN}', "a:2: NaN is not JSON; write null where there is no value"),
        ('{"text": "\\ud83d"}', "a:2: an escape \\ud... that is only half of a character"),
        ('{"a.b": 1, "a": {"b": 2}}', "a:2: two values of column 'a.b'"),
        ('{"answers": {"text": ["a"], "answer_start": []}}', "a:2: 1 answer at 0 places"),
    ],
)
def test_bad_json_names_the_line(tmp_path, line, message):
    good = '{"text": "\\ud83d\\ude00"}\n'
    path = write(tmp_path / "a", good + line + "\n" + good)
    assert rows(path, format="jsonl") == [({"text": "😀"}, "1"), message, ({"text": "😀"}, "3")]


numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@given(st.dictionaries(st.text(), st.none() | st.booleans() | numbers | st.text() | st.lists(numbers)))
def test_numbers_print_as_they_are_written(value):
    written = {name: part if part is None or isinstance(part, str) else json.dumps(part) for name, part in value.items()}
    for name, part in value.items():
        if isinstance(part, list):
            written[name] = [json.dumps(number) for number in part]
    assert columns(parse(json.dumps(value))) == written


def test_a_row_of_jsonl_without_its_text_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: source 'a' has no text column 'text'; columns: body"):
        read(Source(name="a", path=path, format="jsonl"))
    path = write(tmp_path / "a.jsonl", '{"text": [["a"]]}\n{"text": null}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: the text column 'text' is empty"):
        read(Source(name="a", path=path, format="jsonl"))
    path = write(tmp_path / "a.jsonl", '{"text": ["a", null]}\n')
    with pytest.raises(UserError, match="a list of values other than words"):
        read(Source(name="a", path=path, format="jsonl"))


# conll

CONLL = {"format": "conll", "columns": ("words", "tags"), "text": "words"}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("blank", ["", "\t", " "])
def test_sentences_end_at_blank_lines(tmp_path, end, blank):
    lines = ["# id = 1", "#\tO", "#hashtag\tB-x", "a b\tO", blank, blank, "# id = 2", "# more", "New\tB-y", blank]
    path = write(tmp_path / "a.conll", end.join(lines) + end)
    expected = [
        ({"words": ["#", "#hashtag", "a b"], "tags": ["O", "B-x", "O"]}, "2"),
        ({"words": ["New"], "tags": ["B-y"]}, "9"),
    ]
    assert rows(path, **CONLL) == expected
    # The last blank line may be absent.
    assert rows(write(tmp_path / "b.conll", end.join(lines[:-1])), **CONLL) == expected


def test_columns_between_spaces(tmp_path):
    path = write(tmp_path / "a", "-DOCSTART- O\n\n# O\n#x  O\nEU   B-ORG\n\n# newdoc id = 3\nb O\n")
    assert rows(path, **CONLL) == [
        ({"words": ["#", "#x", "EU"], "tags": ["O", "O", "B-ORG"]}, "3"),
        ({"words": ["b"], "tags": ["O"]}, "8"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"alone", "a:3: 1 column, but a word has 2: words, tags"),
        (b"# a comment inside", "a:3: 1 column, but a word has 2: words, tags"),
        (b"a\tb\tc", "a:3: 3 columns, but a word has 2: words, tags"),
        (b"\tO", "a:3: column 'words' is empty"),
        (b"a\t", "a:3: column 'tags' is empty"),
        (b"caf\xe9\tO", "a:3: not UTF-8 (invalid continuation byte); convert the file to UTF-8"),
        (b"x" * 1_000_001, "a:3: the line is longer than 1,000,000 bytes; is it one text?"),
    ],
)
def test_a_bad_line_makes_its_sentence_bad(tmp_path, line, message):
    path = write(tmp_path / "a", b"a\tO\nb\tO\n" + line + b"\nc\tO\n\nd\tO\n")
    assert rows(path, **CONLL) == [message, ({"words": ["d"], "tags": ["O"]}, "6")]


word = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1).filter(lambda word: word != "-DOCSTART-")


@given(st.lists(st.lists(st.tuples(word, word), min_size=1), min_size=1))
def test_conll_reads_what_was_written(tmp_path_factory, sentences):
    text = "\n".join("".join(f"{w}\t{t}\n" for w, t in sentence) for sentence in sentences)
    path = write(tmp_path_factory.mktemp("conll") / "a", text)
    assert [list(zip(*row.values(), strict=True)) for row, _ in rows(path, **CONLL)] == sentences


# parallel


def test_parallel_files_plain_and_packed(tmp_path):
    (tmp_path / "en.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    (tmp_path / "fr.gz").write_bytes(gzip.compress(b"un\r\ndeux"))
    path = str(tmp_path / "{en,fr}.gz")
    expected = [({"en": "one", "fr": "un"}, "1"), ({"en": "two", "fr": "deux"}, "2")]
    assert rows(path, format="parallel", text="en") == expected
    assert rows(path, format="parallel", columns=("text", "target"))[0][0] == {"text": "one", "target": "un"}
    with pytest.raises(UserError, match="2 files, but source 'a' names 1 column"):
        rows(path, format="parallel", columns=("text",))
    with pytest.raises(UserError, match="no text column 'text'; columns: en, fr"):
        rows(path, format="parallel")


def test_parallel_files_of_different_length(tmp_path):
    write(tmp_path / "a.en", "one\ntwo\n")
    write(tmp_path / "a.fr", "un\n")
    for path, longer in (("a.{en,fr}", "a.en"), ("a.{fr,en}", "a.en")):
        with pytest.raises(UserError, match=rf"{longer}:2: \S+a\.fr has only 1 line; parallel files must be of one length"):
            read(Source(name="a", path=str(tmp_path / path), format="parallel", text="en", lenient=True))


def test_parallel_lines_that_cannot_be_read_keep_their_place(tmp_path):
    write(tmp_path / "a.en", b"one\ncaf\xe9\nthree\n")
    write(tmp_path / "a.fr", "un\ndeux\ntrois\n")
    _, two, three = rows(str(tmp_path / "a.{en,fr}"), format="parallel", text="en")
    assert two == "a.en:2: not UTF-8 (invalid continuation byte); convert the file to UTF-8"
    assert three == ({"en": "three", "fr": "trois"}, "3")


def test_wildcards_of_parallel_files(tmp_path, monkeypatch):
    for topic in ("b", "a"):
        (tmp_path / topic).mkdir()
        for part in ("text", "labels"):
            write(tmp_path / topic / f"train_{part}.txt", f"{topic} {part}\n")
    assert text_files.matches(f"{tmp_path}/*/train_{{text,labels}}.txt") == [
        f"{tmp_path}/{topic}/train_{{text,labels}}.txt" for topic in ("a", "b")
    ]
    monkeypatch.setenv("MTL_JAX_DATA", str(tmp_path))
    assert text_files.matches("data:?/*_{text,labels}.*") == [f"data:{topic}/train_{{text,labels}}.txt" for topic in ("a", "b")]
    (tmp_path / "b" / "train_labels.txt").unlink()
    with pytest.raises(UserError, match=r"b/train_\{text,labels\}\.txt: not all of these files exist"):
        text_files.matches(f"{tmp_path}/*/train_{{text,labels}}.txt")


@pytest.mark.parametrize("path", ["plain.txt", "a{b", "{a,b}{c,d}", "{}"])
def test_parallel_files_need_braces(path):
    with pytest.raises(UserError, match="are named with one pair of braces"):
        read(Source(name="a", path=path, format="parallel"))


# squad

CONTEXT = "The Panthers gave up 308 points."
SQUAD = {"format": "squad", "text": "question", "pair": "context", "id": "id"}


def squad(tmp_path, *questions):
    data = {"version": "v2.0", "data": [{"title": "Bowl", "paragraphs": [{"context": CONTEXT, "qas": list(questions)}]}]}
    return write(tmp_path / "a.json", json.dumps(data))


def question(name, *answers, **more):
    return {"id": name, "question": f"What {name}?", "answers": [{"text": t, "answer_start": s} for t, s in answers], **more}


def test_squad_one_and_two(tmp_path):
    impossible = question("q2", is_impossible=True, plausible_answers=[{"text": "The", "answer_start": 0}])
    path = squad(tmp_path, question("q1", ("308", 21), ("308 points", 21)), impossible)
    first, second = (item[0] for item in rows(path, **SQUAD))
    assert first == {
        "id": "q1",
        "question": "What q1?",
        "context": CONTEXT,
        "title": "Bowl",
        "answers": [{"text": "308", "start": 21}, {"text": "308 points", "start": 21}],
    }
    assert second["answers"] == []


def test_the_same_question_about_another_context_is_another_row(tmp_path):
    paragraphs = [
        {"context": f"{CONTEXT} {i}", "qas": [{"id": f"{i} {j}", "question": "Who?", "answers": []} for j in range(2)]}
        for i in range(60)
    ]
    path = write(tmp_path / "a.json", json.dumps({"data": [{"paragraphs": paragraphs}]}))
    for pair in ("context", ""):
        splits = read(Source(name="a", path=path, format="squad", text="question", pair=pair))
        assert sum(len(rows) for rows in splits.rows.values()) == splits.repeated == 60


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (
            [question("q", ("308", 20))],
            r"a\.json: data\[0\]\.paragraphs\[0\]\.qas\[0\] \(question q\): the answer '308' is not .* at 20; .* ' 30' there",
        ),
        (
            [question("q", ("points.", 30))],
            r"\(question q\): the answer 'points.' at 30 is outside the context of 32 characters",
        ),
        ([question("q", ("308", -3))], "at -3 is outside the context"),
        ([question("q", ("", 3))], "the answer '' is not in the context at 3"),
        (
            [question("p"), question("q"), question("r"), question("q")],
            r"qas\[3\] \(question q\): the id 'q' occurs already at .*\.json: data\[0\]\.paragraphs\[0\]\.qas\[1\] ",
        ),
        ([{"id": "q"}], r"qas\[0\] \(question q\): not in SQuAD's format: no 'answers'"),
        ([{}], r"data\[0\]\.paragraphs\[0\]\.qas\[0\]: not in SQuAD's format: no 'id'"),
        (
            [question("q", ("308", "21"))],
            r"qas\[0\] \(question q\): not in SQuAD's format: no 'answer_start', or of the wrong type",
        ),
    ],
)
def test_bad_questions_are_named(tmp_path, questions, message):
    with pytest.raises(UserError, match=message):
        read(Source(name="a", path=squad(tmp_path, *questions), **SQUAD))


def test_ids_of_questions_are_checked_without_being_asked(tmp_path):
    path = squad(tmp_path, question("q"), question("q"))
    with pytest.raises(UserError, match=r"\(question q\): the id 'q' occurs already at"):
        read(Source(name="a", path=path, **{name: value for name, value in SQUAD.items() if name != "id"}))


def test_a_bad_question_is_skipped_alone(tmp_path):
    good = [question(f"q{i}", ("308", 21)) for i in range(60)]
    path = squad(tmp_path, question("bad", ("308", 20)), *good, {"id": "worse"})
    splits = read(Source(name="a", path=path, lenient=True, **SQUAD))
    assert splits.skipped == 2
    assert sum(len(rows) for rows in splits.rows.values()) == 60


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b'{"data": []}', "the file has no rows"),
        (b'{"data":\n[}', r"a:2: not JSON"),
        (b'{"data":\n"caf\xe9"}', "a:2: not UTF-8"),
        (b"[1]", "no list 'data' of articles"),
        (b'{"data": [NaN]}', "NaN is not JSON"),
        (b'{"data": [1]}', r"data\[0\]: not in SQuAD's format: no 'paragraphs'"),
    ],
)
def test_files_that_are_not_squad(tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        read(Source(name="a", path=write(tmp_path / "a", data), **SQUAD))


def test_comments_of_conll_u_are_none_of_the_words(tmp_path):
    """Also where they happen to have as many columns as a word; and a space after a tag is not part of it."""
    path = write(tmp_path / "a.conll", "# newdoc\nAnn B-PER\nwon O\n\nwins O\n")
    assert [columns["text"] for columns, _ in rows(path, format="conll", columns=("text", "tags"))] == [
        ["Ann", "won"],
        ["wins"],
    ]
    path = write(tmp_path / "b.conll", "Ann\tB-PER \nwon\tO\n")
    assert rows(path, format="conll", columns=("text", "tags"))[0][0]["tags"] == ["B-PER", "O"]


def test_a_comment_has_a_space_behind_its_sign(tmp_path):
    """What has none may be a word of a tweet; and "# word" is one where a word has two columns between spaces."""
    path = write(tmp_path / "a", "#comment\na O\n\n## a comment\na O\n\n# word\na O\n\n# a comment\na O\n")
    assert rows(path, **CONLL) == [
        "a:1: 1 column, but a word has 2: words, tags",
        "a:4: 3 columns, but a word has 2: words, tags",
        ({"words": ["#", "a"], "tags": ["word", "O"]}, "7"),
        ({"words": ["a"], "tags": ["O"]}, "11"),
    ]


@pytest.mark.parametrize("start", [None, 1.9, [1], True])
def test_an_answer_starts_at_a_whole_number(tmp_path, start):
    line = json.dumps({"text": "who", "context": "ab", "answers": [{"text": "b", "answer_start": start}]})
    path = write(tmp_path / "a.jsonl", line + "\n")
    (found,) = rows(path, format="jsonl")
    assert "is not a text and a whole number" in found


def test_squad_without_articles(tmp_path):
    for content in ('{"data": 5}', '{"data": null}', "[" * 100_000):
        with pytest.raises(UserError, match=r"a\.json"):
            rows(write(tmp_path / "a.json", content), format="squad")


# CoNLL-U


IDS = ("id", "text", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")


def universal(*words, between="\t"):
    """Lines of ten columns, of which the first two are given."""
    return "".join(between.join([*word.split("|"), *["_"] * 8]) + "\n" for word in words)


@pytest.mark.parametrize("between", ["\t", " "])
def test_ranges_and_empty_nodes_are_no_words(tmp_path, between):
    first = universal("1|I", "2-3|don't", "2|do", "3|n't", "3.1|go", between=between)
    comments = "# newdoc\n# text_en = a b c d e f g\n#global.columns = ID FORM\n"
    # A sentence whose first id is not 1 is one of a file with ids all the same.
    others = universal("0.1|E", "1|Hi", between=between) + "\n" + universal("4|a", "5-6|bc", "5|b", "6|c", between=between)
    path = write(tmp_path / "a.conllu", comments + first + "\n" + others)
    source = Source(name="a", path=path, format="conll", columns=IDS)
    found = list(READERS["conll"](path, source))
    assert [row.columns["text"] for row in found] == [["I", "do", "n't"], ["Hi"], ["a", "b", "c"]]
    assert [row.columns["id"] for row in found] == [["1", "2", "3"], ["1"], ["4", "5", "6"]]
    assert [row.non_words for row in found] == [(1, 1), (0, 1), (1, 0)]
    # Places are those of the words' own lines.
    assert [row.where_word(1).rpartition(":")[2] for row in (found[0], found[2])] == ["6", "15"]


@pytest.mark.parametrize(
    "content",
    [
        universal("1990-1995|x", "was|x"),  # ten columns, of which the first is the word
        universal("I|x", "won|x", "3-4|x", "8.1|x"),
        universal("3-4|x"),
        universal("#|x", "8.1|x"),
    ],
)
def test_ten_columns_without_ids_are_words(tmp_path, content):
    names = ("text", *(f"column{n}" for n in range(9)))
    (found,) = rows(write(tmp_path / "a.conll", content), format="conll", columns=names)
    assert found[0]["text"] == [line.split("\t")[0] for line in content.splitlines()]


def test_ids_of_fewer_columns_are_left_alone(tmp_path):
    found = rows(write(tmp_path / "a.conll", "1\tI\n2-3\tdon't\n"), format="conll", columns=("id", "text"))
    assert found == [({"id": ["1", "2-3"], "text": ["I", "don't"]}, "1")]


def test_a_sentence_of_ranges_alone_is_an_error(tmp_path):
    path = write(tmp_path / "a.conllu", universal("1|I") + "\n" + universal("1-2|don't"))
    assert (
        rows(path, format="conll", columns=IDS)[1] == "a.conllu:3: a sentence without words; it has ranges or empty nodes only"
    )


@pytest.mark.parametrize(
    "line",
    [
        "-DOCSTART- -X- O O",
        "-DOCSTART-\tx",
        "-DOCSTART- (1 EU)",
        "#\thttp://x.org",
        "#begin document (a); part 000",
        "#end document",
    ],
)
@pytest.mark.parametrize("blank", ["\n", ""])
def test_lines_between_documents_are_no_words(tmp_path, line, blank):
    """Those of CoNLL-2003, AIDA, GermEval 2014 and CoNLL-2012, whether or not a blank line follows."""
    path = write(tmp_path / "a.conll", f"{line}\n{blank}EU\tNNP\tI-NP\tB-ORG\n")
    assert [columns["text"] for columns, _ in rows(path, format="conll", columns=("text", "a", "b", "c"))] == [["EU"]]


def test_blanks_that_look_like_spaces_are_named(tmp_path):
    path = write(tmp_path / "a.conll", "a\tO\n\nb\xa0O\n\n\xa0\tO\n\nc\u3000d\tO\n")
    first, second, third, fourth = rows(path, format="conll", columns=("text", "tags"))
    assert second == "a.conll:3: 1 column, but a word has 2: text, tags (the blank U+00A0 does not divide columns)"
    assert third == "a.conll:5: column 'text' has only the blank U+00A0"
    assert (first[0]["text"], fourth[0]["text"]) == (["a"], ["c\u3000d"])


# JSON that is not by line


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps([{"text": "a"}], indent=2), "the file is a JSON array, .* convert it, for example by jq -c '\\.\\[\\]'"),
        (json.dumps([{"text": "a"}]), "the file is a JSON array"),
        ('\n[{"text": "a"},\n{"text": "b"}]\n', "a.jsonl:2: the file is a JSON array"),
        (json.dumps({"text": "a"}, indent=1), "the object does not end on its line, .* jq -c \\.$"),
        ('{"text": "a",\n"b": "c"}\n', "the object does not end on its line"),
        (json.dumps([{"text": "x" * 1_000_000}]), "longer than 1,000,000 bytes; is it a JSON array, not an object"),
    ],
)
def test_one_json_value_is_no_jsonl(tmp_path, content, message, lenient):
    with pytest.raises(UserError, match=message):
        read(Source(name="a", path=write(tmp_path / "a.jsonl", content), format="jsonl", lenient=lenient))


def test_a_list_or_half_a_line_among_objects_is_one_bad_row(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n[{"text": "b"}]\n{"text":\n[1, 2]\n')
    good, *bad = rows(path, format="jsonl")
    assert good[0] == {"text": "a"}
    assert [message.partition(": ")[2][:17] for message in bad] == [
        "not a JSON object",
        "not JSON (Expecti",
        "not a JSON object",
    ]


def test_many_columns_take_no_time_and_no_room(tmp_path):
    """A search of every name among all took minutes."""
    names = [f"c{number}" for number in range(100_000)]
    wide = write(tmp_path / "a.csv", f"text,{','.join(names)}\nb,{','.join(names)}\nc\n")
    source = Source(name="a", path=wide)
    row, short = READERS["csv"](wide, source)
    assert row.columns["c99999"] == "c99999"
    assert str(short).endswith("1 column, but there are 100,001 names: text, c0, c1, c2, c3, c4, c5, c6, c7, c8 and 99991 more")
    with pytest.raises(UserError, match=r"no text column 'no'; columns: text, c0, .* and 99991 more$"):
        list(READERS["csv"](wide, Source(name="a", path=wide, text="no")))
