"""Probe tasks: two-class questions about the end of a text, with answers that are certain.

A file of tasks has one example a line, `{"text": "def f(", "labels": {"in_brackets": true, "in_string": false}}`: what is asked
about is the place behind the last character. `make_tasks` makes such tasks from Python source, where `tokenize` and `ast`
know the answers, and from prose, where quotation marks and full stops do.
"""

from __future__ import annotations

import ast
import bisect
import io
import json
import random
import re
import tokenize
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from saehook.corpus import Document
from saehook.errors import FileError

EXAMPLE_CHARACTERS = 240
"""Characters before the place that an example keeps."""
FIRST_CHARACTER = 60
"""Places before this one of a document are not used: too little stands before them."""


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
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        text, labels = (row.get("text"), row.get("labels")) if isinstance(row, dict) else (None, None)
        good = isinstance(text, str) and text and isinstance(labels, dict) and labels
        if not good or not all(isinstance(label, bool) for label in labels.values()):
            raise FileError(
                f"line {number} of {path} is no example of a probe task. Expected is a text and the answers to one or more "
                'questions: {"text": "def f(", "labels": {"in_brackets": true}}.'
            )
        for name, label in labels.items():
            task = tasks.setdefault(name, ProbeTask(name, [], []))
            task.texts.append(text)
            task.labels.append(label)
    return list(tasks.values())


def tasks_to_json_lines(tasks: Iterable[ProbeTask]) -> str:
    """The tasks as a file for `read_tasks`, one line for each text."""
    rows: dict[str, dict[str, bool]] = {}
    for task in tasks:
        for text, label in zip(task.texts, task.labels, strict=True):
            rows.setdefault(text, {})[task.name] = label
    lines = (json.dumps({"text": text, "labels": labels}, ensure_ascii=False) for text, labels in rows.items())
    return "".join(f"{line}\n" for line in lines)


def make_tasks(documents: Iterable[Document], *, examples: int = 400, seed: int = 0) -> list[ProbeTask]:
    """Tasks from documents: those about Python from sources that parse, those about prose from the others.

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
        each = min(examples // 2, *map(len, classes))
        if each < examples // 4:
            continue
        drawn = [(text, end, label) for label, group in enumerate(classes) for text, end in draw.sample(group, each)]
        draw.shuffle(drawn)
        texts = [text[max(0, end - EXAMPLE_CHARACTERS) : end] for text, end, _ in drawn]
        tasks.append(ProbeTask(name, texts, [bool(label) for _, _, label in drawn]))
    return tasks


# --- Python -----------------------------------------------------------------------------------------------------------


class _Spans:
    """Stretches of a text, [start, end) in characters, that may lie within one another."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self.spans = sorted(spans)
        self.starts = [start for start, _ in self.spans]
        self.ends: list[int] = []  # the largest end so far
        for _, end in self.spans:
            self.ends.append(max(end, self.ends[-1]) if self.ends else end)

    def around(self, place: int) -> bool:
        """Whether a stretch begins before the place and ends behind it: the place is strictly inside."""
        before = bisect.bisect_left(self.starts, place)
        return before > 0 and self.ends[before - 1] > place


def python_labels(source: str) -> list[tuple[int, dict[str, bool]]]:
    """Places behind words and signs of a Python source, in characters, with the answers of all tasks there.

    Raises:
        SyntaxError, ValueError, tokenize.TokenError: it is no Python of this version.
    """
    tree = ast.parse(source)
    lines = [0]
    for line in io.StringIO(source):
        lines.append(lines[-1] + len(line))
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))

    def place(row: int, column: int) -> int:
        return lines[row - 1] + column

    def node_span(node: ast.AST) -> tuple[int, int]:
        def characters(row: int, column: int) -> int:  # ast counts columns in bytes
            return len(source[lines[row - 1] : lines[row]].encode()[:column].decode(errors="ignore"))

        start, end = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        return place(start[0], characters(*start)), place(end[0], characters(*end))

    def of_kind(*kinds: str) -> list[tuple[int, int]]:
        return [(place(*t.start), place(*t.end)) for t in tokens if tokenize.tok_name[t.type] in kinds]

    strings = of_kind("STRING") + _nested(tokens, place)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [
        node_span(node.body[0])
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None
    ]

    def bodies(*kinds: type[ast.AST]) -> _Spans:
        found = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        spans = [(node_span(node.body[0])[0], node_span(node.body[-1])[1]) for node in found]  # type: ignore[attr-defined]
        return _Spans(spans)

    in_string, in_comment, in_docstring = _Spans(strings), _Spans(of_kind("COMMENT")), _Spans(docstrings)
    in_class, in_loop = bodies(ast.ClassDef), bodies(ast.For, ast.While, ast.AsyncFor)
    in_try, in_call = bodies(ast.Try), _Spans(_call_brackets(tree, source, node_span))
    facts = _logical_lines(tokens, place)
    starts = [start for start, _ in facts]
    quoted = _Spans(strings + of_kind("COMMENT"))
    following = sorted((place(*t.start), t) for t in tokens if t.type not in _NOT_CODE)
    following_starts = [start for start, _ in following]
    labelled = []
    for match in re.finditer(r"\w+|[^\w\s]", source):
        end = match.end()
        fact = bisect.bisect_right(starts, match.start()) - 1
        if end < FIRST_CHARACTER or fact < 0 or end >= len(source):
            continue
        labels = {
            "in_string": in_string.around(end),
            "in_docstring": in_docstring.around(end),
            "in_comment": in_comment.around(end),
        }
        if not quoted.around(end):
            after = bisect.bisect_left(following_starts, end)
            head, depth = facts[fact][1]
            labels |= {
                "line_defines_function": head in ("def", "async"),
                "line_imports": head in ("import", "from"),
                "line_returns": head in ("return", "raise", "yield"),
                "deeply_indented": depth >= 3,
                "in_class": in_class.around(end),
                "in_loop": in_loop.around(end),
                "in_try": in_try.around(end),
                "in_call": in_call.around(end),
            }
            if after < len(following):
                labels["next_closes_bracket"] = following[after][1].string in (")", "]", "}")
                labels["next_ends_line"] = following[after][1].type == tokenize.NEWLINE
        labelled.append((end, labels))
    return labelled


