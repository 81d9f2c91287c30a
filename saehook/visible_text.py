"""Text as it can be shown: line ends, control characters and lone bytes become visible; nothing is interpreted."""

from __future__ import annotations

import functools
import unicodedata
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def visible_token(tokenizer: Any, token: int) -> str:
    """One token: ↵ before a line end, <0xE2> for bytes that are no character by themselves."""
    text = tokenizer.decode([token])
    if REPLACEMENT in text or not text:
        text = _raw_bytes(tokenizer.convert_ids_to_tokens(token)) or f"<id {token}>"
    return visible(text).replace("\n", "↵\n")


def visible(text: str) -> str:
    """Control and direction characters by name; tabs and line ends stay."""
    return "".join(char if char in "\n\t" or not _hidden(char) else f"<U+{ord(char):04X}>" for char in text)


def one_line(text: str) -> str:
    """A token inside a table: line ends and the spaces around it are visible."""
    body = text.strip(" ")
    before = len(text) - len(text.lstrip(" ")) if body else len(text)
    after = len(text) - before - len(body)
    return "·" * before + body.replace("↵\n", "↵").replace("\n", "↵").replace("\t", "⇥") + "·" * after


def _hidden(char: str) -> bool:
    return unicodedata.category(char) in {"Cc", "Cf", "Cs", "Co", "Cn"}


def _raw_bytes(token: str) -> str:
    """`<0xE2>` for each byte of a token, known characters as they are."""
    if token.startswith("<0x"):  # byte fallback
        return token
    alphabet = _byte_alphabet()
    if not all(char in alphabet for char in token):
        return token
    decoded = bytes(alphabet[char] for char in token).decode("utf-8", "surrogateescape")
    return "".join(f"<0x{ord(char) - 0xDC00:02X}>" if 0xDC80 <= ord(char) <= 0xDCFF else char for char in decoded)


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The characters with which byte-level BPE writes the 256 bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
