"""Text of datasets: real `datasets`, on folders made here."""

import json
from pathlib import Path

import datasets
import pyarrow
import pytest
from builders import byte_tokenizer
from pyarrow import parquet

from saehook.dataset_text import DatasetText, documents_of
from saehook.harvest import TextStream

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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
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
    """At every window, and again after it was resumed: exactly those that would have come."""
    tokenizer = byte_tokenizer()
    text = DatasetText(str(folders[kind]), skip=2, take=50)

    def stream() -> TextStream:
        return TextStream(text, tokenizer, 32, repeat=repeat, seed=3)

    whole = stream()
    expected = []
    while len(expected) < 100 and (window := next(whole, None)) is not None:
        expected.append(window.tolist())
    assert whole.passes >= 1 if repeat else 30 < len(expected) < 100
    going = stream()
    got = []
    for _ in expected:
        fresh = stream()
        fresh.load_state(json.loads(json.dumps(going.state())))
        assert fresh.state() == going.state()
        going = fresh
        got.append(next(going).tolist())
    assert got == expected
    assert going.read == whole.read
    assert repeat or next(going, None) is None
