"""A conversation as ids, by the tokenizer's chat template, and which message each token belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saehook.errors import ArgumentError


def is_conversation(x: Any) -> bool:
    """Whether this is a list of messages, `{"role": ..., "content": ...}`."""
    return isinstance(x, (list, tuple)) and len(x) > 0 and all(isinstance(message, Mapping) for message in x)


def conversation_ids(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> tuple[list[int], list[str] | None]:
    """Ids of a conversation, and the role of each; None where the template does not show which token is whose.

    The model is to go on as the assistant: after another role's message its header is added, and a last message of the
    assistant is left open. The template's own tokens belong to the message that they announce or end.

    Raises:
        ArgumentError: no chat template, a message without role or content, messages that the template refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError(
            "the input is a conversation, and this tokenizer has no chat template. Give text, or a chat model's tokenizer."
        )
    for message in messages:
        if not isinstance(message.get("role"), str) or "content" not in message:
            raise ArgumentError(f"{dict(message)!r} is no message; expected is {{'role': 'user', 'content': 'text'}}.")
    opened = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=not opened, continue_final_message=opened
        )
    except Exception as error:  # a template raises what it likes
        raise ArgumentError(f"the chat template refuses these messages: {error}") from None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    return encoded["input_ids"], _roles(messages, text, encoded.get("offset_mapping"), tokenizer)


def _roles(messages: Sequence[Mapping[str, Any]], text: str, offsets: Any, tokenizer: Any) -> list[str] | None:
    """The role of each token, by where the text of the first k messages ends."""
    if offsets is None:
        return None
    ends = []
    for k in range(1, len(messages)):
        try:
            part = tokenizer.apply_chat_template(list(messages[:k]), tokenize=False)
        except Exception:
            return None
        if not text.startswith(part) or (ends and len(part) < ends[-1]):
            return None
        ends.append(len(part))
    roles = [message["role"] for message in messages]
    if messages[-1]["role"] != "assistant":
        part = tokenizer.apply_chat_template(list(messages), tokenize=False)
        if not text.startswith(part):
            return None
        ends.append(len(part))
        roles.append("assistant")
    return [roles[sum(start >= end for end in ends)] for start, _ in offsets]
