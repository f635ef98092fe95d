"""A small Hub on this machine, for tests: creates, fills and serves repositories as huggingface_hub asks it to.

Models, datasets and Spaces share their names here; the Hub keeps them apart.

    root/lfs/<sha256>                      what was uploaded as a large file
    root/repos/<owner>/<name>/<commit>/    the files of each commit, as they are

Weights go the way of large files (LFS), everything else inside the commit. Clients need HF_ENDPOINT at `server.url`
and HF_HUB_DISABLE_XET=1: the other store of large files needs a service of its own.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


LICENSES = ("apache-2.0", "mit", "mpl-2.0", "other", "unknown")  # of the Hub's list
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")
REPO = r"(?P<repo>[^/]+/[^/]+?)"
API = rf"/api/(?:models|datasets|spaces)/{REPO}"
Reply = tuple[int, Any, dict[str, str]]


@dataclass
class Repo:
    """One repository: who owns it, where its branches point, its commits in order."""

    owner: str
    private: bool
    sdk: str | None = None  # of a Space
    variables: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class Refusal(Exception):
    """Ends a request with a status, and the header by which huggingface_hub tells the cases apart."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None):
        headers = {"X-Error-Message": message}
        if code is not None:
            headers["X-Error-Code"] = code
        if commit is not None:
            headers["X-Repo-Commit"] = commit
        self.reply: Reply = (status, {"error": message}, headers)


class HubServer:
    """Serves `root` until closed; a context manager.

    Args:
        users: owner by token; a token that ends in `read` may not write.

    Attributes:
        url: for HF_ENDPOINT.
        requests: method and path of everything that was asked.
        broken: a status for every upload of a large file, where set.
    """

    def __init__(self, root: Path, users: dict[str, str]):
        self.root, self.users = root, users
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.broken: int | None = None
        (root / "lfs").mkdir(parents=True)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        # polled often: shutdown waits for the poll, half a second by default
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def folder(self, repo_id: str, revision: str = "main") -> Path:
        """Where the files of a branch or commit lie."""
        repo = self.repos[repo_id]
        return self.root / "repos" / repo_id / repo.branches.get(revision, revision)

    # -- what every request goes through

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Reply:
        with self._lock:
            self.requests.append((method, path))
            try:
                token = (headers.get("Authorization") or "").removeprefix("Bearer ")
                if token and token not in self.users:
                    raise Refusal(401, "Invalid credentials in Authorization header")
                for verbs, pattern, handler in ROUTES:
                    match = re.fullmatch(pattern, unquote(path))
                    if method in verbs and match:
                        return handler(self, token, body, **match.groupdict())
                raise Refusal(404, f"this Hub does not know {method} {path}")
            except Refusal as refusal:
                return refusal.reply

    def _repo(self, repo_id: str, token: str, write: bool = False) -> Repo:
        repo, user = self.repos.get(repo_id), self.users.get(token)
        if repo is None or (repo.private and user != repo.owner):
            # as on the Hub: who may not see a repository is not told whether it exists
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refusal(401, "Invalid username or password")
        if write and (user != repo.owner or token.endswith("read")):
            raise Refusal(403, f"Forbidden: pass a token of {repo.owner} that may write")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str:
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # -- repositories

    def create(self, token: str, body: bytes) -> Reply:
        asked, user = json.loads(body), self.users.get(token)
        owner = asked.get("organization") or user
        if user is None:
            raise Refusal(401, "Invalid username or password")
        if owner != user or token.endswith("read"):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner}")
        repo_id = f"{owner}/{asked['name']}"
        url = {"url": f"{self.url}/{repo_id}"}
        if repo_id in self.repos:
            return 409, {"error": "You already created this model repo", **url}, {}
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repos[repo_id] = Repo(owner, private, asked.get("sdk"))
        self._add_commit(repo_id, "main", None, {".gitattributes": b"*.safetensors filter=lfs\n"}, [])
        return 200, url, {}

    def variable(self, token: str, body: bytes, repo: str) -> Reply:
        asked, found = json.loads(body), self._repo(repo, token, write=True)
        if found.sdk is None:
            raise Refusal(404, "Space not found", "RepoNotFound")
        found.variables[asked["key"]] = asked["value"]
        return 200, {name: {"key": name, "value": value} for name, value in found.variables.items()}, {}

    def branch(self, token: str, body: bytes, repo: str, name: str) -> Reply:
        found = self._repo(repo, token, write=True)
        found.branches[name] = self._commit_of(found, json.loads(body or b"{}").get("startingPoint", "main"))
        return 200, {}, {}

    def info(self, token: str, body: bytes, repo: str, revision: str | None = None) -> Reply:
        found = self._repo(repo, token)
        commit = self._commit_of(found, revision or "main")
        files = [{"rfilename": name} for name in self._files(repo, commit)]
        return 200, {"id": repo, "sha": commit, "private": found.private, "siblings": files, "tags": []}, {}

    def tree(self, token: str, body: bytes, repo: str, revision: str, under: str | None = None) -> Reply:
        commit = self._commit_of(self._repo(repo, token), revision)
        files = {name: path for name, path in self._files(repo, commit).items() if name.startswith(under or "")}
        if under and not files:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit)
        return 200, [*_folders(files, under), *(_entry(name, path) for name, path in files.items())], {}

    def paths_info(self, token: str, body: bytes, repo: str, revision: str) -> Reply:
        files = self._files(repo, self._commit_of(self._repo(repo, token), revision))
        asked = json.loads(body)["paths"]
        folders = [folder for folder in _folders(files) if folder["path"] in asked]
        return 200, folders + [_entry(name, files[name]) for name in asked if name in files], {}

    # -- upload

    def validate_yaml(self, token: str, body: bytes) -> Reply:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(header[1]) if header else {}
            known = isinstance(metadata, dict) and metadata.get("license") in (None, *LICENSES)
            problem = None if known else f'"license" must be one of {", ".join(LICENSES)}'
        except yaml.YAMLError as error:
            problem = str(error)
        return (400, {"errors": [{"message": problem}]}, {}) if problem else (200, {"errors": [], "warnings": []}, {})

    def preupload(self, token: str, body: bytes, repo: str, revision: str) -> Reply:
        commit = self._commit_of(self._repo(repo, token, write=True), revision)
        there = self._files(repo, commit)
        files = []
        for file in json.loads(body)["files"]:
            name = file["path"]
            mode = "lfs" if name.endswith(LFS_SUFFIXES) else "regular"
            known = _oid(name, there[name].read_bytes()) if name in there else None
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return 200, {"files": files}, {}

    def lfs_batch(self, token: str, body: bytes, repo: str) -> Reply:
        self._repo(repo, token, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if not (self.root / "lfs" / asked["oid"]).exists():
                href = f"{self.url}/lfs/{asked['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_put(self, token: str, body: bytes, oid: str) -> Reply:
        if self.broken is not None:
            raise Refusal(self.broken, "the store of large files is out of order")
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content does not have the hash it was announced with")
        (self.root / "lfs" / oid).write_bytes(body)
        return 200, b"", {}

    def lfs_verify(self, token: str, body: bytes, oid: str) -> Reply:
        path = self.root / "lfs" / oid
        if not path.exists() or path.stat().st_size != json.loads(body)["size"]:
            raise Refusal(404, "no such object")
        return 200, {}, {}

    def commit(self, token: str, body: bytes, repo: str, revision: str) -> Reply:
        found = self._repo(repo, token, write=True)
        if revision not in found.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        added: dict[str, bytes | Path] = {}
        deleted = []
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                added[value["path"]] = self.root / "lfs" / value["oid"]
            elif operation["key"] == "deletedFile":
                deleted.append(value["path"])
        commit = self._add_commit(repo, revision, found.branches[revision], added, deleted)
        return 200, {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{repo}/commit/{commit}"}, {}

    def _add_commit(
        self, repo_id: str, branch: str, parent: str | None, added: dict[str, Any], deleted: list[str]
    ) -> str:
        repo = self.repos[repo_id]
        commit = hashlib.sha1(f"{repo_id} {len(repo.commits)}".encode()).hexdigest()
        folder = self.root / "repos" / repo_id / commit
        if parent is None:
            folder.mkdir(parents=True)
        else:
            shutil.copytree(folder.parent / parent, folder)
        for name in deleted:
            (folder / name).unlink()
            for above in (folder / name).relative_to(folder).parents[:-1]:  # git knows no empty folders
                if not any((folder / above).iterdir()):
                    (folder / above).rmdir()
        for name, content in added.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content.read_bytes() if isinstance(content, Path) else content)
        repo.commits.append(commit)
        repo.branches[branch] = commit
        return commit

    # -- download

    def resolve(self, token: str, body: bytes, repo: str, revision: str, name: str) -> Reply:
        commit = self._commit_of(self._repo(repo, token), revision)
        path = self._files(repo, commit).get(name)
        if path is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit)
        content = path.read_bytes()
        return 200, content, {"ETag": f'"{_oid(name, content)}"', "X-Repo-Commit": commit}

    def _files(self, repo_id: str, commit: str) -> dict[str, Path]:
        folder = self.root / "repos" / repo_id / commit
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _oid(name: str, content: bytes) -> str:
    if name.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # git's


