"""Text of datasets: real `datasets`, on folders made here."""

import json
import sys
import tracemalloc
from pathlib import Path

import datasets
import pyarrow
import pytest
from builders import byte_tokenizer
from pyarrow import parquet

from saehook.corpus import text_hash
from saehook.dataset_text import DatasetText, documents_of
from saehook.errors import ArgumentError, FileError
from saehook.harvest import TextStream
from saehook.tokenization import windows

ROWS = 60
SHARDS = 3


def text_of(i: int) -> str:
    """Of 0 to 4 windows; every seventh is empty."""
    return "" if i % 7 == 6 else f"document {i}: " + "word " * (i % 11)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same rows as JSON-lines and parquet in three files, and as `datasets` saves them."""
    rows = [{"id": i, "text": text_of(i), "none": None} for i in range(ROWS)]
    made = {name: tmp_path_factory.mktemp(name) for name in ("jsonl", "parquet", "saved")}
    for shard in range(SHARDS):
        part = rows[shard * ROWS // SHARDS : (shard + 1) * ROWS // SHARDS]
        name = f"train-{shard}"
        (made["jsonl"] / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        parquet.write_table(pyarrow.Table.from_pylist(part), made["parquet"] / f"{name}.parquet", row_group_size=7)
    (made["jsonl"] / "test.jsonl").write_text('{"text": "held out", "id": 0, "none": null}\n')
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(made["saved"])
    datasets.enable_progress_bars()
    return made


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_rows_are_documents_in_their_order(folders, kind):
    text = documents_of([f"hf:{folders[kind]}"])
    assert isinstance(text, DatasetText)
    expected = [text_of(i) for i in range(ROWS) if text_of(i)]
    for _ in range(2):
        assert [document.text for document in text] == expected
    part = documents_of([f"hf:{folders[kind]},split=train,skip=5,take=40"])
    assert [d.text for d in part] == [text_of(i) for i in range(5, 45) if text_of(i)]
    first, second = iter(text), iter(text)
    assert next(first).name == f"{folders[kind].name}:1"
    assert [next(second), next(second)][1] == next(first), "two readers do not disturb each other"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("repeat", [False, True])
def test_a_stream_goes_on_where_it_was(folders, kind, repeat):
    """At any window, and again after it was resumed: exactly those that would have come."""
    tokenizer = byte_tokenizer()
    text = DatasetText(str(folders[kind]), skip=2, take=50)

    def stream() -> TextStream:
        return TextStream(text, tokenizer, 32, repeat=repeat, seed=3)

    whole = stream()
    expected = []
    while len(expected) < 80 and (window := next(whole, None)) is not None:
        expected.append(window.tolist())
    assert whole.passes >= 1 if repeat else 30 < len(expected) < 80
    going = stream()
    got = []
    for i in range(len(expected)):
        if i % 7 in (0, 1, 5):
            state = going.state()
            going = stream()
            going.load_state(json.loads(json.dumps(state)))
            assert going.state() == state
        got.append(next(going).tolist())
    assert got == expected
    assert going.read == whole.read
    assert repeat or next(going, None) is None


def test_evaluation_reads_no_further_than_it_needs(folders):
    text = DatasetText(str(folders["parquet"]), skip=3)
    found = windows(text, byte_tokenizer(), 32, max_tokens=200)
    whole = windows(list(text), byte_tokenizer(), 32, max_tokens=200)
    assert found.ids.tolist() == whole.ids.tolist()
    assert 5 < found.documents < whole.documents
    assert found.text_sha256 == text_hash(list(text)[: found.documents])
    assert found.dataset is not None
    assert found.dataset["name"] == folders["parquet"].name
    assert (found.dataset["split"], found.dataset["column"], found.dataset["skip"]) == ("train", "text", 3)


def test_rows_are_not_held_in_memory(tmp_path):
    """64 MB of text in small row groups: reading takes a fraction of that from Python's and arrow's memory."""
    row = "x" * 2**20
    with parquet.ParquetWriter(tmp_path / "big.parquet", pyarrow.schema([("text", pyarrow.string())])) as writer:
        for _ in range(64):
            writer.write_table(pyarrow.table({"text": [row]}))
    text = DatasetText(str(tmp_path))
    before = pyarrow.total_allocated_bytes()
    highest = read = 0
    tracemalloc.start()
    for document in text:
        read += len(document.text)
        highest = max(highest, pyarrow.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert read == 64 * 2**20
    assert highest < 24 * 2**20


def test_a_line_of_the_command_line_and_back(folders, monkeypatch):
    monkeypatch.chdir(folders["jsonl"].parent)
    text = DatasetText.from_spec(f"hf:{folders['jsonl'].name},split=test,take=1k")
    assert text.spec == f"hf:{folders['jsonl']},split=test,column=text,take=1000"
    monkeypatch.chdir("/")
    same = DatasetText.from_spec(text.spec)
    assert [document.text for document in same] == ["held out"]
    assert same.fingerprint == text.fingerprint
    assert DatasetText.from_spec(text.spec.replace("1000", "999")).fingerprint != text.fingerprint


def test_other_files_are_other_text(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": "some words that fill a window"}\n' * 9)
    stream = TextStream(DatasetText(str(tmp_path)), byte_tokenizer(), 16)
    next(stream)
    file.write_text('{"text": "some other words in the window"}\n' * 9)
    with pytest.raises(ArgumentError, match="the text has changed"):
        TextStream(DatasetText(str(tmp_path)), byte_tokenizer(), 16).load_state(stream.state())


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (",column=body", ArgumentError, "no column 'body'.*column=id, column=text, column=none"),
        (",column=id", ArgumentError, "holds int, no text. Its columns are id, text, none"),
        (",split=dev", ArgumentError, "no split 'dev'.*split=train, split=test"),
        (",skip=70", ArgumentError, "no row in split 'train' after skip=70"),
        (",take=0", ArgumentError, "leave no row"),
        (",colum=text", ArgumentError, "not understood; expected hf:NAME"),
        (",column", ArgumentError, "not understood"),
        (",config=en", FileError, "BuilderConfig 'en' not found"),
    ],
)
def test_what_cannot_be_read_is_said(folders, options, error, said):
    with pytest.raises(error, match=said):
        documents_of([f"hf:{folders['jsonl']}{options}"])


def test_a_column_without_text_is_said_with_the_others(folders):
    with pytest.raises(ArgumentError, match="'none' of .* is empty in all of 60 rows.*column=id, column=text"):
        windows(documents_of([f"hf:{folders['parquet']},column=none"]), byte_tokenizer(), 32)


def test_a_damaged_file_an_empty_folder_and_an_unknown_name_are_said(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(FileError, match="cannot read the dataset"):
        DatasetText(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="doesn't contain any data files"):
        DatasetText(str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileError, match="cannot read the dataset nobody/nothing.*hub can be reached"):
        DatasetText("nobody/nothing")


def test_a_dataset_is_read_alone(folders, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ArgumentError, match="read alone"):
        documents_of([tmp_path / "a.txt", f"hf:{folders['jsonl']}"])


def test_without_the_package_the_error_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # Python's own way to forbid an import
    with pytest.raises(ArgumentError, match=r"pip install 'saehook\[datasets\]'"):
        documents_of([f"hf:{folders['jsonl']}"])
