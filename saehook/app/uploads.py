"""SAEs that visitors bring: read safely, attached for the visitor who sent them only, and gone with the visitor."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gradio.context import LocalContext
from gradio.utils import get_upload_folder

from saehook.app.limits import Limits
from saehook.app.refusals import SUFFIXES
from saehook.checkpoint import load_sae
from saehook.errors import ArgumentError, FileError
from saehook.hooked_saes import HookedSAEs
from saehook.sae import SAE
from saehook.sites import resolve

IDLE_SECONDS = 3600
"""After so long without a request an SAE may give way to another visitor's."""


class Uploads:
    """Which model with which SAEs a request runs: the one that is served, or one with the visitor's own SAE besides.

    The language model is one and the same; attaching puts nothing on it that a run without that SAE would meet.
    """

    def __init__(self, served: HookedSAEs, limits: Limits, folder: str | Path | None = None) -> None:
        """`folder`: where uploaded files lie; None: where Gradio puts them."""
        self.served, self.limits = served, limits
        self.folder = Path(folder or get_upload_folder())
        self._own: dict[str, HookedSAEs] = {}
        self._used: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def hooked(self) -> HookedSAEs:
        """That of the visitor whose request runs in this thread."""
        visitor = _visitor()
        with self._lock:
            if visitor in self._own:
                self._used[visitor] = time.monotonic()
            return self._own.get(visitor, self.served)

    def attach(self, files: Sequence[str], site: str = "") -> tuple[HookedSAEs, str]:
        """Read an SAE from uploaded files and attach it for this visitor, beside the served ones or in place of that at its site.
        The files are deleted.

        Args:
            site: where it belongs; "": where its configuration says.

        Returns:
            The model with it, and its name there.

        Raises:
            ArgumentError: no files, files of another kind, no visitor, or too many visitors have one.
            FileError, FormatError: what `load_sae` raises. SiteError, ShapeError: it does not fit the model.
        """
        visitor = _visitor()
        if not visitor:
            raise ArgumentError("The request names no visitor to attach an SAE for. Reload the page.")
        sae = read_upload(files, self.folder)
        found = resolve(self.served.lm, site or sae.site or "")
        if len(found) != 1:
            raise ArgumentError(
                f"{site or sae.site!r} names {len(found)} sites; one is expected. Write the site where the SAE belongs."
            )
        name = found[0].name
        places: dict[Any, list[SAE]] = {}
        for one in self.served.attached.values():
            if one.reads != name:
                places.setdefault((one.reads, one.writes) if one.sae.is_transcoder else one.reads, []).append(one.sae)
        places[(name, sae.site_out) if sae.is_transcoder and sae.site_out else name] = [sae]
        hooked = self.served.model.attach(places)
        try:
            with self._lock:
                gone = self._make_room(visitor)
                self._own[visitor], self._used[visitor] = hooked, time.monotonic()
        except ArgumentError:
            hooked.detach()
            raise
        for one in gone:  # not under the lock: it waits for a run that is on its way
            one.detach()
        return hooked, name

    def detach(self, visitor: str | None = None) -> None:
        """The visitor, None: whose request this is, has the served SAEs again, or has left."""
        visitor = visitor or _visitor()
        with self._lock:
            before = self._own.pop(visitor, None)
            self._used.pop(visitor, None)
        if before is not None:
            before.detach()

    def _make_room(self, visitor: str) -> list[HookedSAEs]:
        """What has to go for one more.

        Raises:
            ArgumentError: all places are in use.
        """
        others = {one: when for one, when in self._used.items() if one != visitor}
        leaving = [visitor] if visitor in self._own else []
        if len(others) >= self.limits.uploads:
            oldest = min(others, key=lambda one: others[one])
            if time.monotonic() - others[oldest] < IDLE_SECONDS:
                raise ArgumentError(
                    f"{len(others)} visitors have an SAE of their own attached; this page holds {self.limits.uploads}. Try "
                    "again when one of them has left."
                )
            leaving.append(oldest)
        for one in leaving:
            del self._used[one]
        return [self._own.pop(one) for one in leaving]


def read_upload(files: Sequence[str], folder: Path) -> SAE:
    """The SAE in uploaded files, which are moved to a temporary folder, read, and deleted, whatever comes of it.

    Args:
        folder: where uploads lie. A file elsewhere is none, and is neither opened nor moved.

    Raises:
        ArgumentError: not one configuration and its weights. FileError: they are gone, or lie elsewhere.
        FormatError: what `load_sae` raises.
    """
    paths = [Path(file).resolve() for file in files]
    if not all(path.is_relative_to(folder.resolve()) for path in paths):
        raise FileError("a file that was not uploaded to this page was named. Upload the files.")
    names = [re.sub(r"[^\w.-]", "_", path.name) for path in paths]
    with tempfile.TemporaryDirectory(prefix="saehook-upload-") as place, _deleted(paths):
        kinds = [path.suffix.lower() for path in paths]
        if kinds.count(".json") != 1 or kinds.count(".safetensors") < 1 or not set(kinds) <= set(SUFFIXES):
            raise ArgumentError(
                f"{len(paths)} files were sent: {', '.join(names)[:200] or 'none'}; the SAE's cfg.json is expected, its "
                "weights as .safetensors, and its stats.safetensors if it has them."
            )
        if len(set(names)) < len(names):
            raise ArgumentError(f"two files have the same name: {', '.join(names)[:200]}.")
        for path, name in zip(paths, names, strict=True):
            try:
                shutil.move(path, Path(place) / name)
            except OSError:
                raise FileError("the uploaded files are not there any more. Upload them once more.") from None
        sae = load_sae(place)
        for parameter in sae.parameters():
            parameter.data = parameter.data.clone()  # it may be a map of the file
    sae.source = None
    return sae


@contextlib.contextmanager
def _deleted(uploaded: Sequence[Path]) -> Iterator[None]:
    """In the end these files are gone, and with each the folder that holds nothing else."""
    try:
        yield
    finally:
        for path in uploaded:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def _visitor() -> str:
    """Which page of which browser the request comes from; "" where there is no request."""
    return str(getattr(LocalContext.request.get(None), "session_hash", None) or "")
