"""A Hugging Face hub on loopback: model information, resolve with redirects, ETags and ranges, and its failures."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Sent:
    """One answer to a GET for a file's content."""

    name: str
    range: str | None
    count: int


@dataclass
class HubServer:
    """Repositories as folders, and what goes wrong on the way to them.

    Attributes
    ----------
    repositories
        ``owner/name`` to the folder with its files.
    gated
        Repositories whose files need an agreement.
    cut_after
        Break the connection of a GET after this many bytes of the content...
    cuts
        ...this many times, then send whole files.
    broken
        Whether to answer 503 to every GET after a cut.

    """

    repositories: dict[str, Path]
    gated: frozenset[str] = frozenset()
    cut_after: int | None = None
    cuts: int = 0
    broken: bool = False
    sent: list[Sent] = field(default_factory=list)
    tokens: list[tuple[str, str | None]] = field(default_factory=list)

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"server_hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def files(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {one.name for one in self.sent}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass

    def do_HEAD(self) -> None:
        self._route(content=False)

    def do_GET(self) -> None:
        self._route(content=True)

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _route(self, *, content: bool) -> None:
        path = self.path.partition("?")[0]
        self.server_hub.tokens.append((path, self.headers.get("Authorization")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._information(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3], content=content)
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._content(self.server_hub.repositories[match[1]] / match[2], match[2])
        else:
            self._answer(404)

    def _known(self, repo: str, revision: str) -> bool:
        if repo not in self.server_hub.repositories:
            self._answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif revision not in {"main", COMMIT}:
            self._answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        else:
            return True
        return False

    def _information(self, repo: str, revision: str) -> None:
        if not self._known(repo, revision):
            return
        folder = self.server_hub.repositories[repo]
        siblings = [
            {"rfilename": path.relative_to(folder).as_posix(), "size": path.stat().st_size}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        body = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
        self._answer(200, json.dumps(body).encode(), Content_Type="application/json")

    def _resolve(self, repo: str, revision: str, name: str, *, content: bool) -> None:
        if not self._known(repo, revision):
            return
        if repo in self.server_hub.gated:
            self._answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            return
        path = self.server_hub.repositories[repo] / name
        if not path.is_file():
            self._answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        elif path.suffix == ".json":
            etag = hashlib.sha1(path.read_bytes()).hexdigest()
            if content:
                self._content(path, name, X_Repo_Commit=COMMIT, ETag=f'"{etag}"')
            else:
                self._answer(200, X_Repo_Commit=COMMIT, ETag=f'"{etag}"', Content_Length=str(path.stat().st_size))
        else:  # what the hub keeps in LFS lies elsewhere
            etag = hashlib.sha256(path.read_bytes()).hexdigest()
            self._answer(
                302,
                X_Repo_Commit=COMMIT,
                X_Linked_Etag=f'"{etag}"',
                X_Linked_Size=str(path.stat().st_size),
                Location=f"http://localhost:{self.server.server_port}/cdn/{repo}/{name}",  # type: ignore[attr-defined]
            )

    def _content(self, path: Path, name: str, **headers: str) -> None:
        hub = self.server_hub
        if hub.broken and hub.cuts == 0 and hub.cut_after is not None:
            self._answer(503)
            return
        body = path.read_bytes()
        asked = self.headers.get("Range")
        match = re.fullmatch(r"bytes=(\d+)-", asked or "")
        start = int(match[1]) if match else 0
        part = body[start:]
        if match:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        cut = hub.cut_after is not None and hub.cuts > 0 and len(part) > hub.cut_after
        self.send_response(206 if match else 200)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if cut:
            hub.cuts -= 1
            part = part[: hub.cut_after]
            self.close_connection = True
        hub.sent.append(Sent(name, asked, len(part)))
        self.wfile.write(part)
