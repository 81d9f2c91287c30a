"""Probe tasks: two-class questions about the end of a text, with answers that are certain.

A file of tasks has one example a line, `{"text": "def f(", "labels": {"in_brackets": true, "in_string": false}}`: what is asked
about is the place behind the last character. `make_tasks` makes such tasks from Python source, where `tokenize` and `ast`
know the answers, and from prose, where quotation marks and full stops do.
"""

from __future__ import annotations

import json
import random
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from saehook.corpus import Document
from saehook.errors import FileError
from saehook.suite.text_labels import prose_labels, python_labels

EXAMPLE_CHARACTERS = 240
"""Characters before the place that an example keeps."""


@dataclass(frozen=True)
class ProbeTask:
    """One question."""

    name: str
    texts: list[str]
    labels: list[bool]
    """Whether it is so behind each text."""


def read_tasks(path: str | Path) -> list[ProbeTask]:
    """The tasks of a JSON-lines file, in the order in which they first occur.

    Raises:
        FileError: the file cannot be read, or a line is no example; its number is named.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read the probe tasks {path}: {error}.") from None
    tasks: dict[str, ProbeTask] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        example = _example(line)
        if example is None:
            raise FileError(
                f"line {number} of {path} is no example of a probe task. Expected is a text and the answers to one or more "
                'questions: {"text": "def f(", "labels": {"in_brackets": true}}.'
            )
        text, labels = example
        for name, label in labels.items():
            task = tasks.setdefault(name, ProbeTask(name, [], []))
            task.texts.append(text)
            task.labels.append(label)
    return list(tasks.values())


def _example(line: str) -> tuple[str, dict[str, bool]] | None:
    """Text and answers of a line; None if it has none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    text, labels = (row.get("text"), row.get("labels")) if isinstance(row, dict) else (None, None)
    if not isinstance(text, str) or not text or not isinstance(labels, dict) or not labels:
        return None
    return (text, labels) if all(isinstance(label, bool) for label in labels.values()) else None


def tasks_to_json_lines(tasks: Iterable[ProbeTask]) -> str:
    """The tasks as a file for `read_tasks`, one line for each text."""
    rows: dict[str, dict[str, bool]] = {}
    for task in tasks:
        for text, label in zip(task.texts, task.labels, strict=True):
            rows.setdefault(text, {})[task.name] = label
    lines = (json.dumps({"text": text, "labels": labels}, ensure_ascii=False) for text, labels in rows.items())
    return "".join(f"{line}\n" for line in lines)


def make_tasks(documents: Iterable[Document], *, examples: int = 800, seed: int = 0) -> list[ProbeTask]:
    """Tasks from documents: those about Python from sources that parse, those about prose from the others. No text occurs twice
    in a task, and none whose end is followed by one answer here and by the other there.

    Args:
        examples: of each task, as many of each class as of the other; a task for which there are not half as many is left
            out.
    """
    draw = random.Random(seed)
    documents = list(documents)
    most = max(1000, 60_000 // max(1, len(documents)))
    places: dict[str, tuple[list[tuple[str, int]], list[tuple[str, int]]]] = {}
    """By task: (document, place) without and with."""
    for document in documents:
        if document.name.endswith(".py"):
            try:
                labelled = python_labels(document.text)
            except (SyntaxError, ValueError, tokenize.TokenError):
                continue
        else:
            labelled = prose_labels(document.text)
        for place, labels in draw.sample(labelled, min(most, len(labelled))):
            for name, label in labels.items():
                places.setdefault(name, ([], []))[label].append((document.text, place))
    tasks = []
    for name, classes in places.items():
        no, yes = (
            dict.fromkeys(text[max(0, end - EXAMPLE_CHARACTERS) : end] for text, end in group) for group in classes
        )
        both = no.keys() & yes.keys()  # what comes before the place does not tell
        texts = [[text for text in group if text not in both] for group in (no, yes)]
        each = min(examples // 2, *map(len, texts))
        if each < examples // 4:
            continue
        drawn = [(text, bool(label)) for label, group in enumerate(texts) for text in draw.sample(group, each)]
        draw.shuffle(drawn)
        tasks.append(ProbeTask(name, [text for text, _ in drawn], [label for _, label in drawn]))
    return tasks
