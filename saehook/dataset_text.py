"""Text of a Hugging Face dataset, streamed from the hub or from a folder; needs the package `datasets`.

    hf:monology/pile-uncopyrighted
    hf:Salesforce/wikitext,config=wikitext-103-raw-v1,split=test,column=text
    hf:my_folder,column=body,skip=1000,take=500

Rows are documents and come in the order of the dataset. They are not shuffled here: `datasets` forgets the contents of its
shuffle buffer when it is resumed, and the buffer of activations mixes windows anyway. So a reader that is resumed gives
exactly the rows that would have come.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from saehook.config import count
from saehook.corpus import Document, read_documents, text_files
from saehook.errors import ArgumentError
from saehook.hub import PREFIX, hub_errors

OPTIONS = ("config", "split", "column", "skip", "take", "revision")
SYNTAX = f"{PREFIX}NAME{''.join(f'[,{option}=...]' for option in OPTIONS)}"


class DatasetText(Iterable[Document]):
    """One text column of one split; each `iter` reads it anew."""

    def __init__(
        self,
        name: str,
        *,
        config: str | None = None,
        split: str | None = None,
        column: str = "text",
        skip: int = 0,
        take: int | None = None,
        revision: str | None = None,
    ) -> None:
        """Opens it and looks at its first row.

        Args:
            name: a folder that `datasets` can read (also one of its `save_to_disk`), or the name of a dataset on the hub.
            split: by default `train`, or the only one.
            skip, take: leave so many rows at the start out, then read at most so many.
            revision: branch, tag or commit of a dataset on the hub; it is held at the commit found now.

        Raises:
            ArgumentError: `datasets` is not installed; a split or column that does not exist; a column without text.
            FileError: no such dataset, or it cannot be reached or read.
        """
        if skip < 0 or (take is not None and take < 1):
            raise ArgumentError(f"skip={skip}, take={take} leave no row of {name}. Give skip >= 0 and take >= 1.")
        folder = Path(name)
        self.local = folder.is_dir()
        self.name = str(folder.resolve()) if self.local else name
        self.config, self.column, self.skip, self.take, self.revision = config, column, skip, take, revision
        with self.errors():
            splits = self._open()
        if split is None:
            split = "train" if "train" in splits or len(splits) > 1 else next(iter(splits))
        if split not in splits:
            raise ArgumentError(f"{name} has no split {split!r}. Say one of split={', split='.join(splits)}.")
        self.split = split
        self.fingerprint = self._fingerprint()
        """Tells the rows from others without reading them: a sha256 over the options and the commit, or over the names,
        sizes and times of a folder's files."""
        self._dataset = splits[split]
        if skip:
            self._dataset = self._dataset.skip(skip)
        if take is not None:
            self._dataset = self._dataset.take(take)
        self.columns = self._check_first_row()
        self._dataset = self._dataset.select_columns([column])

    @classmethod
    def from_spec(cls, spec: str) -> DatasetText:
        """From a line such as `hf:NAME,split=test,take=10k`.

        Raises:
            ArgumentError: it is not written as `SYNTAX` says; and what the class raises.
        """
        name, *pairs = spec.removeprefix(PREFIX).split(",")
        options: dict[str, Any] = {}
        for pair in pairs:
            key, _, value = pair.strip().partition("=")
            options[key] = count(value) if value and key in ("skip", "take") else value
        if not name or "" in options.values() or not options.keys() <= set(OPTIONS):
            raise ArgumentError(f"{spec!r} is not understood; expected {SYNTAX}.")
        return cls(name, **options)

    @property
    def spec(self) -> str:
        """The line that opens the same rows again, from any folder: with the whole path, or the commit."""
        options = {option: getattr(self, option) for option in OPTIONS}
        return PREFIX + ",".join([self.name, *(f"{key}={value}" for key, value in options.items() if value)])

    @property
    def facts(self) -> dict[str, Any]:
        """Where the text comes from, for the files of SAEs; of a folder the last name."""
        name = Path(self.name).name if self.local else self.name
        options = {option: getattr(self, option) for option in OPTIONS}
        return {
            "name": name,
            **{key: value for key, value in options.items() if value},
            "fingerprint": self.fingerprint,
        }

    def _fingerprint(self) -> str:
        source: Any = [self.name, self.revision]
        if self.local:
            root = Path(self.name)
            files = [file for file in sorted(root.rglob("*")) if file.is_file() and not file.name.startswith(".")]
            source = [(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        facts = [source, self.config, self.split, self.column, self.skip, self.take]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def __iter__(self) -> Reader:
        return Reader(self, copy.deepcopy(self._dataset))  # the place lies in the dataset itself

    def _open(self) -> dict[str, Any]:
        """Streamed datasets by split."""
        try:
            from datasets import DatasetDict, load_dataset_builder, load_from_disk
        except ImportError as error:
            raise ArgumentError(
                f"text of a dataset ({PREFIX}{self.name}) needs the package datasets ({error}). "
                "Install it: pip install 'saehook[datasets]'."
            ) from None
        if self.local and any((Path(self.name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            saved = load_from_disk(self.name)
            saved = saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
            return {str(split): part.to_iterable_dataset() for split, part in saved.items()}
        if not self.local:
            from huggingface_hub import HfApi

            self.revision = HfApi().dataset_info(self.name, revision=self.revision).sha
        builder = load_dataset_builder(self.name, self.config, revision=self.revision)
        splits: Any = builder.as_streaming_dataset()
        return dict(splits)

    def _check_first_row(self) -> list[str]:
        """The columns; raises ArgumentError where `column` is none of them, or holds no text."""
        with self.errors():
            first = next(iter(copy.deepcopy(self._dataset)), None)
        if first is None:
            raise ArgumentError(f"{self.name} has no row in split {self.split!r} after skip={self.skip}.")
        if self.column not in first:
            raise ArgumentError(
                f"{self.name} has no column {self.column!r}. Say which holds the text: column={', column='.join(first)}."
            )
        if not isinstance(value := first[self.column], str | None):
            raise ArgumentError(
                f"the column {self.column!r} of {self.name} holds {type(value).__name__}, no text. "
                f"Its columns are {', '.join(first)}."
            )
        return list(first)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """What goes wrong with the dataset, as FileError."""
        check = (
            f"Check the name, config= and revision=, and that the hub can be reached; {PREFIX}FOLDER reads files on "
            "this machine."
        )
        with hub_errors(f"read the dataset {self.name}", check):
            yield


class Reader(Iterator[Document]):
    """One pass over a `DatasetText`; rows without text are left out."""

    def __init__(self, text: DatasetText, dataset: Any) -> None:
        self.text = text
        self.row = 0
        """Rows read, with those that are empty."""
        self.found = 0
        """Documents read."""
        self._dataset = dataset
        self._rows: Iterator[dict[str, Any]] | None = None
        self._loaded: dict[str, Any] | None = None
        """The place to begin at; the dataset itself tells it only once it has given a row."""

    def __next__(self) -> Document:
        """Raises ArgumentError where no row holds text."""
        text = self.text
        with text.errors():
            if self._rows is None:
                if self._loaded is not None:
                    self._dataset.load_state_dict(self._loaded)
                self._rows = iter(self._dataset)
            for row in self._rows:
                self.row += 1
                value = row[text.column]
                if value and value.strip():
                    self.found += 1
                    return Document(f"{Path(text.name).name}:{text.skip + self.row}", value)
        if not self.found:
            raise ArgumentError(
                f"the column {text.column!r} of {text.name} is empty in all of {self.row:,} rows. "
                f"Say which holds the text: column={', column='.join(text.columns)}."
            )
        raise StopIteration

    def state(self) -> dict[str, Any]:
        """The place, as JSON-able data."""
        place = self._dataset.state_dict() if self._rows is not None else self._loaded
        return {"row": self.row, "found": self.found, "dataset": place}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; nothing must have been read yet."""
        self.row, self.found = state["row"], state["found"]
        self._loaded = state["dataset"]


def documents_of(texts: Sequence[str | Path]) -> list[Document] | DatasetText:
    """What the names on a command line mean: files and folders (`corpus.read_documents`), or one dataset, `SYNTAX`.

    Raises:
        ArgumentError: a dataset beside other texts.
        FileError: something that cannot be read; also what `DatasetText` raises.
    """
    if not any(str(text).startswith(PREFIX) for text in texts):
        return list(read_documents(text_files(texts)))
    if len(texts) > 1:
        raise ArgumentError(
            f"a dataset is read alone, but {len(texts)} texts are given. Give {texts[0]} or the others."
        )
    return DatasetText.from_spec(str(texts[0]))
