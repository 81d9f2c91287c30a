"""Text on the machine, and text given by path."""

import gzip
import json
import subprocess
import sys

import pytest

from saehook import corpus
from saehook.errors import FileError


def test_held_out_modules_are_whole_and_not_in_the_training_files():
    held_out = corpus.held_out_files()
    assert [file.stem for file in held_out] == [name.rsplit(".", 1)[-1] for name in corpus.HELD_OUT_MODULES]
    training = corpus.python_files()
    assert len(training) > 500
    texts = {file.read_bytes() for file in held_out}
    assert not texts & {file.read_bytes() for file in training}, "a copy of a held-out module is trained on"
    assert len({file.read_bytes() for file in training}) == len(training), "duplicates"


def test_text_files_expands_folders_and_keeps_files(tmp_path):
    for name in ("b.txt", "a.jsonl", "c.bin"):
        (tmp_path / name).write_text("x")
    assert [f.name for f in corpus.text_files([tmp_path])] == ["a.jsonl", "b.txt"]
    assert corpus.text_files([tmp_path / "c.bin"]) == [tmp_path / "c.bin"]


def test_missing_path_and_empty_folder_are_errors(tmp_path):
    with pytest.raises(FileError, match="nowhere"):
        corpus.text_files([tmp_path / "nowhere"])
    with pytest.raises(FileError, match=r"holds no \.txt"):
        corpus.text_files([tmp_path])


def test_a_file_is_a_document_and_a_json_line_is_a_document(tmp_path):
    (tmp_path / "one.txt").write_text("first\nsecond")
    (tmp_path / "many.jsonl").write_text('{"text": "a", "id": 1}\n\n{"text": "b"}\n{"text": "  "}\n')
    documents = list(corpus.read_documents([tmp_path / "one.txt", tmp_path / "many.jsonl"]))
    assert documents == [("one.txt", "first\nsecond"), ("many.jsonl:1", "a"), ("many.jsonl:3", "b")]


def test_json_lines_end_at_line_feeds_only_and_may_be_compressed(tmp_path):
    lines = '\ufeff{"text": "one\u2028line\u0085"}\r\n{"text": "two"}\n'
    (tmp_path / "a.jsonl").write_bytes(lines.encode())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    documents = list(corpus.read_documents(corpus.text_files([tmp_path])))
    assert [d.text for d in documents] == ["one\u2028line\u0085", "two"] * 2
    assert documents[3].name == "b.jsonl.gz:2"
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-9])
    with pytest.raises(FileError, match="cannot read the text file .*gz"):
        list(corpus.read_documents([tmp_path / "b.jsonl.gz"]))


def test_another_field_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "body": "words"}\n')
    with pytest.raises(FileError, match="line 1 .*its fields are id, body.*hf:FOLDER,column=FIELD"):
        list(corpus.read_documents([tmp_path / "a.jsonl"]))


@pytest.mark.parametrize("line", ["not json", '["text"]', '{"body": "x"}', '{"text": 3}', "null"])
def test_a_bad_json_line_is_named(tmp_path, line):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(FileError, match="line 2 of .*bad.jsonl"):
        list(corpus.read_documents([file]))


def test_bytes_that_are_no_utf8_are_replaced(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert next(corpus.read_documents([tmp_path / "latin.txt"])).text == "caf�"


def test_text_hash_sees_order_and_borders_but_not_names():
    def digest(*texts):
        return corpus.text_hash(corpus.Document(str(i), text) for i, text in enumerate(texts))

    assert digest("a", "b") != digest("b", "a")
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("a") == corpus.text_hash([corpus.Document("another name", "a")])


def test_corpus_needs_the_standard_library_only():
    code = "import saehook.corpus, sys, json; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"torch", "numpy", "transformers"} & set(modules)
