"""The live page: read a text's latents, edit them, watch the model write. No maths here: numbers come from `saehook`.

Importing this loads Gradio, with its telemetry switched off first.
"""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Gradio sums up all past events with pandas after each event, for a monitoring page that is off here.
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", str(10**9))

from saehook.app.limits import Limits  # noqa: E402
from saehook.app.page import build_app  # noqa: E402
from saehook.app.server import serve  # noqa: E402

__all__ = ["Limits", "build_app", "serve"]
