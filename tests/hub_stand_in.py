"""A stand-in for the Hugging Face hub: serves the few addresses needed, counts what it sends, takes what is pushed."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_api

COMMIT, OLD_COMMIT = "c" * 40, "0" * 40
WRITER = "Bearer hf_secret"


class StandIn(ThreadingHTTPServer):
    """A hub with one model, `user/neo`, and what is said of others in `refusals`: name -> (status, error code).

    Others can be made by those who know the token; `private` ones are seen by them alone, `gated` says how those are.
    `log` has every change that was asked for.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = {"user/neo": files}
        self.private: set[str] = set()
        self.gated: dict[str, str] = {}
        self.large: dict[str, bytes] = {}
        self.log: list[str] = []
        self.refusals: dict[str, tuple[int, str]] = {}
        self.revisions = {"main": COMMIT, COMMIT: COMMIT, "v1": OLD_COMMIT, OLD_COMMIT: OLD_COMMIT}
        self.sent: dict[str, int] = {}
        self.tokens: set[str | None] = set()
        self.portal: bytes | None = None
        """What a network answers to everything before one has logged in."""

    @property
    def files(self) -> dict[str, bytes]:
        return self.repos["user/neo"]

    @files.setter
    def files(self, files: dict[str, bytes]) -> None:
        self.repos["user/neo"] = files

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        if self.server.portal is not None:
            return self.answer(200, self.server.portal, {"Content-Type": "text/html"})
        path = self.path.split("?")[0]
        api = re.fullmatch(r"/api/models/(?P<model>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<revision>[^/]+))?", path)
        file = re.fullmatch(r"/(?P<model>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path)
        match = api or file
        if match is None:
            return self.answer(404)
        self.server.tokens.add(self.headers.get("Authorization"))
        if match["model"] in self.server.refusals:
            status, code = self.server.refusals[match["model"]]
            return self.answer(status, headers={"X-Error-Code": code})
        if not self.sees(match["model"]):
            return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
        self.model = match["model"]
        commit = self.server.revisions.get(match["revision"] or "main")
        if commit is None:
            return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        if file is not None:
            return self.send_file(file["file"], commit)
        return self.answer(200, self.listing(match["what"], commit))

    do_HEAD = do_GET  # noqa: N815

    def sees(self, model: str) -> bool:
        hidden = model in self.server.private and self.headers.get("Authorization") != WRITER
        return model in self.server.repos and not hidden

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        path, body = self.path.split("?")[0], self.body()
        model = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/.]+)(?:\.git)?/(.+)", path)
        if path == "/api/validate-yaml":
            wrong = "pipeline_tag: 7" in json.loads(body)["content"]
            return self.json(
                {"errors": [{"message": "pipeline_tag must be a string"}]} if wrong else {}, 400 if wrong else 200
            )
        if self.headers.get("Authorization") != WRITER:
            return self.answer(401, b'{"error": "Invalid user token."}')
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if model is None or model[1] not in self.server.repos:
            return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
        if model[1] in self.server.refusals:
            status, message = self.server.refusals[model[1]]
            return self.answer(status, json.dumps({"error": message}).encode())
        return self.change(model[1], model[2], body)

    def do_PUT(self) -> None:
        body = self.body()
        if self.path.startswith("/large/"):
            self.server.large[self.path.removeprefix("/large/")] = body
            return self.answer(200)
        model = self.path.removeprefix("/api/models/").removesuffix("/settings")
        self.server.gated[model] = json.loads(body)["gated"]
        self.server.log.append("settings")
        return self.json({})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "user":
            return self.answer(403, b'{"error": "You don\'t have the rights to create a model there"}')
        self.server.repos[name] = {".gitattributes": b""}
        if asked.get("visibility") == "private":
            self.server.private.add(name)
        self.server.log.append("create")
        return self.json({"url": f"{self.server.url}/{name}"})

    def change(self, model: str, what: str, body: bytes) -> None:
        kind, _, rest = what.partition("/")
        self.server.log.append(kind)
        if kind == "branch":
            self.server.revisions[rest] = COMMIT
            return self.json({})
        if kind == "preupload":
            asked = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] > 5000 else "regular", "shouldIgnore": False}
                for f in asked
            ]
            return self.json({"files": modes})
        if kind == "info":  # .git/info/lfs/objects/batch
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.json({"transfer": "basic", "objects": objects})
        files = dict(self.server.repos[model])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.server.repos[model] = files
        return self.json({"commitUrl": f"{self.server.url}/{model}/commit/{COMMIT}", "commitOid": COMMIT})

    def json(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def listing(self, what: str | None, commit: str) -> bytes:
        files = self.server.repos[self.model].items()
        if what == "tree":
            tree = [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files]
            return json.dumps(tree).encode()
        siblings = [{"rfilename": name, "size": len(content)} for name, content in files]
        info = {
            "id": self.model,
            "sha": commit,
            "siblings": siblings,
            "private": self.model in self.server.private,
        }
        return json.dumps(info).encode()

    def send_file(self, name: str, commit: str) -> None:
        if name not in self.server.repos[self.model]:
            return self.answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = self.server.repos[self.model][name]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status = 200
        if wanted:
            status, size = 206, len(content)
            content = content[int(wanted[1]) : int(wanted[2] or size) + 1]
            headers["Content-Range"] = f"bytes {wanted[1]}-{int(wanted[1]) + len(content) - 1}/{size}"
        if self.command == "GET":
            self.server.sent[name] = self.server.sent.get(name, 0) + len(content)
        return self.answer(status, content, headers)

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in while a test runs, and huggingface_hub turned to it, with a cache and a token of its own."""
    server = StandIn({})
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_ETAG_TIMEOUT": 5,
        "HF_HUB_DISABLE_XET": True,  # its storage has a protocol of its own
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # whose methods are huggingface_hub's functions
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
