"""A web server for tests: plain files, faults on demand, and as much of the Hugging Face hub's protocol as is used.

Model repositories answer under /<repo>/resolve/<commit>/<file>, /api/models/<repo>/revision/<commit> (with `blobs`) and
/api/models/<repo>/tree/<commit>; data sets under /datasets and /api/datasets.
"""

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
    ranges: str = "obeyed"  # or ignored (all of it, status 200) or shifted (other bytes than the header says)


@dataclass
class Server:
    """Faults and files by path; requests as they came. A path's answers are used up in order, the last one stays."""

    url: str
    answers: dict[str, list[Answer]] = field(default_factory=dict[str, list[Answer]])
    requests: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # method and path
    ranges: list[int] = field(default_factory=list[int])  # the first bytes of what was asked for in part

    def answer(self, method: str, path: str) -> Answer:
        self.requests.append((method, path))
        queue = self.answers.get(path, [Answer(404)])
        return queue.pop(0) if len(queue) > 1 else queue[0]

    def count(self, path: str) -> int:
        """How often `path` was asked for."""
        return [asked for _, asked in self.requests].count(path)

    def add_repository(self, repo_id: str, files: dict[str, bytes], kind: str = "models") -> None:
        """Serve `files` as a repository at COMMIT; large files (safetensors, bin, parquet) as LFS files."""
        folder = "" if kind == "models" else f"/{kind}"
        siblings: list[dict[str, object]] = []
        tree: list[dict[str, object]] = []
        for name, body in files.items():
            blob = b"blob %d\0" % len(body) + body  # as git hashes it
            sha1, sha256 = hashlib.sha1(blob).hexdigest(), hashlib.sha256(body).hexdigest()
            large = name.endswith((".safetensors", ".bin", ".parquet"))
            lfs = {"lfs": {"oid": sha256, "sha256": sha256, "size": len(body), "pointerSize": 134}} if large else {}
            siblings.append({"rfilename": name, "size": len(body), "blobId": sha1, **lfs})
            tree.append({"type": "file", "path": name, "size": len(body), "oid": sha1, **lfs})
            headers = {"ETag": f'"{sha256 if large else sha1}"', "X-Repo-Commit": COMMIT}
            self.answers[f"{folder}/{repo_id}/resolve/{COMMIT}/{name}"] = [Answer(200, body, headers)]
        info = {"id": repo_id, "sha": COMMIT, "private": False, "gated": False, "tags": [], "siblings": siblings}
        self.add_json(f"/api/{kind}/{repo_id}/revision/{COMMIT}", info)
        self.add_json(f"/api/{kind}/{repo_id}/tree/{COMMIT}", tree)

    def add_json(self, path: str, value: object) -> None:
        self.answers[path] = [Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})]

    def gate(self, repo_id: str, part: str) -> None:
        """Answer as the hub does for a gated repository without a token, where `part` is in the path."""
        for path in self.answers:
            if f"/{repo_id}/" in path and part in path:
                self.answers[path] = [Answer(401, headers={"X-Error-Code": "GatedRepo"})]


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

        def do_GET(self) -> None:  # http.server's name
            answer = server.answer(self.command, unquote(urlsplit(self.path).path))
            if answer.reset:
                self.close_connection = True
                return
            wanted = self.headers.get("Range", "") if answer.status == 200 and answer.ranges != "ignored" else ""
            start = int(wanted.removeprefix("bytes=").partition("-")[0] or 0)
            shift = 7 if wanted and answer.ranges == "shifted" else 0
            body = answer.body[start - shift : len(answer.body) - shift]
            self.send_response(206 if wanted else answer.status)
            for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
                self.send_header(name, value)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(answer.body) - 1}/{len(answer.body)}")
                server.ranges.append(start)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: answer.sent])
            if answer.sent is not None:
                self.wfile.flush()
                Event().wait(answer.stall)  # tests replace time.sleep
                self.close_connection = True

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    with Quiet(("127.0.0.1", 0), Handler) as http:
        server = Server(f"http://127.0.0.1:{http.server_address[1]}")
        Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        http.shutdown()
