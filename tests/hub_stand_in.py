"""Stand-in for the Hugging Face hub on this machine: a server with the part of its HTTP interface that models use.

It keeps models in memory: `create_repo`, commits of files, and what `from_pretrained` and `snapshot_download` ask for.
All files are uploaded inside a commit, as the hub has it for small ones.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_a_test"
_MODEL = r"(?P<model>[^/]+/[^/]+)"
Files = dict[str, bytes]


class HubStandIn:
    """A hub that runs in a thread. Use it in a `with` block.

    Attributes:
        commits: Files at each commit of a model, oldest first, by the model's id.
        not_understood: Requests that are none of the interface here.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Files]] = {}
        self.not_understood: list[str] = []
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "HubStandIn":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """The value of HF_ENDPOINT for this hub."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def files(self, model: str) -> Files:
        """Return the files of a model on its main branch."""
        return list(self.commits[model].values())[-1]

    def environment(self, cache: str) -> dict[str, str]:
        """Return variables that make libraries of a new process use this hub, with an empty cache in a folder."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": cache,
            "HF_HUB_CACHE": f"{cache}/hub",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1",
        }

    def create(self, body: bytes) -> tuple[int, Any]:
        """Create a model; 409 if it exists."""
        options = json.loads(body)
        model = f"{options['organization']}/{options['name']}"
        if model in self.commits:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{model}"}
        self.commits[model] = {_hash(model.encode()): {}}
        return 200, {"url": f"{self.url}/{model}", "name": model}

    def validate(self, body: bytes) -> tuple[int, Any]:
        """Accept every model card."""
        return 200, {"errors": [], "warnings": []}

    def preupload(self, body: bytes, model: str, revision: str) -> tuple[int, Any]:
        """Say how files are uploaded: as part of a commit."""
        paths = [file["path"] for file in json.loads(body)["files"]]
        present = self.files(model)
        return 200, {"files": [
            {
                "path": path, "uploadMode": "regular", "shouldIgnore": False,
                "oid": _hash(present[path]) if path in present else None,
            }
            for path in paths
        ]}  # fmt: skip

    def commit(self, body: bytes, model: str, revision: str) -> tuple[int, Any]:
        """Add files to a model's main branch."""
        files = dict(self.files(model))
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] != "header":
                return 400, {"error": f"{line['key']} is no part of this stand-in"}
        parents = "".join(self.commits[model])
        commit = _hash(parents.encode() + b"".join(files.values()))
        self.commits[model][commit] = files
        return 200, {"commitUrl": f"{self.url}/{model}/commit/{commit}", "commitOid": commit}

    def info(self, model: str, revision: str | None = None) -> tuple[int, Any]:
        """Describe a model at a revision."""
        commit, files = self.at(model, revision or "main")
        siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
        return 200, {"id": model, "sha": commit, "siblings": siblings, "private": False, "tags": []}

    def tree(self, model: str, revision: str, folder: str | None = None) -> tuple[int, Any]:
        """List the files of a folder of a model."""
        prefix = f"{folder}/" if folder else ""
        files = {path: content for path, content in self.at(model, revision)[1].items() if path.startswith(prefix)}
        if not files:
            raise NotFoundError("EntryNotFound", f"{folder} is no folder of {model}")
        return 200, [
            {"type": "file", "path": path, "size": len(content), "oid": _hash(content)}
            for path, content in files.items()
        ]

    def at(self, model: str, revision: str) -> tuple[str, Files]:
        """Return commit and files of a model at a revision: a commit, or "main"."""
        if model not in self.commits:
            raise NotFoundError("RepoNotFound", f"there is no model {model}")
        commits = self.commits[model]
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            raise NotFoundError("RevisionNotFound", f"{model} has no revision {revision}")
        return commit, commits[commit]


class NotFoundError(Exception):
    """A thing that the hub lacks: the hub's code for it, and a message."""


def _hash(content: bytes) -> str:
    """Return the name that git gives a file of this content; it serves as a commit's too."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# Method and path of a request, and the function of `HubStandIn` that answers it with a status and a JSON value.
_ROUTES: list[tuple[str, str, Callable[..., tuple[int, Any]]]] = [
    ("POST", r"/api/repos/create", HubStandIn.create),
    ("POST", rf"/api/models/{_MODEL}/preupload/(?P<revision>[^/]+)", HubStandIn.preupload),
    ("POST", rf"/api/models/{_MODEL}/commit/(?P<revision>[^/]+)", HubStandIn.commit),
    ("POST", r"/api/validate-yaml", HubStandIn.validate),
    ("GET", rf"/api/models/{_MODEL}(?:/revision/(?P<revision>[^/]+))?", HubStandIn.info),
    ("GET", rf"/api/models/{_MODEL}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", HubStandIn.tree),
]
_FILE = re.compile(rf"/{_MODEL}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: HubStandIn) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


class _Handler(BaseHTTPRequestHandler):
    """Answers a request by the functions of the `HubStandIn` that its server has."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubStandIn:
        assert isinstance(self.server, _Server)
        return self.server.hub

    def do_GET(self) -> None:
        self.answer(b"")

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        try:
            if file := _FILE.fullmatch(path):
                self.send_file(**file.groupdict())
            else:
                self.send_json(*self.answer_api(path, body))
        except NotFoundError as error:
            code, message = error.args
            self.send_json(404, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def answer_api(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.command == "POST" and self.headers["Authorization"] != f"Bearer {TOKEN}" and "yaml" not in path:
            return 401, {"error": "Invalid credentials"}
        for method, pattern, function in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                return function(self.hub, *([body] if body else []), **match.groupdict())
        self.hub.not_understood.append(f"{self.command} {self.path}")
        return 501, {"error": "no part of this stand-in"}

    def send_file(self, model: str, revision: str, path: str) -> None:
        commit, files = self.hub.at(model, revision)
        if path not in files:
            raise NotFoundError("EntryNotFound", f"{model} has no {path}")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_hash(files[path])}"'}
        self.send(200, files[path], "application/octet-stream", headers)

    def send_json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), "application/json", headers or {})

    def send(self, status: int, content: bytes, kind: str, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""