def _entry(name: str, path: Path) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _oid(name, path.read_bytes())}


def _folders(files: dict[str, Path], under: str | None = None) -> list[dict[str, Any]]:
    names = sorted({parent.as_posix() for name in files for parent in Path(name).parents} - {".", under})
    return [{"type": "directory", "path": name, "oid": "0" * 40} for name in names]


ROUTES: list[tuple[tuple[str, ...], str, Callable[..., Reply]]] = [
    (("POST",), "/api/repos/create", HubServer.create),
    (("POST",), "/api/validate-yaml", HubServer.validate_yaml),
    (("POST",), rf"/api/spaces/{REPO}/variables", HubServer.variable),
    (("POST",), rf"{API}/branch/(?P<name>.+)", HubServer.branch),
    (("POST",), rf"{API}/preupload/(?P<revision>[^/]+)", HubServer.preupload),
    (("POST",), rf"{API}/commit/(?P<revision>[^/]+)", HubServer.commit),
    (("POST",), rf"{API}/paths-info/(?P<revision>[^/]+)", HubServer.paths_info),
    (("GET",), rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<under>.+))?", HubServer.tree),
    (("GET",), rf"{API}(?:/revision/(?P<revision>[^/]+))?", HubServer.info),
    (("POST",), rf"/(?:datasets/)?{REPO}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", HubServer.lfs_put),
    (("POST",), "/lfs/(?P<oid>[0-9a-f]{64})/verify", HubServer.lfs_verify),
    (("GET", "HEAD"), rf"/(?:datasets/|spaces/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", HubServer.resolve),
]


def _handler_of(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def serve(self) -> None:
            body = self._body()
            status, content, headers = hub.answer(self.command, urlsplit(self.path).path, self.headers, body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if status == 200 and asked:
                first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
                headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
                status, data = 206, data[first : last + 1]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def log_message(self, format: str, *args: Any) -> None:
            pass

        do_GET = do_HEAD = do_POST = do_PUT = serve

    return Handler
