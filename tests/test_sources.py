"""Where problems come from: every kind of file gives the same rows, and a wrong kind is named with what to do."""

import gzip
import json
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from opd.data import read_problems
from opd.errors import InputError
from opd.files import sha256
from opd.sources import digest, read_source

ROWS = [{"id": "a", "q": '1,\n"2"', "a": "1"}, {"id": "b", "q": "naïve", "a": "2"}]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_csv(path):
    path.write_text('id,q,a\na,"1,\n""2""",1\n\nb,naïve,2\n', encoding="utf-8-sig")


WRITERS = {
    "p.jsonl": lambda path: path.write_text(lines(ROWS)),
    "p.txt": lambda path: path.write_text(lines(ROWS)),
    "p.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "object.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS, "license": {"name": "x"}})),
    "lines.json": lambda path: path.write_text(lines(ROWS)),
    "p.csv": write_csv,
    "P.CSV": write_csv,
    "p.parquet": lambda path: parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    assert [row.fields for row in read_source(path)] == ROWS
    assert [row.name for row in read_source(path)] == ["1", "2"]
    assert [(p.id, p.messages[0]["content"], p.answer) for p in read_problems(path, "q", "a")] == [
        (row["id"], row["q"], row["a"]) for row in ROWS
    ]
    assert digest(str(path)) == sha256(path)


def test_a_folder_is_its_files_by_name(tmp_path):
    for name in ("b.csv", "a.jsonl", "c.parquet"):
        WRITERS["p" + Path(name).suffix](tmp_path / name)
    (tmp_path / "README.md").write_text("# no data")
    (tmp_path / "deeper").mkdir()
    rows = read_source(tmp_path)
    assert [row.fields for row in rows] == ROWS * 3
    assert [row.name for row in rows[1:4]] == ["a.jsonl:2", "b.csv:1", "b.csv:2"]
    assert rows[1].where == f"{tmp_path}/a.jsonl, line 2" and rows[3].where == f"{tmp_path}/b.csv, row 2"
    before = digest(str(tmp_path))
    (tmp_path / "README.md").write_text("# other text")
    assert digest(str(tmp_path)) == before
    (tmp_path / "b.csv").rename(tmp_path / "d.csv")
    assert digest(str(tmp_path)) != before


def test_an_absent_key_of_a_parquet_file_is_absent(tmp_path):
    turns = [{"role": "user", "content": "x"}, {"role": "tool", "content": "y", "tool_call_id": "1"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"q": turns, "a": 3.0}]), tmp_path / "p.parquet")
    (problem,) = read_problems(tmp_path / "p.parquet", "q", "a")
    assert list(problem.messages) == turns and problem.answer == "3"