_NOT_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)


def _nested(tokens: Sequence[tokenize.TokenInfo], place: Callable[[int, int], int]) -> list[tuple[int, int]]:
    """F-strings, which are several tokens from Python 3.12 on."""
    spans, open_at = [], []
    for token in tokens:
        name = tokenize.tok_name[token.type]
        if name in ("FSTRING_START", "TSTRING_START"):
            open_at.append(place(*token.start))
        elif name in ("FSTRING_END", "TSTRING_END"):
            spans.append((open_at.pop(), place(*token.end)))
    return spans


def _call_brackets(
    tree: ast.AST, source: str, node_span: Callable[[ast.AST], tuple[int, int]]
) -> list[tuple[int, int]]:
    """From the opening bracket of each call to its closing one."""
    spans = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            behind_name = node_span(node.func)[1]
            spans.append((source.index("(", behind_name), node_span(node)[1]))
    return spans


def _logical_lines(
    tokens: Sequence[tokenize.TokenInfo], place: Callable[[int, int], int]
) -> list[tuple[int, tuple[str, int]]]:
    """Where each logical line begins, its first word and the depth of its indentation."""
    found, depth, fresh = [], 0, True
    for token in tokens:
        if token.type == tokenize.INDENT:
            depth += 1
        elif token.type == tokenize.DEDENT:
            depth -= 1
        elif token.type == tokenize.NEWLINE:
            fresh = True
        elif fresh and token.type not in _NOT_CODE and token.type != tokenize.ENDMARKER:
            found.append((place(*token.start), (token.string, depth)))
            fresh = False
    return found


# --- prose ------------------------------------------------------------------------------------------------------------


_PAIRS = {"“": "”", '"': '"'}


def prose_labels(text: str) -> list[tuple[int, dict[str, bool]]]:
    """Places behind words of a text, in characters, with the answers there.

    Only paragraphs whose double quotation marks come in pairs are used; where there are none, no word is in dialogue.
    """
    labelled = []
    for paragraph in re.finditer(r"(?:[^\n]|\n(?!\s*\n))+", text):
        body, offset = paragraph.group(), paragraph.start()
        spans = _quotes(body)
        if spans is None:
            continue
        quotes = _Spans(spans)
        ends = [match.end() for match in re.finditer(r"[.!?][”\"’')]*(?=\s|$)", body)]
        for match in re.finditer(r"[^\W\d_]+", body):
            end = match.end()
            if offset + end < FIRST_CHARACTER or end >= len(body):
                continue
            sentence = bisect.bisect_left(ends, end)
            begins = ends[sentence - 1] if sentence else 0
            words_before = len(re.findall(r"\w+", body[begins : match.start()]))
            labels = {
                "in_dialogue": quotes.around(end),
                "next_ends_sentence": body[end] in ".!?",
                "next_is_comma": body[end] == ",",
                "starts_sentence": words_before < 3,
            }
            if words_before:
                labels["is_name"] = match.group()[0].isupper() and len(match.group()) > 1
            if sentence < len(ends):
                labels["in_question"] = "?" in body[ends[sentence] - 3 : ends[sentence]]
            labelled.append((offset + end, labels))
    return labelled


def _quotes(paragraph: str) -> list[tuple[int, int]] | None:
    """The stretches between double quotation marks; None where they are not in pairs."""
    spans, closing, start = [], "", 0
    for i, character in enumerate(paragraph):
        if closing and character == closing:
            spans.append((start, i + 1))
            closing = ""
        elif character in _PAIRS and not closing:
            closing, start = _PAIRS[character], i
        elif character in "“”":
            return None
    return None if closing else spans
