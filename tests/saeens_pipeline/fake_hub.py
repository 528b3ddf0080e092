"""A hub on this machine: repositories from folders and from pushes, over HTTP, with the refusals of the real one.

Pushes are answered as `huggingface_hub` asks (`HfApi.create_repo`, `create_branch`, `create_commit`; `huggingface_hub/lfs.py`): upload
modes by `preupload`, large files by LFS batch and PUT, in one part or several, and a commit as lines of JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
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
class Pushed:
    """A repository that is written over HTTP: the files of each commit, branches, and large files by SHA-256."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """Add a commit to a branch."""
        oid = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Files at a branch or commit."""
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class FakeHub:
    """Repositories by kind and name, each a folder, or pushed; what was asked for, as `METHOD path`."""

    repositories: dict[str, Path] = field(default_factory=dict)  # by "models/owner/name" or "datasets/owner/name"
    pushed: dict[str, Pushed] = field(default_factory=dict)
    tags: dict[str, list[str]] = field(default_factory=dict)  # of a repository with its one branch, main
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)  # "write" or "read", by token
    part_bytes: int = 1 << 30  # larger files are uploaded in parts
    fails: str = ""  # a request, as `METHOD path`, that contains this fails
    fails_with: int = 400
    url: str = ""

    def commit(self, repository: str) -> str:
        """The one commit of a repository from a folder, or the last of a pushed one."""
        if repository in self.pushed:
            return self.pushed[repository].branches["main"]
        return hashlib.sha1(repository.encode()).hexdigest()

    def found(self, repository: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files at a revision; None if there is no such revision."""
        if repository in self.pushed:
            pushed = self.pushed[repository]
            commit = pushed.branches.get(revision or "main", revision or "")
            return (commit, pushed.commits[commit]) if commit in pushed.commits else None
        folder, commit = self.repositories[repository], self.commit(repository)
        if revision not in (None, "main", commit, *self.tags.get(repository, [])):
            return None
        return commit, {each.relative_to(folder).as_posix(): each.read_bytes() for each in sorted(folder.rglob("*")) if each.is_file()}

    def refs(self, repository: str) -> dict[str, list[dict[str, str]]]:
        """Branches and tags of a repository from a folder."""
        of_kind = {"branches": ["main"], "tags": self.tags.get(repository, []), "converts": []}
        commit = self.commit(repository)
        return {kind: [{"name": name, "ref": f"refs/{name}", "targetCommit": commit} for name in names] for kind, names in of_kind.items()}

    def downloaded(self) -> set[str]:
        """Names of files whose bytes were asked for."""
        return {request.rsplit("/", 1)[-1] for request in self.requests if request.startswith("GET") and "/resolve/" in request}


def _upload_modes(files: Mapping[str, bytes], asked: dict[str, Any]) -> dict[str, Any]:
    """Return the upload mode of each file, and the hash of the file that is there."""
    modes = []
    for each in asked["files"]:
        name, is_large = each["path"], b"\0" in base64.b64decode(each["sample"]) or each["path"].endswith((".safetensors", ".parquet"))
        there = {} if name not in files else {"oid": hashlib.sha256(files[name]).hexdigest() if is_large else _git_hash(files[name])}
        modes.append({"path": name, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, **there})
    return {"files": modes}


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


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
            self._write_or(self._answer)

        def do_PUT(self) -> None:
            self._write_or(lambda body: self._refuse(404, "EntryNotFound", "no such page"))

        def _write_or(self, read: Callable[[Any], None]) -> None:  # noqa: PLR0911  # a table of routes
            body = self._body()
            path = unquote(urlsplit(self.path).path)
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
            large = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
            stored = re.fullmatch(r"/lfs/([^/]+/[^/]+)/([0-9a-f]{64})(?:/(\d+|whole|verify))?", path)
            if not (api or large or stored or path in ("/api/repos/create", "/api/validate-yaml")):
                return read(json.loads(body or b"{}"))
            hub.requests.append(f"{self.command} {path}")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if hub.fails and hub.fails in hub.requests[-1]:
                return self._refuse(hub.fails_with, "", f"{hub.fails} failed for {token or 'nobody'}")
            if stored:  # signed addresses need no token
                return self._store(hub.pushed[f"models/{stored[1]}"], stored[2], stored[3], body)
            if token not in hub.tokens:
                return self._refuse(401, "", "Invalid credentials in Authorization header")
            if path == "/api/validate-yaml":
                front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
                return self._json({"errors": [], "warnings": [] if front and yaml.safe_load(front[1]) else [{"message": "empty"}]})
            if hub.tokens[token] != "write":
                return self._refuse(403, "", "you have no rights to write here")
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            name = api[1] if api else large[1] if large else ""
            if f"models/{name}" not in hub.pushed:
                return self._refuse(404, "RepoNotFound", "Repository not found")
            repository = hub.pushed[f"models/{name}"]
            if large:
                return self._json(self._batch(name, repository, json.loads(body)))
            assert api
            if api[2] == "branch":
                repository.branches[api[3]] = repository.branches["main"]
                return self._json({})
            if api[3] not in repository.branches:
                return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {api[3]}")
            if api[2] == "preupload":
                return self._json(_upload_modes(repository.files(api[3]), json.loads(body)))
            return self._commit(name, repository, api[3], [json.loads(line) for line in body.splitlines()])

        def _create(self, asked: dict[str, Any]) -> None:
            name = f"{asked['organization']}/{asked['name']}"
            if f"models/{name}" in hub.pushed:
                return self._refuse(409, "", "You already created this model repo")
            repository = hub.pushed[f"models/{name}"] = Pushed(asked.get("visibility") == "private")
            repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs"}, "initial commit")
            return self._json({"url": f"{hub.url}/{name}"})

        def _batch(self, name: str, repository: Pushed, asked: dict[str, Any]) -> dict[str, Any]:
            objects = []
            for each in asked["objects"]:
                at = f"{hub.url}/lfs/{name}/{each['oid']}"
                upload: dict[str, Any] = {"href": f"{at}?signature=secret"}
                if each["size"] > hub.part_bytes:
                    n_parts = -(-each["size"] // hub.part_bytes)
                    parts = {f"{i:05}": f"{at}/{i}" for i in range(1, n_parts + 1)}
                    upload = {"href": f"{at}/whole", "header": {"chunk_size": str(hub.part_bytes), **parts}}
                actions = {} if each["oid"] in repository.large else {"actions": {"upload": upload, "verify": {"href": f"{at}/verify"}}}
                objects.append({**each, **actions})
            return {"transfer": "multipart" if hub.part_bytes < 1 << 30 else "basic", "objects": objects}

        def _store(self, repository: Pushed, oid: str, part: str | None, body: bytes) -> None:
            if part == "verify":
                return self._json({}) if oid in repository.large else self._refuse(404, "EntryNotFound", "it is not there")
            if part and part != "whole":
                repository.parts[f"{oid}/{part}"] = body
                return self._send(200, b"", {"ETag": f'"{part}"'}, True)
            if part:
                numbers = [each["partNumber"] for each in json.loads(body)["parts"]]
                body = b"".join(repository.parts[f"{oid}/{number}"] for number in numbers)
            if hashlib.sha256(body).hexdigest() != oid:
                return self._refuse(400, "", "the content has another hash")
            repository.large[oid] = body
            return self._send(200, b"", {}, True)

        def _commit(self, name: str, repository: Pushed, branch: str, lines: list[dict[str, Any]]) -> None:
            header, files = lines[0]["value"], dict(repository.files(branch))
            if header.get("parentCommit") not in (None, repository.branches[branch]):
                return self._refuse(412, "", "A commit has happened since. Please refresh and try again.")
            for line in lines[1:]:
                value, path = line["value"], line["value"]["path"]
                match line["key"]:
                    case "file":
                        files[path] = base64.b64decode(value["content"])
                    case "lfsFile" if value["oid"] in repository.large:
                        files[path] = repository.large[value["oid"]]
                    case "deletedFile":
                        del files[path]
                    case _:
                        return self._refuse(400, "", f"{line['key']} {path}: not possible")
            oid = repository.commit(branch, files, header["summary"])
            return self._json({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"})

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def _answer(self, asked: dict | None = None, *, with_body: bool = True) -> None:  # noqa: PLR0911, PLR0912  # a table of routes
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
            file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            listed = re.fullmatch(r"/api/(models/[^/]+/[^/]+)/refs", path)
            if listed and listed[1] in hub.repositories:
                return self._json(hub.refs(listed[1]), with_body)
            if listed:
                return self._refuse(404, "RepoNotFound", "Repository not found", with_body)
            if api:
                repository, action, revision = f"{api[1]}/{api[2]}", api[3], api[4]
            elif file:
                repository, action, revision = f"{'datasets' if file[1] else 'models'}/{file[2]}", "resolve", file[3]
            else:
                return self._refuse(404, "EntryNotFound", "no such page", with_body)
            if repository not in {**hub.repositories, **hub.pushed}:
                return self._refuse(404, "RepoNotFound", "Repository not found", with_body)
            found = hub.found(repository, revision)
            if found is None:
                return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}", with_body)
            commit, files = found
            if repository in hub.gated and action in ("tree", "resolve"):
                why = f"Access to model {repository.split('/', 1)[1]} is restricted and you are not in the authorized list."
                return self._refuse(403, "GatedRepo", why, with_body)
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            if action == "tree":
                below = f"{api[5]}/" if api and api[5] else ""
                inside = [entry for entry in entries if entry["path"].startswith(below)]
                if below and not inside and repository in hub.pushed:
                    return self._refuse(404, "EntryNotFound", f"{below} does not exist on {revision}", with_body)
                if parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() != "true":
                    folders = {below + entry["path"].removeprefix(below).split("/")[0] for entry in inside} - files.keys()
                    inside = [entry for entry in inside if "/" not in entry["path"].removeprefix(below)]
                    inside += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
                return self._json(inside, with_body)
            if action == "paths-info":
                return self._json([entry for entry in entries if entry["path"] in (asked or {}).get("paths", [])], with_body)
            if action != "resolve":
                siblings = [{"rfilename": name} for name in files]
                private = repository in hub.pushed and hub.pushed[repository].private
                return self._json({"id": repository.split("/", 1)[1], "sha": commit, "siblings": siblings, "private": private}, with_body)
            assert file
            if file[4] not in files:
                return self._refuse(404, "EntryNotFound", "Entry not found", with_body)
            return self._file(files[file[4]], commit, with_body)

        def _file(self, content: bytes, commit: str, with_body: bool) -> None:
            etag = hashlib.sha1(content).hexdigest()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            status = 200
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if wanted:
                first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, status = content[first : last + 1], 206
            self._send(status, content, headers, with_body)

        def _json(self, value: object, with_body: bool = True) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, with_body)

        def _refuse(self, status: int, code: str, message: str, with_body: bool = True) -> None:
            headers = {"X-Error-Message": message, "Content-Type": "application/json"} | ({"X-Error-Code": code} if code else {})
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
