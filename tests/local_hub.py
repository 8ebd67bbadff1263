"""A Hub on this machine: the parts of the Hugging Face Hub's HTTP interface that huggingface_hub and datasets use.

Repositories live in a temporary folder and in memory, as a list of commits; a commit is a message and what every path
holds. It speaks: whoami, creating repositories, checking a card's metadata, asking how files are to be uploaded
(text in the commit, anything else as LFS), LFS uploads, commits as lines of JSON, listings, and downloads with the
headers that the cache is kept by. Private repositories exist for their owner alone, and only owners write.

    with local_hub() as hub:
        ...  # huggingface_hub talks to it, here and in subprocesses that inherit os.environ
        hub.repositories["model", "somebody/tiny"].commits[-1].files["README.md"]
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import transformers
import yaml
from huggingface_hub import constants

USER = "somebody"
TOKEN = "hf_of_somebody"
# A valid token of another user, who owns nothing here.
STRANGER, STRANGERS_TOKEN = "stranger", "hf_of_a_stranger"
# May read and not write.
READING_TOKEN = "hf_of_somebody_for_reading"
USERS = {TOKEN: USER, STRANGERS_TOKEN: STRANGER, READING_TOKEN: USER}

LFS_ABOVE = 200_000
LFS_SUFFIXES = (".safetensors", ".parquet", ".png")


@dataclass(frozen=True)
class File:
    """What a path holds in a commit."""

    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """As git names a blob."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        """As listings show a file."""
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.oid} | (
            {"lfs": lfs} if self.is_lfs else {}
        )


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    message: str
    files: dict[str, File]
    number: int

    @property
    def oid(self) -> str:
        state = [(path, file.oid) for path, file in sorted(self.files.items())]
        return hashlib.sha1(repr((self.number, self.message, state)).encode()).hexdigest()


@dataclass
class Repository:
    """A repository with its one branch."""

    repo_type: str
    repo_id: str
    private: bool
    commits: list[Commit] = field(default_factory=lambda: [Commit("initial commit", {}, 0)])

    def at(self, revision: str) -> Commit | None:
        if revision in ("main", "refs/convert/parquet"):
            return self.commits[-1] if revision == "main" else None
        return next((commit for commit in self.commits if commit.oid == revision), None)


class LocalHub:
    """The Hub's state: repositories, uploaded LFS objects, and what was asked of it."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.endpoint = ""

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """Path -> content in a repository's last commit."""
        newest = self.repositories[repo_type, repo_id].commits[-1]
        return {path: file.content for path, file in newest.files.items()}


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    """One request: a method and a pattern of the path, and what answers them."""

    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_request(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        else:
            body = self.rfile.read(length)
        url = urlsplit(self.path)
        try:
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, unquote(url.path))
                if match and self.command in method.split("|"):
                    return answer(self, body, parse_qs(url.query), **match.groupdict())
            raise _Refusal(404, f"Nothing answers {self.command} {self.path}")
        except _Refusal as refusal:
            code = {"X-Error-Code": refusal.code} if refusal.code else {}
            self.send({"error": refusal.message}, refusal.status, {"X-Error-Message": refusal.message} | code)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        is_json = not isinstance(content, bytes)
        data = json.dumps(content).encode() if is_json else content
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if is_json else "application/octet-stream")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return USERS.get(token)

    def repository(self, repo_type: str, repo_id: str, to_write: bool = False) -> Repository:
        found = self.hub.repositories.get((repo_type, repo_id))
        owner = repo_id.partition("/")[0]
        if found is None or (found.private and self.user != owner):
            raise _Refusal(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        if to_write:
            self.require_right(owner)
        return found

    def require_right(self, owner: str) -> None:
        if self.user is None:
            raise _Refusal(401, "Invalid username or password.")
        if self.user != owner or self.headers["Authorization"].endswith(READING_TOKEN):
            raise _Refusal(403, f"You don't have the rights to write under the namespace {owner!r}")

    def commit(self, repo_type: str, repo_id: str, revision: str) -> Commit:
        found = self.repository(repo_type, repo_id).at(revision)
        if found is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found


def _whoami(request: _Handler, body: bytes, query: dict[str, list[str]]) -> None:
    if request.user is None:
        raise _Refusal(401, "Invalid username or password.")
    request.send({"type": "user", "name": request.user, "fullname": request.user, "orgs": [], "auth": {}})


def _create(request: _Handler, body: bytes, query: dict[str, list[str]]) -> None:
    asked = json.loads(body)
    repo_type, owner = asked.get("type", "model"), asked.get("organization") or request.user
    if request.user is None:
        raise _Refusal(401, "Invalid username or password.")
    repo_id = f"{owner}/{asked['name']}"
    request.require_right(owner)
    url = f"{request.hub.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"
    if (repo_type, repo_id) in request.hub.repositories:
        return request.send({"error": "You already created this repo", "url": url}, 409)
    private = asked.get("private", False) or asked.get("visibility") == "private"
    request.hub.repositories[repo_type, repo_id] = Repository(repo_type, repo_id, private)
    return request.send({"url": url, "name": repo_id, "id": repo_id})


def _validate_yaml(request: _Handler, body: bytes, query: dict[str, list[str]]) -> None:
    front = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
    errors = [] if front else [{"message": "no metadata"}]
    try:
        data = yaml.safe_load(front[1]) if front else {}
        licence = data.get("license")
        if licence is not None and not re.fullmatch(r"[a-z0-9.-]+", licence):
            errors.append({"message": f'"license" is {licence!r}'})
        for model in data.get("model-index", []):
            if not model.get("name") or not model.get("results"):
                errors.append({"message": '"model-index[0].results" is required'})
    except yaml.YAMLError as error:
        errors.append({"message": str(error)})
    request.send({"errors": errors, "warnings": []}, 400 if errors else 200)


def _preupload(
    request: _Handler, body: bytes, query: dict[str, list[str]], repo_type: str, repo_id: str, revision: str
) -> None:
    request.repository(repo_type, repo_id, to_write=True)
    there = request.commit(repo_type, repo_id, revision).files
    answers = []
    for file in json.loads(body)["files"]:
        path = file["path"]
        is_lfs = path.endswith(LFS_SUFFIXES) or file["size"] > LFS_ABOVE
        oid = there[path].etag if path in there else None
        mode = "lfs" if is_lfs else "regular"
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    request.send({"files": answers})


def _lfs_batch(
    request: _Handler, body: bytes, query: dict[str, list[str]], repo_id: str, repo_type: str | None = None
) -> None:
    request.repository((repo_type or "models").removesuffix("s"), repo_id, to_write=True)
    objects = []
    for wanted in json.loads(body)["objects"]:
        url = f"{request.hub.endpoint}/objects/{wanted['oid']}"
        is_new = wanted["oid"] not in request.hub.objects
        objects.append(wanted | ({"actions": {"upload": {"href": url}}} if is_new else {}))
    request.send({"transfer": "basic", "objects": objects})


def _put_object(request: _Handler, body: bytes, query: dict[str, list[str]], oid: str) -> None:
    if hashlib.sha256(body).hexdigest() != oid:
        raise _Refusal(400, "The content does not have the hash that was announced")
    request.hub.objects[oid] = body
    request.send({})


def _commit(
    request: _Handler, body: bytes, query: dict[str, list[str]], repo_type: str, repo_id: str, revision: str
) -> None:
    repository = request.repository(repo_type, repo_id, to_write=True)
    before = request.commit(repo_type, repo_id, revision)
    files, message = dict(before.files), ""
    for line in body.splitlines():
        operation = json.loads(line)
        value = operation["value"]
        if operation["key"] == "header":
            message = value["summary"]
        elif operation["key"] == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
        elif operation["key"] == "lfsFile":
            files[value["path"]] = File(request.hub.objects[value["oid"]], is_lfs=True)
        elif operation["key"] == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise _Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise _Refusal(400, f"Unknown operation {operation['key']}")
    repository.commits.append(Commit(message, files, len(repository.commits)))
    oid = repository.commits[-1].oid
    prefix = "" if repo_type == "model" else f"{repo_type}s/"
    request.send({"commitUrl": f"{request.hub.endpoint}/{prefix}{repo_id}/commit/{oid}", "commitOid": oid})


def _info(
    request: _Handler, body: bytes, query: dict[str, list[str]], repo_type: str, repo_id: str, revision: str = "main"
) -> None:
    repository, commit = request.repository(repo_type, repo_id), request.commit(repo_type, repo_id, revision)
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    about = {"id": repo_id, "author": repo_id.partition("/")[0], "sha": commit.oid, "private": repository.private}
    more = {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False}
    request.send(about | more | {"lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z"})


def _refs(request: _Handler, body: bytes, query: dict[str, list[str]], repo_type: str, repo_id: str) -> None:
    newest = request.repository(repo_type, repo_id).commits[-1]
    branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": newest.oid}
    request.send({"branches": [branch], "converts": [], "tags": [], "pullRequests": []})


def _tree(
    request: _Handler,
    body: bytes,
    query: dict[str, list[str]],
    repo_type: str,
    repo_id: str,
    revision: str,
    folder: str = "",
) -> None:
    files = request.commit(repo_type, repo_id, revision).files
    inside = {path: file for path, file in files.items() if not folder or path.startswith(f"{folder}/")}
    if folder and not inside:
        raise _Refusal(404, f"{folder} does not exist", "EntryNotFound")
    recursive = query.get("recursive", ["False"])[0].lower() in ("true", "1")
    entries, folders = [], {}
    for path, file in sorted(inside.items()):
        parts = path[len(folder) + 1 if folder else 0 :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            name = "/".join([*([folder] if folder else []), *parts[:depth]])
            folders[name] = {
                "type": "directory",
                "path": name,
                "oid": hashlib.sha1(name.encode()).hexdigest(),
                "size": 0,
            }
        if recursive or len(parts) == 1:
            entries.append(file.entry(path))
    request.send([*folders.values(), *entries])


def _paths_info(
    request: _Handler, body: bytes, query: dict[str, list[str]], repo_type: str, repo_id: str, revision: str
) -> None:
    files = request.commit(repo_type, repo_id, revision).files
    is_json = "json" in (request.headers.get("Content-Type") or "")
    asked = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
    answers = []
    for path in [asked] if isinstance(asked, str) else asked:
        if path in files:
            answers.append(files[path].entry(path))
        elif any(name.startswith(f"{path}/") for name in files):
            oid = hashlib.sha1(path.encode()).hexdigest()
            answers.append({"type": "directory", "path": path, "oid": oid, "size": 0})
    request.send(answers)


def _resolve(
    request: _Handler,
    body: bytes,
    query: dict[str, list[str]],
    repo_id: str,
    revision: str,
    path: str,
    repo_type: str | None = None,
) -> None:
    commit = request.commit((repo_type or "models").removesuffix("s"), repo_id, revision)
    headers = {"X-Repo-Commit": commit.oid}
    if path not in commit.files:
        headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return request.send({"error": "Entry not found"}, 404, headers)
    file = commit.files[path]
    headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    if file.is_lfs:
        headers |= {"X-Linked-Size": str(len(file.content)), "X-Linked-Etag": f'"{file.sha256}"'}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if asked is None or request.command == "HEAD":
        return request.send(file.content, 200, headers)
    first, last = int(asked[1]), int(asked[2] or len(file.content) - 1)
    headers["Content-Range"] = f"bytes {first}-{min(last, len(file.content) - 1)}/{len(file.content)}"
    return request.send(file.content[first : last + 1], 206, headers)


_API = r"/api/(?P<repo_type>model|dataset|space)s/(?P<repo_id>[^/]+/[^/]+)"
_REPOSITORY = r"/(?:(?P<repo_type>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+)"
_REVISION = r"/(?P<revision>refs/convert/parquet|[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", _whoami),
    ("POST", r"/api/repos/create", _create),
    ("POST", r"/api/validate-yaml", _validate_yaml),
    ("POST", _API + r"/preupload" + _REVISION, _preupload),
    ("POST", _API + r"/commit" + _REVISION, _commit),
    ("GET", _API + r"/revision" + _REVISION, _info),
    ("GET", _API + r"/refs", _refs),
    ("GET", _API + r"/tree" + _REVISION + r"(?:/(?P<folder>.+))?", _tree),
    ("POST", _API + r"/paths-info" + _REVISION, _paths_info),
    ("GET", _API, _info),
    ("POST", _REPOSITORY + r"\.git/info/lfs/objects/batch", _lfs_batch),
    ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", _put_object),
    ("GET|HEAD", _REPOSITORY + r"/resolve" + _REVISION + r"/(?P<path>.+)", _resolve),
]


@contextmanager
def local_hub(home: Path, token: str | None = TOKEN) -> Iterator[LocalHub]:
    """
    Runs a Hub, and makes it the one that huggingface_hub talks to: in this process, and in those that it starts.

    Args:
        home: folder for caches, which a subprocess takes for the user's Hugging Face folder.
        token: that is logged in with; `None` for nobody.
    """
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    hidden = ["HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN_PATH", "HF_TOKEN"]
    # This process read its environment when huggingface_hub was imported.
    settings = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }
    with patch.dict(os.environ, environment), patch.multiple(constants, **settings):
        for name in hidden:
            os.environ.pop(name, None)
        if token is not None:
            os.environ["HF_TOKEN"] = token
        # Clients that huggingface_hub and transformers made before, and keep.
        with (
            patch.object(huggingface_hub.hf_api.api, "endpoint", hub.endpoint),
            patch.object(transformers.utils.hub, "_hf_api", None),
        ):
            try:
                yield hub
            finally:
                server.shutdown()
                server.server_close()
