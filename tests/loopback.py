"""A server on this machine that speaks as much of the Hub's HTTP API as the real client asks of it.

Repos, branches, pull requests, private repos, LFS; a commit is atomic, as the Hub's are. Nothing is on disk.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_owner": "me", "hf_other": "somebody"}
_LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".model")
_TYPES = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}


@dataclass
class Repo:
    """
    Attributes:
        refs: branch, or `refs/pr/1` -> commit.
        commits: commit -> path -> SHA-256 of the content.
    """

    kind: str
    name: str
    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    def commit(self, ref: str, files: dict[str, str], message: str) -> str:
        made_of = json.dumps([sorted(files.items()), message, len(self.commits)])
        sha = hashlib.sha1(made_of.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        self.messages.append(message)
        return sha

    def sha_of(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def paths(self, revision: str = "main") -> list[str]:
        return sorted(self.commits[self.refs[revision]])


class LoopbackHub:
    """The state of the server, which tests look into.

    Attributes:
        requests: method and path of all that was asked.
        breaks_at: told method and path of a request; where it says True the connection is cut without an answer.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.breaks_at: Callable[[str, str], bool] = lambda method, path: False
        self.lock = threading.Lock()
        self.endpoint = ""

    def repo(self, name: str, kind: str = "models") -> Repo:
        return self.repos[kind, name]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is what some tests are about."""


@contextmanager
def serve() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Answer(Exception):
    def __init__(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        super().__init__()
        self.status, self.body, self.headers = status, body, headers or {}


def _error(status: int, message: str, code: str | None = None) -> _Answer:
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return _Answer(status, {"error": message}, headers)


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(length) if length else self._chunked()
        url = urlsplit(self.path)
        self.hub.requests.append((self.command, url.path))
        if self.hub.breaks_at(self.command, url.path):
            self.close_connection = True
            return
        try:
            with self.hub.lock:
                self._route(url.path, parse_qs(url.query), data)
            raise _error(404, f"no such page: {self.command} {url.path}", "EntryNotFound")
        except _Answer as answer:
            with suppress(ConnectionError):  # the client was killed
                self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _chunked(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return b""
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: _Answer) -> None:
        body = answer.body
        if not isinstance(body, bytes):
            body = b"" if body is None else json.dumps(body).encode()
            answer.headers.setdefault("Content-Type", "application/json")
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # --- Who asks, and for what ---

    @property
    def user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = TOKENS.get(header.removeprefix("Bearer "))
        if user is None:
            raise _error(401, "Invalid credentials in Authorization header")
        return user

    def _repo(self, kind: str, name: str, *, write: bool = False) -> Repo:
        repo, user = self.hub.repos.get((kind, name)), self.user
        hidden = repo is None or (repo.private and user != repo.owner)
        if hidden:
            raise _error(401 if user is None else 404, "Repository not found", "RepoNotFound")
        assert repo is not None
        if write and user != repo.owner:
            raise _error(401 if user is None else 403, "You don't have the rights to write to this repo")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        sha = repo.sha_of(unquote(revision))
        if sha is None:
            raise _error(404, f"Invalid rev id: {unquote(revision)}", "RevisionNotFound")
        return sha

    # --- Routes ---

    def _route(self, path: str, query: dict[str, list[str]], data: bytes) -> None:
        if path == "/api/whoami-v2":
            if self.user is None:
                raise _error(401, "Invalid username or password.")
            raise _Answer(200, {"type": "user", "name": self.user, "orgs": [], "auth": {}})
        if path == "/api/repos/create":
            self._create(json.loads(data))
        if path == "/api/validate-yaml":
            raise _Answer(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            if hashlib.sha256(data).hexdigest() != match[1]:
                raise _error(400, "the content is not what was announced")
            self.hub.blobs[match[1]] = data
            raise _Answer(200)
        if path == "/lfs-verify":
            raise _Answer(200 if json.loads(data)["oid"] in self.hub.blobs else 404, {})
        if match := re.fullmatch(r"/(datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            # Also for a pull request of somebody who may not write.
            self._lfs(self._repo((match[1] or "models/").rstrip("/"), match[2]), json.loads(data))
        if match := re.fullmatch(r"/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(self._repo((match[1] or "models/").rstrip("/"), match[2]), match[3], unquote(match[4]))
        if match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(.*))?", path):
            self._api(match[1], match[2], match[3] or "", query, data)

    def _create(self, asked: dict[str, Any]) -> None:
        user = self.user
        if user is None:
            raise _error(401, "Invalid username or password.")
        kind = (asked.get("type") or "model") + "s"
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        url = f"{self.hub.endpoint}/{_TYPES[kind]}{name}"
        if (kind, name) in self.hub.repos:
            raise _Answer(409, {"error": "You already created this repo", "url": url, "id": name})
        if owner != user:
            raise _error(403, f"You don't have the rights to create a {asked.get('type')} under {owner}")
        repo = Repo(kind, name, private=asked.get("private") is True or asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": self._store(b"*.safetensors filter=lfs\n")}, "initial commit")
        self.hub.repos[kind, name] = repo
        raise _Answer(200, {"url": url, "name": name, "id": name})

    def _api(self, kind: str, name: str, rest: str, query: dict[str, list[str]], data: bytes) -> None:
        action, _, argument = rest.partition("/")
        writes = self.command == "POST" and action in ("commit", "preupload", "branch")
        # Anybody who can read may open a pull request.
        repo = self._repo(kind, name, write=writes and "create_pr" not in query)
        if action in ("", "revision"):
            sha = self._commit(repo, argument or "main")
            files = [{"rfilename": path} for path in sorted(repo.commits[sha])]
            raise _Answer(
                200, {"_id": name, "id": name, "sha": sha, "siblings": files, "private": repo.private, "tags": []}
            )
        if action == "refs":
            heads = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repo.refs.items()
            ]
            raise _Answer(200, {"branches": heads, "tags": [], "converts": []})
        if action == "tree":
            revision, _, folder = argument.partition("/")
            self._tree(repo, self._commit(repo, revision), unquote(folder), "recursive" in query)
        if action == "preupload":
            present = repo.commits[self._commit(repo, argument)]
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(_LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": present.get(file["path"]),
                }
                for file in json.loads(data)["files"]
            ]
            raise _Answer(200, {"files": files})
        if action == "branch":
            branch = unquote(argument)
            if branch in repo.refs:
                raise _error(409, f"Reference already exists: {branch}")
            repo.refs[branch] = self._commit(repo, json.loads(data or b"{}").get("startingPoint") or "main")
            raise _Answer(201, {})
        if action == "commit":
            self._new_commit(repo, unquote(argument), data, create_pr="create_pr" in query)

    def _new_commit(self, repo: Repo, ref: str, data: bytes, *, create_pr: bool) -> None:
        parent = self._commit(repo, ref)
        files = dict(repo.commits[parent])
        message = ""
        for line in data.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise _error(412, "A commit has happened since")
            elif item["key"] == "file":
                files[value["path"]] = self._store(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise _error(400, f"the LFS object of {value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _error(400, f"unknown operation {item['key']}")
        url = f"{self.hub.endpoint}/{_TYPES[repo.kind]}{repo.name}"
        answer: dict[str, Any] = {}
        if create_pr:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        sha = repo.commit(ref, files, message)
        raise _Answer(200, {**answer, "commitUrl": f"{url}/commit/{sha}", "commitOid": sha, "success": True})

    def _tree(self, repo: Repo, sha: str, folder: str, recursive: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = {path: oid for path, oid in repo.commits[sha].items() if path.startswith(prefix)}
        if folder and not inside:
            raise _error(404, f"{folder} does not exist", "EntryNotFound")
        entries: dict[str, dict[str, Any]] = {}
        for path, oid in sorted(inside.items()):
            below = path[len(prefix) :].split("/")
            if len(below) > 1 and not recursive:
                directory = prefix + below[0]
                entries[directory] = {"type": "directory", "path": directory, "oid": "0" * 40, "size": 0}
                continue
            size = len(self.hub.blobs[oid])
            lfs = {"lfs": {"oid": oid, "size": size, "pointerSize": 130}} if path.endswith(_LFS_SUFFIXES) else {}
            entries[path] = {"type": "file", "path": path, "oid": oid[:40], "size": size, **lfs}
        raise _Answer(200, list(entries.values()))

    def _lfs(self, repo: Repo, asked: dict[str, Any]) -> None:
        objects = []
        for own in asked["objects"]:
            entry = {"oid": own["oid"], "size": own["size"]}
            if own["oid"] not in self.hub.blobs:
                actions = {"upload": f"lfs/{own['oid']}", "verify": "lfs-verify"}
                entry["actions"] = {name: {"href": f"{self.hub.endpoint}/{to}"} for name, to in actions.items()}
            objects.append(entry)
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        sha = self._commit(repo, revision)
        oid = repo.commits[sha].get(path)
        if oid is None:
            raise _Answer(404, None, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        content = self.hub.blobs[oid]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if path.endswith(_LFS_SUFFIXES):
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            raise _Answer(206, content[first : last + 1], headers)
        raise _Answer(200, content, headers)

    def _store(self, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        self.hub.blobs[oid] = content
        return oid
