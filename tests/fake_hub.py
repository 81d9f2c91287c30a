"""A small model hub on this machine: the few requests that creating, committing, listing and downloading make, served from
memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FakeHub:
    """`repos[name]` is the list of its commits, oldest first; each is a dict of files."""

    repos: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def commit_id(self, repo: str, index: int) -> str:
        """The sha of a commit."""
        return hashlib.sha1(f"{repo}{index}".encode()).hexdigest()

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit id, its files), or None where there is no such thing."""
        for index, files in reversed(list(enumerate(self.repos.get(repo, [])))):
            if revision in ("main", self.commit_id(repo, index)):
                return self.commit_id(repo, index), files
        return None


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that listens on a free port of this machine; HF_ENDPOINT is its `url`."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            hub.requests.append(format % args)

        def answer(self, status: int, body: bytes = b"", head: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(head or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                if asked.get("private") or asked.get("visibility") == "private":
                    hub.private.add(name)
                new = name not in hub.repos
                hub.repos.setdefault(name, [])
                return self.json({"url": f"{hub.url}/{name}"}, 200 if new else 409)
            if self.path == "/api/validate-yaml":
                return self.json({"errors": [], "warnings": []})
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path.split("?")[0])
            if found is None or found[1] not in hub.repos:
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if found[2] == "preupload":
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self.json({"files": files})
            commits = hub.repos[found[1]]
            files = dict(commits[-1]) if commits else {}
            for line in body.splitlines():
                operation = json.loads(line)
                if operation["key"] == "file":
                    files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
            commits.append(files)
            oid = hub.commit_id(found[1], len(commits) - 1)
            return self.json({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{found[1]}/commit/{oid}"})

        def list_files(self) -> bool:
            """Answers a request for a repository's files."""
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/?]+)", self.path.split("?")[0])
            stored = hub.files(found[1], found[2]) if found else None
            if stored is None:
                return False
            self.json(
                [{"type": "file", "path": path, "size": len(d), "oid": "0" * 40} for path, d in stored[1].items()]
            )
            return True

        def do_GET(self) -> None:
            if self.list_files():
                return
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path.split("?")[0])
            stored = hub.files(found[1], found[2]) if found else None
            if found is None or found[1] not in hub.repos:
                return self.answer(404, head={"X-Error-Code": "RepoNotFound"})
            if stored is None:
                return self.answer(404, head={"X-Error-Code": "RevisionNotFound"})
            commit, files = stored
            if found[3] not in files:
                return self.answer(404, head={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            body = files[found[3]]
            etag = hashlib.sha1(body).hexdigest()
            return self.answer(200, body, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

        do_HEAD = do_GET

        def json(self, data: object, status: int = 200) -> None:
            self.answer(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
