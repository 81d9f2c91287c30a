"""What is refused before Gradio sees it, with a reason that its page would not give."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.responses import JSONResponse

from saehook.app.limits import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
SUFFIXES = (".safetensors", ".json")
"""Of files that may be uploaded: nothing in them can run."""
FRAME_BYTES = 2**16
"""Of an upload, beside its files."""


class Refusals:
    """Refuses uploads, or those that the page does not take; and says how full a full queue is."""

    def __init__(self, app: Any, limits: Limits, uploads: bool = False) -> None:
        self.app, self.limits, self.uploads = app, limits, uploads

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        path = scope.get("path", "").rstrip("/")
        if scope["type"] == "http" and path.endswith("/upload"):
            await self._upload(scope, receive, send)
        elif scope["type"] == "http" and path.endswith("/queue/join"):
            await self._join(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _upload(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        size, most = headers.get(b"content-length", "some")[:20], self.limits.upload_bytes
        if not self.uploads:
            says = f"A file of {size} bytes was sent; this page takes 0: it has no uploads."
        elif not size.isdecimal() or int(size) > most + FRAME_BYTES:
            says = f"Files of {size} bytes were sent; this page takes {most}."
        else:
            names = _Names(headers.get(b"content-type", ""))

            async def looked_at() -> Message:
                message = await receive()
                names.look(message.get("body", b""))
                return message

            try:
                await self.app(scope, looked_at, send)
            except _RefusedName as refused:
                says = f"A file {refused.args[0]!r:.100} was sent; this page takes {' and '.join(SUFFIXES)} only."
                await JSONResponse({"detail": says}, 415)(scope, receive, send)
            return
        await JSONResponse({"detail": says}, 413)(scope, receive, send)

    async def _join(self, scope: Message, receive: Receive, send: Send) -> None:
        full = False

        async def told(message: Message) -> None:
            nonlocal full
            full = full or message.get("status") == 503
            if not full:
                await send(message)

        await self.app(scope, receive, told)
        if full:  # at 503 the browser shows a sentence of its own
            n = self.limits.queue
            says = f"The model is busy: {n} requests wait for it, and this page lets {n} wait. Try again in a moment."
            await JSONResponse({"detail": says}, 429)(scope, receive, send)


class _RefusedName(Exception):
    """A file that is not taken; none of its bytes was passed on."""


class _Names:
    """Looks at the names of files in a multipart body while it passes."""

    def __init__(self, content_type: str) -> None:
        self._field, self._value = b"", b""
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        self._parser = None
        if boundary:  # without one Gradio refuses it
            self._parser = MultipartParser(
                boundary,
                {
                    "on_header_field": self._on_field, "on_header_value": self._on_value, "on_header_end": self._on_end
                },
            )  # fmt: skip

    def look(self, body: bytes) -> None:
        """At some more of it.

        Raises:
            _RefusedName: it holds a file of another kind.
        """
        if self._parser is not None and body:
            self._parser.write(body)

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            name = options.get(b"filename")
            if name is not None and not name.lower().endswith(tuple(suffix.encode() for suffix in SUFFIXES)):
                raise _RefusedName(name.decode("utf-8", "replace"))
        self._field, self._value = b"", b""