PARQUET = pyarrow.BufferOutputStream()
parquet.write_table(pyarrow.Table.from_pylist(ROWS), PARQUET)
FAULTS = {  # name and content of a file, what is said about it
    "parquet named JSONL": ("p.jsonl", PARQUET.getvalue().to_pybytes(), "this is a parquet file. Let its name end in"),
    "gzip": ("p.jsonl.gz", gzip.compress(b"{}"), "this is compressed with gzip. Unpack it: gunzip {path}."),
    "gzip named JSON": ("p.json", gzip.compress(b"{}"), "this is compressed with gzip"),
    "gzip named parquet": ("p.parquet", gzip.compress(b"{}"), "this is compressed with gzip"),
    "zstd": ("p.csv", b"\x28\xb5\x2f\xfd....", "this is compressed with zstd"),
    "zip": ("p.csv", b"PK\x03\x04....", "this is a zip archive. Unpack it: unzip"),
    "Arrow": ("p.parquet", b"ARROW1\0\0", "this is an Arrow file"),
    "pickle": ("p.jsonl", b"\x80\x04\x95\x00cposix\nsystem\n", "not UTF-8 text (byte 0)"),
    "a list in JSONL": (
        "p.jsonl",
        b'\n [{"q": "1"}]',
        "this is a JSON list, and a JSONL file holds one object per line",
    ),
    "JSONL with a bad line": ("p.jsonl", b'{"q": "1"}\n{', "{path}, line 2: not JSON"),
    "JSON lines with a bad line": ("p.json", b'{"q": "1"}\n{', "{path}, line 2: not JSON"),
    "JSON cut off": ("p.json", b'[{"q": "1"},\n', "{path}: not JSON (Expecting value, line 2"),
    "JSON with two lists": ("p.json", b'{"a": [], "b": []}', "the object in it has the lists ['a', 'b']"),
    "JSON without a list": ("p.json", b'{"a": 1}', "the object in it has no list. Expected a JSON list of problems"),
    "JSON that is a text": ("p.json", b'"x"', "{path}: str, expected a JSON list of problems, or an object with one"),
    "JSON list of texts": ("p.json", b'[{"q": "1"}, "x"]', "{path}, row 2: str, expected an object"),
    "CSV without the field": ("p.csv", b"a,b\n1,2\n", "{path}, row 1: no field 'q'; it has ['a', 'b']"),
    "CSV of semicolons": ("p.csv", b"q;a\n1;2\n", "the header is 'q;a'. Expected commas between fields, not ';'"),
    "CSV of tabs": ("p.csv", b"q\ta\n1\t2\n", "Expected commas between fields"),
    "CSV with a short row": ("p.csv", b"q,a\n1,2\n3\n", "{path}, row 2: 1 fields, and the header has 2"),
    "CSV with a field twice": ("p.csv", b"q,q\n1,2\n", "the header names a field twice"),
    "CSV with an open quote": ("p.csv", b'q,a\n1,"2\n', "line 2: not CSV (unexpected end of data)"),
    "CSV with a header alone": ("p.csv", b"q,a\n", "{path}: no problems in it"),
    "an empty CSV": ("p.csv", b"", "{path}: no problems in it"),
    "an empty JSON list": ("p.json", b"[]", "{path}: no problems in it"),
    "a damaged parquet file": ("p.parquet", b"PAR1....", "{path}: cannot be read (Parquet"),
    "text named parquet": ("p.parquet", b'{"q": "1"}', "Expected a parquet file of problems"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_kind_is_named(name, tmp_path):
    file, content, message = FAULTS[name]
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_problems(path, "q", None)
    assert message.replace("{path}", str(path)) in str(caught.value) and str(caught.value).startswith(str(path))


def test_long_fields_of_a_csv_file(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("q\n" + "x" * 200_000 + "\n")
    assert len(read_problems(path, "q", None)[0].messages[0]["content"]) == 200_000


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The real library with a data set folder in the place of the hub; returns what it was asked for."""
    asked, original = [], datasets.load_dataset
    folder = tmp_path / "repository"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(lines({**row, "split": split} for row in ROWS))

    def load_dataset(name, subset, split, revision):
        asked.append((name, subset, split, revision))
        return original(str(folder), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_data_set_of_the_hub(hub):
    rows = read_source(f"hub:some/set@{COMMIT}/test")
    assert [row.fields for row in rows] == [{**row, "split": "test"} for row in ROWS]
    assert rows[1].where == f"hub:some/set@{COMMIT}/test, row 2" and rows[1].name == "2"
    read_source("hub:some/set.v2:main-x@v1.0/train[:1]")
    assert hub == [("some/set", None, "test", COMMIT), ("some/set.v2", "main-x", "train[:1]", "v1.0")]
    assert digest(f"hub:some/set@{COMMIT}/test") == COMMIT


def test_the_only_split_needs_no_name(hub, tmp_path):
    with pytest.raises(InputError, match=r"has the splits \['train', 'test'\]. Choose one: hub:some/set@v1/train"):
        read_source("hub:some/set@v1")
    (tmp_path / "repository/test.jsonl").unlink()
    assert len(read_source("hub:some/set@v1")) == 2
    with pytest.raises(InputError, match='Unknown split "nope"'):
        read_source("hub:some/set@v1/nope")


def test_no_script_of_a_data_set_runs(hub, tmp_path):
    (tmp_path / "repository/repository.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="Dataset scripts are no longer supported"):
        read_source("hub:some/set@v1/train")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "source, message",
    [
        ("hub:some/set", "expected a revision that stays, a commit or a tag, so that the run can be repeated"),
        ("hub:some/set:main", "Write hub:some/set@COMMIT"),
        ("hub:some/set@main/train", "expected a revision that stays"),
        ("hub:set@v1", "expected hub:OWNER/NAME[:CONFIG]@REVISION[/SPLIT], for example hub:openai/gsm8k"),
        ("hub:../set@v1", "../set is a folder here"),
        ("hub:some/set@v1/", "expected hub:OWNER/NAME"),
        ("hub:data/tiny@v1", "data/tiny is a folder here, which has no revision. Name the folder without hub:"),
    ],
)
def test_names_of_data_sets_that_are_refused(source, message, tmp_path, monkeypatch):
    if source == "hub:../set@v1":
        (tmp_path / "set").mkdir()
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
    for use in (read_source, digest):
        with pytest.raises(InputError) as caught:
            use(source)
        assert message in str(caught.value)


def test_the_hub_offline_is_one_message(monkeypatch, tmp_path):
    """The library itself, without a network."""
    for place in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(InputError) as caught:
        read_source("hub:some/set@v1/train")
    assert str(caught.value) == (
        "hub:some/set@v1/train: cannot be read (Couldn't reach 'some/set' on the Hub (OfflineModeIsEnabled)). Check "
        "name, revision and split, the network, your login, and HF_HUB_OFFLINE; or name a local copy of its files."
    )
