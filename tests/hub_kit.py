"""A hub on loopback: what huggingface_hub asks for of repositories that are folders here, and faults of the net.

    with hub_kit.serving(root) as hub:            root/OWNER/NAME/...
        environment = hub.environment(cache)      of processes whose hub it is
        hub.faults["owner/name"] = "gated"

Weights are answered by a redirect to another host, as the hub redirects to its store; that host takes ranges.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

FAULTS = {
    "404": "there is no such repository",
    "gated": "its files are for those who have agreed to its terms",
    "lost": "its weights are listed, but gone",
    "slow": "its weights never come",
    "truncated": "the connection closes in the middle of its weights, again and again",
    "damaged": "its weights come whole, but are half of what they should be",
    "down": "the hub has an error of its own",
}
STORE = "/store"  # on "localhost", which to the hub's client is another host than 127.0.0.1


@dataclasses.dataclass
class Hub:
    """A server that runs.

    Attributes:
      root: folder of the repositories.
      faults: repository -> one of FAULTS.
      asked: (method, path) of all requests.
    """

    root: Path
    url: str
    faults: dict[str, str] = dataclasses.field(default_factory=dict)
    asked: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    ending: threading.Event = dataclasses.field(default_factory=threading.Event)

    def environment(self, cache: Path) -> dict[str, str]:
        """Of a process that has this hub, `cache` for what it fetches, and little patience."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def fetched(self, repository: str) -> list[str]:
        """Paths of its files that were sent."""
        prefix = f"{STORE}/{repository}/"
        return [path.removeprefix(prefix) for method, path in self.asked if method == "GET" and path.startswith(prefix)]


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """The hub of the repositories below `root`, while the block runs."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = hub = Hub(root, f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.ending.set()
        server.shutdown()
        server.server_close()
        thread.join()


def revision(repository: str) -> str:
    """Of its only commit."""
    return hashlib.sha1(repository.encode()).hexdigest()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client has gone away."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path))
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"]:
            repository, kind = "/".join(words[2:4]), words[4]
        elif path.startswith(STORE + "/"):
            repository, kind = "/".join(words[1:3]), "store"
        else:
            repository, kind = "/".join(words[:2]), "resolve"
        fault, folder = hub.faults.get(repository), hub.root / repository
        if fault == "404" or not folder.is_dir():
            return self._refuse(404, "RepoNotFound")
        if fault == "down":
            return self._refuse(500, "")
        if kind == "revision":
            return self._json({"id": repository, "modelId": repository, "sha": revision(repository), "siblings": []})
        if kind == "tree":
            files = [one for one in sorted(folder.rglob("*")) if one.is_file()]
            return self._json([self._entry(one, folder) for one in files])
        if fault == "gated":
            return self._refuse(403, "GatedRepo")
        if kind == "store":
            return self._send(folder / "/".join(words[3:]), fault)
        file = folder / "/".join(words[4:])
        if not file.is_file() or (fault == "lost" and _is_large(file)):
            return self._refuse(404, "EntryNotFound", repository)
        content = _content(file, fault)
        headers = {"X-Repo-Commit": revision(repository), "ETag": f'"{_etag(content)}"'}
        if not _is_large(file):
            return self._reply(200, content, headers | {"Accept-Ranges": "bytes"})
        linked = {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
        place = f"{hub.url.replace('127.0.0.1', 'localhost')}{STORE}/{repository}/{'/'.join(words[4:])}"
        return self._reply(302, b"", headers | linked | {"Location": place})

    def _entry(self, file: Path, folder: Path) -> dict:
        content = _content(file, self.server.hub.faults.get("/".join(folder.parts[-2:])))
        found = {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
        found["path"] = str(file.relative_to(folder))
        lfs = {"oid": _etag(content), "size": len(content), "pointerSize": 134}
        return found | ({"lfs": lfs} if _is_large(file) else {})

    def _send(self, file: Path, fault: str | None) -> None:
        """A file of the store, or the part of it that a range asks for."""
        content, first = _content(file, fault), 0
        if asked := self.headers.get("Range"):
            first = int(asked.removeprefix("bytes=").partition("-")[0])
        if fault == "slow":
            self.server.hub.ending.wait(3600)
            return
        headers = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"} if asked else {}
        self._head(206 if asked else 200, len(content) - first, headers)
        self.wfile.write(content[first : len(content) // 2 if fault == "truncated" else None])
        self.close_connection = fault == "truncated"

    def _refuse(self, code: int, name: str, repository: str = "") -> None:
        commit = {"X-Repo-Commit": revision(repository)} if repository else {}
        self._reply(code, b'{"error": "no"}', {"X-Error-Code": name, "X-Error-Message": "no", **commit})

    def _json(self, value: object) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _reply(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self._head(code, len(content), headers)
        if self.command == "GET":
            self.wfile.write(content)

    def _head(self, code: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()


def _is_large(file: Path) -> bool:
    return file.suffix == ".safetensors"


def _content(file: Path, fault: str | None) -> bytes:
    content = file.read_bytes()
    return content[: len(content) // 2] if fault == "damaged" and _is_large(file) else content


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
