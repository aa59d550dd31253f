"""A web server for tests: plain files, faults on demand, and as much of the Hugging Face hub's protocol as is used.

Model repositories answer under /<repo>/resolve/<commit>/<file>, /api/models/<repo>/revision/<commit> (with `blobs`) and
/api/models/<repo>/tree/<commit>; a data set's files under /datasets/<repo>/resolve/<commit>/<file>. Uploads are those
of huggingface_hub without Xet: one commit, large files by Git LFS.
"""

import base64
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Answer:
    """What the server says to one request: a status, headers over the usual ones, a body cut to `sent` bytes."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict[str, str])
    sent: int | None = None  # a truncated body: Content-Length says more
    reset: bool = False  # close the connection without a word
    stall: float = 0.0  # seconds of silence after what was sent, before the connection is closed


@dataclass
class Server:
    """Answers by path; a path's answers are used up in order, the last one stays. Requests as they came."""

    url: str
    answers: dict[str, list[Answer]] = field(default_factory=dict[str, list[Answer]])
    requests: list[str] = field(default_factory=list[str])  # paths
    objects: dict[str, bytes] = field(default_factory=dict[str, bytes])  # uploaded by Git LFS, by sha256
    committed: dict[str, bytes] = field(default_factory=dict[str, bytes])  # files of the last commit

    def answer(self, path: str) -> Answer:
        self.requests.append(path)
        queue = self.answers.get(path, [Answer(404)])
        return queue.pop(0) if len(queue) > 1 else queue[0]

    def take(self, path: str, body: bytes) -> Answer:
        """Answer a POST or PUT as the hub does, unless the test has an answer for its path."""
        if path in self.answers:
            return self.answer(path)
        self.requests.append(path)
        if path.startswith("/lfs/"):
            self.objects[path.removeprefix("/lfs/")] = body
            return Answer()
        lines: list[Any] = [json.loads(line) for line in body.splitlines()]
        told: dict[str, Any] = {}
        if path == "/api/repos/create":
            told["url"] = f"{self.url}/{lines[0]['organization']}/{lines[0]['name']}"
        elif "/preupload/" in path:
            told["files"] = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".gguf", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for file in lines[0]["files"]
            ]
        elif path.endswith("/info/lfs/objects/batch"):
            told["objects"] = [
                {**wanted, "actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}}
                for wanted in lines[0]["objects"]
            ]
        elif "/commit/" in path:
            told |= {"commitUrl": f"{self.url}{path.removeprefix('/api/models')}/{COMMIT}", "commitOid": COMMIT}
            for kind, file in ((line["key"], line["value"]) for line in lines[1:]):
                body = base64.b64decode(file["content"]) if kind == "file" else self.objects[file["oid"]]
                self.committed[file["path"]] = body
        return Answer(body=json.dumps(told).encode(), headers={"Content-Type": "application/json"})

    def count(self, path: str) -> int:
        """How often `path` was asked for."""
        return self.requests.count(path)

    def add_repository(self, repo_id: str, files: dict[str, bytes]) -> None:
        """Serve `files` as a repository at COMMIT; safetensors and bin files as LFS files."""
        described: list[dict[str, Any]] = []
        for name, body in files.items():
            blob = b"blob %d\0" % len(body) + body  # as git hashes it
            sha1, sha256 = hashlib.sha1(blob).hexdigest(), hashlib.sha256(body).hexdigest()
            large = name.endswith((".safetensors", ".bin"))
            lfs = {"lfs": {"oid": sha256, "sha256": sha256, "size": len(body), "pointerSize": 134}} if large else {}
            names = {"rfilename": name, "path": name, "type": "file"}
            described.append({**names, "size": len(body), "blobId": sha1, "oid": sha1, **lfs})
            headers = {"ETag": f'"{sha256 if large else sha1}"', "X-Repo-Commit": COMMIT}
            self.answers[f"/{repo_id}/resolve/{COMMIT}/{name}"] = [Answer(200, body, headers)]
        info = {"id": repo_id, "sha": COMMIT, "private": False, "gated": False, "tags": [], "siblings": described}
        self.add_json(f"/api/models/{repo_id}/revision/{COMMIT}", info)
        self.add_json(f"/api/models/{repo_id}/tree/{COMMIT}", described)

    def add_data_set(self, repo_id: str, name: str, body: bytes) -> None:
        """Serve a file of a data set at COMMIT as an LFS file."""
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self.answers[f"/datasets/{repo_id}/resolve/{COMMIT}/{name}"] = [Answer(200, body, headers)]

    def add_json(self, path: str, value: Any) -> None:
        self.answers[path] = [Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})]


class Quiet(ThreadingHTTPServer):
    """Says nothing of a client that hangs up, as one does that gives up; what else goes wrong is still printed."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serve() -> Iterator[Server]:
    """A server on a free port of this machine, in a thread."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def body(self) -> bytes:
            if self.headers["Transfer-Encoding"] != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"] or 0))
            read = b""
            while size := int(self.rfile.readline(), 16):
                read += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return read

        def do_GET(self) -> None:  # http.server's name
            path = unquote(urlsplit(self.path).path)
            answer = server.take(path, self.body()) if self.command in ("POST", "PUT") else server.answer(path)
            if answer.reset:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body[: answer.sent])
            if answer.sent is not None:
                self.wfile.flush()
                Event().wait(answer.stall)  # tests replace time.sleep
                self.close_connection = True

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    with Quiet(("127.0.0.1", 0), Handler) as http:
        server = Server(f"http://127.0.0.1:{http.server_address[1]}")
        Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        http.shutdown()
