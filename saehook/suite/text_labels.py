"""What is certain about places in a text: in Python source by `tokenize` and `ast`, in prose by quotation marks and stops."""

from __future__ import annotations

import ast
import bisect
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Sequence

FIRST_CHARACTER = 60
"""Places before this one of a document are not used: too little stands before them."""


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
