"""Files on the Hugging Face Hub: `hf:owner/name[,revision=..]`. Names, downloads with a size limit, one commit to upload."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from saehook.errors import ArgumentError, FileError, FormatError, SaehookError

PREFIX = "hf:"
CHECK = (
    "Check the name and revision, that the hub can be reached, and for a private repository that you are logged in "
    "(hf auth login)."
)


class HubPlace(NamedTuple):
    """A repository, at one of its commits, and a folder in it."""

    repo: str
    """`owner/name`."""
    revision: str | None = None
    """Branch, tag or commit; None: the newest."""
    path: str | None = None
    """Folder in the repository; None: its top."""

    @property
    def name(self) -> str:
        """As `parse` reads it, without the folder."""
        return f"{PREFIX}{self.repo}" + (f",revision={self.revision}" if self.revision else "")


def is_hub_name(text: object) -> bool:
    """Whether that begins as a name on the hub does."""
    return isinstance(text, str) and text.startswith(PREFIX)


def is_repo(name: str) -> bool:
    """Whether that has the form `owner/name`, as far as no folder of this machine has it."""
    return name.count("/") == 1 and all(name.split("/")) and name[0] not in "./~" and not Path(name).exists()


def parse(text: str) -> HubPlace:
    """The place of `hf:owner/name[,revision=..]`.

    Raises:
        ArgumentError: another form.
    """
    repo, *options = text.removeprefix(PREFIX).split(",")
    found = {name: value for name, _, value in (option.partition("=") for option in options)}
    if repo.count("/") != 1 or not all(repo.split("/")) or set(found) - {"revision"} or "" in found.values():
        raise ArgumentError(f"{text!r} is no name on the hub; {PREFIX}owner/name[,revision=..] is expected.")
    return HubPlace(repo, found.get("revision"))


def place_of(folder: Path) -> HubPlace | None:
    """Where a folder of the hub's cache on this machine comes from; None for another folder."""
    parts = folder.absolute().parts
    for i, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[i + 1] == "snapshots":
            repo = part.removeprefix("models--").replace("--", "/")
            return HubPlace(repo, parts[i + 2], "/".join(parts[i + 3 :]) or None)
    return None


def download(place: HubPlace, file: str, *, max_bytes: int | None = None) -> Path:
    """The file in the hub's cache on this machine, fetched where it is not there.

    Raises:
        FormatError: it has more than `max_bytes`; nothing is fetched then.
        FileError: it cannot be had.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.constants import HF_HUB_OFFLINE

    file = f"{place.path}/{file}" if place.path else file
    with hub_errors(f"read {file} of {place.name}", CHECK):
        if max_bytes is not None and not HF_HUB_OFFLINE:
            size = get_hf_file_metadata(hf_hub_url(place.repo, file, revision=place.revision)).size or 0
            if size > max_bytes:
                raise FormatError(f"{file} of {place.name} has {size:,} bytes; at most {max_bytes:,} are expected.")
        return Path(hf_hub_download(place.repo, file, revision=place.revision))


def cached_snapshot(place: HubPlace) -> Path | None:
    """The folder of a repository's commit in the cache on this machine; None where nothing of it is there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{place.repo.replace('/', '--')}"
    revision = place.revision or "main"
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def list_files(place: HubPlace, wanted: str = "") -> list[str]:
    """Names of a repository's files, as paths below its top; without network those in the cache on this machine.

    Args:
        wanted: the folder or file that is looked for, for the message.

    Raises:
        FileError: neither can be had; it says which files in which folder of the cache would do.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    snapshot = cached_snapshot(place)
    if HF_HUB_OFFLINE and snapshot is not None:
        return sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file())
    folder = Path(HF_HUB_CACHE) / f"models--{place.repo.replace('/', '--')}"
    check = (
        f"{CHECK} Without network these would do: {wanted or 'its files'} of that repository, weights and configuration, as "
        f"{folder / 'snapshots' / 'COMMIT' / wanted}, and the word COMMIT in {folder / 'refs' / (place.revision or 'main')}; or "
        "give load_sae a folder or file of your own."
    )
    with hub_errors(f"list the files of {place.name}", check):
        return sorted(HfApi().list_repo_files(place.repo, revision=place.revision))


def upload(repo: str, files: Mapping[str, str | Path], *, message: str, private: bool = False) -> HubPlace:
    """Write files into a model repository as one commit; it is made where it does not exist.

    `files` by their names there: texts, or paths of files on this machine. The account is that of `hf auth login`, or of the
    variable HF_TOKEN.

    Raises:
        ArgumentError: no name of the form `owner/name`. FileError: it cannot be written.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    place = parse(repo if is_hub_name(repo) else PREFIX + repo)
    if place.revision is not None:
        raise ArgumentError(f"{repo!r} names a revision; what is uploaded makes a new one. Leave it out.")
    contents = {name: what.encode() if isinstance(what, str) else what for name, what in files.items()}
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    with hub_errors(f"write {place.name}", CHECK):
        api = HfApi()
        api.create_repo(place.repo, private=private, exist_ok=True)
        commit = api.create_commit(place.repo, operations, commit_message=message)
    return place._replace(revision=commit.oid)


@contextlib.contextmanager
def hub_errors(what: str, check: str) -> Iterator[None]:
    """Turns what huggingface_hub, datasets, pyarrow and httpx raise, which has no common base, into FileError.

    `what` cannot be done; `check`: what to look at.
    """
    try:
        yield
    except SaehookError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:500]
        raise FileError(f"cannot {what}: {type(error).__name__}: {said or 'no more is known'}. {check}") from error
