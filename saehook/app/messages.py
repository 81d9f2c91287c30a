"""Errors of the library as messages that a visitor can read."""

from __future__ import annotations

import contextlib
import html
import logging
from collections.abc import Iterator

import gradio as gr

from saehook.errors import SaehookError

logger = logging.getLogger(__name__)
SECONDS = 20
"""How long a message stays on the page."""


@contextlib.contextmanager
def told_to_the_visitor() -> Iterator[None]:
    """Errors that saehook raises on purpose go to the visitor in full; anything else is logged, and told without detail.

    Gradio shows a message as HTML, so its text is escaped.
    """
    try:
        yield
    except gr.Error:
        raise
    except SaehookError as error:
        raise _message(str(error)) from None
    except Exception:
        logger.exception("a request of the page failed")
        raise _message("The run failed on the server; its log says why. Try other settings.") from None


def _message(text: str) -> gr.Error:
    return gr.Error(html.escape(text, quote=False), duration=SECONDS, print_exception=False)
