"""A hub on this machine: repositories from folders, over HTTP, with the refusals of the real one."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

UNREACHABLE = "http://127.0.0.1:9"  # the port that discards


def reach(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Take what answers at `url` for the hub, in this process."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", url)


@dataclass
class FakeHub:
    """Repositories by kind and name, each a folder; what was asked for, as `METHOD path`."""

    repositories: dict[str, Path] = field(default_factory=dict)  # by "models/owner/name" or "datasets/owner/name"
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def commit(self, repository: str) -> str:
        """The one commit of a repository."""
        return hashlib.sha1(repository.encode()).hexdigest()

    def downloaded(self) -> set[str]:
        """Names of files whose bytes were asked for."""
        return {request.rsplit("/", 1)[-1] for request in self.requests if request.startswith("GET") and "/resolve/" in request}


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Answer on a free port of the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is printed."""

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            self._answer(json.loads(self.rfile.read(length) or b"{}"))

        def _answer(self, asked: dict | None = None, *, with_body: bool = True) -> None:  # noqa: PLR0911  # a table of routes
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
            file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if api:
                repository, action, revision = f"{api[1]}/{api[2]}", api[3], api[4]
            elif file:
                repository, action, revision = f"{'datasets' if file[1] else 'models'}/{file[2]}", "resolve", file[3]
            else:
                return self._refuse(404, "EntryNotFound", "no such page", with_body)
            if repository not in hub.repositories:
                return self._refuse(404, "RepoNotFound", "Repository not found", with_body)
            if revision not in (None, "main", hub.commit(repository)):
                return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}", with_body)
            folder, commit = hub.repositories[repository], hub.commit(repository)
            if repository in hub.gated and action in ("tree", "resolve"):
                why = f"Access to model {repository.split('/', 1)[1]} is restricted and you are not in the authorized list."
                return self._refuse(403, "GatedRepo", why, with_body)
            files = {each.relative_to(folder).as_posix(): each for each in sorted(folder.rglob("*")) if each.is_file()}
            entries = [
                {"type": "file", "path": name, "size": each.stat().st_size, "oid": hashlib.sha1(each.read_bytes()).hexdigest()}
                for name, each in files.items()
            ]
            if action == "tree":
                below = f"{api[5]}/" if api and api[5] else ""
                inside = [entry for entry in entries if entry["path"].startswith(below)]
                if parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() != "true":
                    folders = {below + entry["path"].removeprefix(below).split("/")[0] for entry in inside} - files.keys()
                    inside = [entry for entry in inside if "/" not in entry["path"].removeprefix(below)]
                    inside += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
                return self._json(inside, with_body)
            if action == "paths-info":
                return self._json([entry for entry in entries if entry["path"] in (asked or {}).get("paths", [])], with_body)
            if action != "resolve":
                siblings = [{"rfilename": name} for name in files]
                return self._json({"id": repository.split("/", 1)[1], "sha": commit, "siblings": siblings, "private": False}, with_body)
            assert file
            if file[4] not in files:
                return self._refuse(404, "EntryNotFound", "Entry not found", with_body)
            return self._file(files[file[4]], commit, with_body)

        def _file(self, path: Path, commit: str, with_body: bool) -> None:
            content = path.read_bytes()
            etag = hashlib.sha1(content).hexdigest()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            status = 200
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if wanted:
                first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, status = content[first : last + 1], 206
            self._send(status, content, headers, with_body)

        def _json(self, value: object, with_body: bool) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, with_body)

        def _refuse(self, status: int, code: str, message: str, with_body: bool) -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
            self._send(status, json.dumps({"error": message}).encode(), headers, with_body)

        def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
