"""A stand-in for the Hugging Face Hub on loopback, for tests that push and load with the real client.

It speaks as much of the Hub's HTTP as `huggingface_hub`, `peft`, `transformers` and `datasets` use to create a model
or dataset repo, upload to it, list it and download from it at any revision. Repos live in memory. In a test:

    with HubStandIn() as hub:
        sha = hub.run("...; print(json.dumps(model.push_to_hub('me/adapter').oid))", hf_home=tmp_path / "writer")
        subprocess.run([...], env=hub.environment(tmp_path / "reader"), check=True)
        assert hub.files("me/adapter").keys() >= {"adapter_config.json"}

Clients belong in child processes: `huggingface_hub` reads `HF_ENDPOINT` and its cache folders when it is imported.
`patch_client` serves the cases in which a child process is too much.

Not here: pull requests, spaces, gated repos, pagination, multipart uploads, and Xet. The installed client decides on
Xet by itself, without asking the server: if `hf_xet` can be imported and `HF_HUB_DISABLE_XET` is unset, every upload
goes to a content-addressed store, and there is no fall-back. So `environment` sets `HF_HUB_DISABLE_XET=1`, which
leaves the other documented route: preupload, Git LFS batch, one PUT per object, commit. Downloads need no such
switch: the client takes them over Xet only if the server sends `X-Xet-Hash`, and this one does not.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.message import Message
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

if TYPE_CHECKING:
    import pytest

HOST = "127.0.0.1"
LFS_SUFFIXES = (".arrow", ".bin", ".gguf", ".npy", ".npz", ".parquet", ".pt", ".pth", ".safetensors", ".zip")
LFS_SIZE = 10 * 1024 * 1024  # bytes; larger files are LFS whatever their name, as on the Hub
URL_PREFIX = {"model": "", "dataset": "datasets/"}


class Call(NamedTuple):
    """One line of the request log; `path` keeps its query and its percent-encoding."""

    method: str
    path: str
    status: int


@dataclass(frozen=True)
class File:
    """A file of a commit, and how it is stored."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What Git itself stores for an LFS file."""
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {self.size}")
        return "".join(f"{line}\n" for line in lines).encode()

    @cached_property
    def blob_id(self) -> str:
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    """An immutable revision."""

    sha: str
    title: str
    message: str
    date: str
    parent: Commit | None
    files: Mapping[str, File]


@dataclass
class Repo:
    """A model or dataset repo: its commits, what points at them, and its LFS objects by sha256."""

    name: str
    repo_type: str
    private: bool
    created: str
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def web_path(self) -> str:
        return f"/{URL_PREFIX[self.repo_type]}{self.name}"

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a commit hash stands for."""
        for table in (self.branches, self.tags, self.commits):
            if revision in table:
                return table[revision]
        raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    def commit(self, files: Mapping[str, File], title: str, message: str = "", branch: str = "main") -> Commit:
        """Put a new revision with exactly `files` on a branch."""
        parent, date = self.branches.get(branch), _now()
        listing = [(path, file.blob_id) for path, file in sorted(files.items())]
        identity = repr((self.web_path, len(self.commits), parent and parent.sha, title, message, date, listing))
        sha = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[sha] = self.branches[branch] = Commit(sha, title, message, date, parent, dict(files))
        return self.commits[sha]


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # percent-encoded, so that a branch with a slash stays one segment
    query: dict[str, list[str]]
    headers: Message
    body: bytes
    user: str | None = None

    def json(self) -> Any:
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("1", "true")


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_json(cls, payload: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
        return cls(status, json.dumps(payload).encode(), {"Content-Type": "application/json", **(headers or {})})


class HubError(Exception):
    """An answer the client turns into an exception; `code` picks which (`RepoNotFound`, `EntryNotFound`, ...)."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        **body: Any,
    ) -> None:
        super().__init__(message)
        # HEAD answers have no body: there the message only reaches the client in a header, which must be latin-1.
        sent = {"X-Error-Message": message.encode("ascii", "replace").decode(), **(headers or {})}
        if code is not None:
            sent["X-Error-Code"] = code
        self.reply = Reply.of_json({"error": message, **body}, status, sent)


API = r"/api/(?P<repo_type>model|dataset)s/(?P<name>[^/]+/[^/]+)"
WEB = r"/(?:(?P<repo_type>dataset)s/)?(?P<name>[^/]+/[^/]+?)"
REVISION = r"/(?P<revision>[^/]+)"
Answer = Callable[..., Reply]
ROUTES: list[tuple[frozenset[str], re.Pattern[str], Answer, bool]] = []


def route(methods: str, pattern: str, *, write: bool = False) -> Callable[[Answer], Answer]:
    """Register a method of `HubStandIn`. It gets the request, and the pattern's groups with `name` made a `repo`."""

    def register(function: Answer) -> Answer:
        ROUTES.append((frozenset(methods.split()), re.compile(pattern + r"\Z"), function, write))
        return function

    return register


class HubStandIn:
    """The stand-in: a server on its own thread while the context is open.

    Args:
        user: owner of `token`, and the only namespace it may write to.
        token: the one token that is accepted; random if not given.
        port: 0 takes a free one.
    """

    def __init__(self, user: str = "me", token: str | None = None, port: int = 0) -> None:
        self.user = user
        self.token = token or f"hf_{secrets.token_hex(16)}"
        self.log: list[Call] = []
        self.failures: list[str] = []  # tracebacks of the stand-in's own bugs; leaving the context raises them
        self._repos: dict[tuple[str, str], Repo] = {}
        self._uploads: dict[str, tuple[Repo, str, int]] = {}  # ticket -> repo, oid, size
        self._lock = threading.RLock()
        self._server = _Server((HOST, port), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    # ---------------------------------------------------------------- for tests

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self._server.server_address[1]}"

    @property
    def foreign_calls(self) -> list[Call]:
        """What clients tried to reach elsewhere; each was refused (see `environment`)."""
        return [call for call in self.log if not call.path.startswith("/")]

    def __enter__(self) -> HubStandIn:
        self._thread.start()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        if self.failures and exc_type is None:
            raise AssertionError("the Hub stand-in failed:\n" + "\n".join(self.failures))

    def environment(self, hf_home: str | os.PathLike[str], *, token: str | bool = True) -> dict[str, str]:
        """The whole environment of a child process whose Hub is this one.

        Args:
            hf_home: the child's caches; give each role its own, so that nothing is shared but the Hub.
            token: True for the accepted one, False for an anonymous client, or any other string.

        The client's proxy is the stand-in as well: a request for any other host comes here, is logged and refused,
        instead of leaving the machine. `datasets` makes one: it asks `datasets-server.<host of the Hub>` whether the
        repo has been converted to Parquet, and takes every error for a no.
        """
        ours = re.compile(r"(HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS|DATASETS)_.*|.*_PROXY", re.IGNORECASE)
        environment = {name: value for name, value in os.environ.items() if not ours.fullmatch(name)}
        environment |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": os.fspath(hf_home),
            "HF_HUB_DISABLE_XET": "1",  # see the module's docstring
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # `datasets` would count its downloads at a fixed S3 address
            "no_proxy": HOST,
            **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), self.endpoint),
        }
        if token:
            environment["HF_TOKEN"] = self.token if token is True else token
        return environment

    def run(
        self,
        script: str,
        *arguments: object,
        hf_home: str | os.PathLike[str],
        token: str | bool = True,
        timeout: float = 300,
    ) -> Any:
        """Run Python source in a child process and return the last line that it printed, read as JSON."""
        command = [sys.executable, "-c", script, *map(str, arguments)]
        environment = self.environment(hf_home, token=token)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode != 0:
            calls = "\n".join(" ".join(map(str, call)) for call in self.log)
            raise AssertionError(f"child process failed:\n{done.stdout}\n{done.stderr}\nrequests so far:\n{calls}")
        return json.loads(done.stdout.splitlines()[-1])

    def patch_client(self, monkeypatch: pytest.MonkeyPatch, hf_home: str | os.PathLike[str]) -> None:
        """Point the client of this very process here, until `monkeypatch` is undone.

        Second best to a child process. It covers the functions of `huggingface_hub` (and so `peft`), and
        `transformers` and `datasets` if they are imported by then: the places where they keep the endpoint.
        """
        from huggingface_hub import close_session, constants, hf_api

        home = os.fspath(hf_home)
        cache = os.path.join(home, "hub")
        monkeypatch.setenv("HF_TOKEN", self.token)
        monkeypatch.setenv("no_proxy", HOST)
        close_session()  # a session keeps the proxies of the moment it was opened
        for name, value in {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HOME": home,
            "HF_HUB_CACHE": cache,
            "HUGGINGFACE_HUB_CACHE": cache,
            "HF_TOKEN_PATH": os.path.join(home, "token"),
            "AGENT_HARNESSES_PATH": os.path.join(home, ".agent_harnesses.json"),
        }.items():
            monkeypatch.setattr(constants, name, value, raising=False)
        # `huggingface_hub.create_repo` and its like are methods of this one object, made at import.
        monkeypatch.setattr(hf_api.api, "endpoint", self.endpoint)
        if "transformers" in sys.modules:
            monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        if "datasets" in sys.modules:
            for name, value in {
                "HF_ENDPOINT": self.endpoint,
                "HUB_DATASETS_URL": self.endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}",
                "HF_HUB_OFFLINE": False,
                "HF_DATASETS_OFFLINE": False,
                "HF_UPDATE_DOWNLOAD_COUNTS": False,
                "USE_PARQUET_EXPORT": False,  # would look up the host `datasets-server.<host>`
                "HF_DATASETS_CACHE": Path(home, "datasets"),
                "DOWNLOADED_DATASETS_PATH": Path(home, "datasets", "downloads"),
            }.items():
                monkeypatch.setattr(f"datasets.config.{name}", value)

    def add(
        self, name: str, files: Mapping[str, str | bytes], *, repo_type: str = "model", private: bool = False
    ) -> str:
        """Commit files to a repo of any owner without a client, creating it if need be; returns the commit hash."""
        with self._lock:
            repo = self._repos.get((repo_type, name)) or self._create(name, repo_type, private)
            kept = dict(repo.branches["main"].files)
            for path, content in files.items():
                data = content.encode() if isinstance(content, str) else content
                kept[path] = file = File(data, lfs=_is_lfs(path, len(data), data[:512]))
                if file.lfs:
                    repo.objects[file.sha256] = data
            return repo.commit(kept, "Add files").sha

    def files(self, name: str, *, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """The files of a repo at a revision: path -> content."""
        with self._lock:
            commit = self._repos[repo_type, name].resolve(revision)
            return {path: file.content for path, file in commit.files.items()}

    # ---------------------------------------------------------------- requests

    def _answer(self, request: Request) -> Reply:
        """Find the route, check who may take it, and take it."""
        if not request.path.startswith("/"):
            raise HubError(403, f"{request.path} is outside of this test's network")
        for methods, pattern, function, write in ROUTES:
            match = pattern.match(request.path)
            if match is None or request.method not in methods:
                continue
            groups: dict[str, Any] = {
                key: unquote(value) for key, value in match.groupdict().items() if value is not None
            }
            with self._lock:
                if write and request.user is None:
                    raise HubError(401, "Invalid username or password.")
                if "name" in groups:
                    groups["repo"] = self._visible(groups.pop("repo_type", "model"), groups.pop("name"), request.user)
                    if write and groups["repo"].name.split("/")[0] != request.user:
                        raise HubError(403, f"You have no write access to {groups['repo'].name}")
                return function(self, request, **groups)
        raise HubError(404, f"The stand-in has no route for {request.method} {request.path}")

    def _authenticate(self, headers: Message) -> str | None:
        """The user of a request. The Hub refuses a wrong token everywhere, even where none is needed."""
        authorization = headers.get("Authorization")
        if authorization is None:
            return None
        if not secrets.compare_digest(authorization.encode(), f"Bearer {self.token}".encode()):
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.user

    def _visible(self, repo_type: str, name: str, user: str | None) -> Repo:
        repo = self._repos.get((repo_type, name))
        if repo is not None and (not repo.private or name.split("/")[0] == user):
            return repo
        # The Hub does not tell strangers which repos exist: for them a missing one and a private one look alike.
        # The client takes a bare 401 for a missing repo on https endpoints only, hence the code in both cases.
        raise HubError(404 if user else 401, f"Repository not found: {name}", code="RepoNotFound")

    def _create(self, name: str, repo_type: str, private: bool) -> Repo:
        repo = self._repos[repo_type, name] = Repo(name, repo_type, private, created=_now())
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repo.commit({".gitattributes": File(attributes.encode(), lfs=False)}, "initial commit")
        return repo

    # ---------------------------------------------------------------- account and repos

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Reply:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "stand-in", "role": "write"}}
        return Reply.of_json({"type": "user", "name": request.user, "orgs": [], "auth": auth})

    @route("POST", "/api/repos/create", write=True)
    def _create_repo(self, request: Request) -> Reply:
        wanted = request.json()
        repo_type, owner = wanted.get("type") or "model", wanted.get("organization") or request.user
        name = f"{owner}/{wanted['name']}"
        if repo_type not in URL_PREFIX:
            raise HubError(400, f"The stand-in has no repos of type {repo_type}")
        if owner != request.user:
            raise HubError(403, f"You don't have the rights to create a {repo_type} under the namespace {owner}")
        url = f"{self.endpoint}/{URL_PREFIX[repo_type]}{name}"
        if (repo_type, name) in self._repos:
            # With `exist_ok` the client goes on with the URL in this answer.
            raise HubError(409, f"You already created this {repo_type} repo", url=url)
        repo = self._create(name, repo_type, wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return Reply.of_json({"url": url, "name": name, "id": name, "private": repo.private})

    @route("GET", API + f"(?:/revision{REVISION})?")
    def _repo_info(self, request: Request, repo: Repo, revision: str = "main") -> Reply:
        commit, blobs = repo.resolve(revision), request.flag("blobs")
        info: dict[str, Any] = {
            "id": repo.name,
            "author": repo.name.split("/")[0],
            "sha": commit.sha,
            "createdAt": repo.created,
            "lastModified": commit.date,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [_sibling(path, file, blobs) for path, file in sorted(commit.files.items())],
        }
        if "README.md" in commit.files:
            card = _front_matter(commit.files["README.md"].content.decode())
            info |= {"cardData": card, "tags": card.get("tags") or [], "library_name": card.get("library_name")}
        return Reply.of_json(info)

    @route("GET", API + "/refs")
    def _refs(self, request: Request, repo: Repo) -> Reply:
        def listed(kind: str, table: dict[str, Commit]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c.sha} for n, c in table.items()]

        refs = {"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags)}
        return Reply.of_json({**refs, "converts": [], "pullRequests": []})

    @route("POST", API + "/branch/(?P<branch>[^/]+)", write=True)
    def _create_branch(self, request: Request, repo: Repo, branch: str) -> Reply:
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.branches[branch] = repo.resolve(request.json().get("startingPoint") or "main")
        return Reply.of_json({})

    @route("POST", API + f"/tag{REVISION}", write=True)
    def _create_tag(self, request: Request, repo: Repo, revision: str) -> Reply:
        tag = request.json()["tag"]
        if tag in repo.tags:
            raise HubError(409, f"Tag reference already exists: {tag}")
        repo.tags[tag] = repo.resolve(revision)
        return Reply.of_json({})

    # ---------------------------------------------------------------- listing and download

    @route("GET", API + f"/tree{REVISION}(?:/(?P<path>.*))?")
    def _tree(self, request: Request, repo: Repo, revision: str, path: str = "") -> Reply:
        commit = repo.resolve(revision)
        prefix = f"{path.rstrip('/')}/" if path else ""
        below = [entry for entry in _entries(commit) if entry["path"].startswith(prefix)]
        if prefix and not below:
            raise HubError(404, f"{path} does not exist on {revision!r}", code="EntryNotFound")
        if not request.flag("recursive"):
            below = [entry for entry in below if "/" not in entry["path"].removeprefix(prefix)]
        return Reply.of_json(below)

    @route("POST", API + f"/paths-info{REVISION}")
    def _paths_info(self, request: Request, repo: Repo, revision: str) -> Reply:
        form = parse_qs(request.body.decode())
        wanted = {path.rstrip("/") for path in form.get("paths", [])}
        entries = _entries(repo.resolve(revision))
        return Reply.of_json([entry for entry in entries if entry["path"] in wanted])

    @route("GET HEAD", WEB + f"/resolve{REVISION}/(?P<path>.+)")
    def _resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Reply:
        commit = repo.resolve(revision)
        headers = {"X-Repo-Commit": commit.sha}
        file = commit.files.get(path)
        if file is None:
            raise HubError(404, f"{path} does not exist on {revision!r}", code="EntryNotFound", headers=headers)
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file.lfs:  # the Hub redirects to its CDN here; the client takes the metadata from these two all the same
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if asked is None or asked.group(0) == "bytes=-":
            return Reply(200, file.content, headers)
        first, last = asked.groups()
        start = int(first) if first else max(0, file.size - int(last))
        stop = min(int(last) + 1, file.size) if first and last else file.size
        if start >= stop:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{file.size}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
        return Reply(206, file.content[start:stop], headers)

    # ---------------------------------------------------------------- upload

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Reply:
        card = request.json()
        errors, warnings = _check_card(card["content"], card.get("repoType") or "model")
        payload = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return Reply.of_json(payload, 400 if errors else 200)

    @route("POST", API + f"/preupload{REVISION}", write=True)
    def _preupload(self, request: Request, repo: Repo, revision: str) -> Reply:
        present, answers = repo.resolve(revision).files, []
        for wanted in request.json()["files"]:
            path, sample = wanted["path"], base64.b64decode(wanted["sample"])
            mode = "lfs" if _is_lfs(path, wanted["size"], sample) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in present:  # lets the client leave out what has not changed
                answer["oid"] = present[path].etag
            answers.append(answer)
        return Reply.of_json({"files": answers})

    @route("POST", WEB + r"\.git/info/lfs/objects/batch", write=True)
    def _lfs_batch(self, request: Request, repo: Repo) -> Reply:
        batch = request.json()
        if batch["operation"] != "upload" or "basic" not in batch.get("transfers", ["basic"]):
            raise HubError(400, "The stand-in takes LFS uploads with the basic transfer only")
        objects = []
        for wanted in batch["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer = {"oid": oid, "size": size, "authenticated": True}
            if oid not in repo.objects:
                # The client PUTs without its token, as to a presigned S3 URL: the ticket is the permission.
                ticket = secrets.token_urlsafe(16)
                self._uploads[ticket] = (repo, oid, size)
                verify = f"{self.endpoint}{repo.web_path}.git/info/lfs/verify"
                upload = f"{self.endpoint}/lfs-upload/{ticket}"
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(answer)
        return Reply.of_json({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs-upload/(?P<ticket>[^/]+)")
    def _lfs_upload(self, request: Request, ticket: str) -> Reply:
        if ticket not in self._uploads:
            raise HubError(403, "Unknown or used upload URL")
        repo, oid, size = self._uploads[ticket]
        if len(request.body) != size or hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, f"The content is not the {size} bytes of sha256 {oid}")
        del self._uploads[ticket]
        repo.objects[oid] = request.body
        return Reply(200)

    @route("POST", WEB + r"\.git/info/lfs/verify", write=True)
    def _lfs_verify(self, request: Request, repo: Repo) -> Reply:
        wanted = request.json()
        if len(repo.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, f"LFS object {wanted['oid']} was not uploaded")
        return Reply.of_json({})

    @route("POST", API + f"/commit{REVISION}", write=True)
    def _commit(self, request: Request, repo: Repo, revision: str) -> Reply:
        if request.flag("create_pr"):
            raise HubError(400, "The stand-in has no pull requests")
        if revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = repo.branches[revision]
        if not head.sha.startswith(header.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = _apply(lines, head.files, repo)
        if "README.md" in files:
            errors, _ = _check_card(files["README.md"].content.decode(), repo.repo_type)
            if errors:
                raise HubError(400, "; ".join(errors))
        commit = repo.commit(files, header["summary"], header.get("description", ""), branch=revision)
        url = f"{self.endpoint}{repo.web_path}/commit/{commit.sha}"
        return Reply.of_json({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})


# -------------------------------------------------------------------- pure parts


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _is_lfs(path: str, size: int, sample: bytes) -> bool:
    """By name, by size, or because the first bytes are not text. Empty files are never LFS."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE or b"\0" in sample)


def _apply(lines: Iterable[dict[str, Any]], before: Mapping[str, File], repo: Repo) -> dict[str, File]:
    """The files of a branch after the operations of a commit."""
    files = dict(before)
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
            files[value["path"]] = File(repo.objects[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            path = value["path"].rstrip("/")
            gone = {path} if key == "deletedFile" else {p for p in files if p.startswith(f"{path}/")}
            if not gone or not gone <= files.keys():
                raise HubError(404, f"A file with this name doesn't exist: {path}", code="EntryNotFound")
            files = {p: file for p, file in files.items() if p not in gone}
        elif key != "header":
            raise HubError(400, f"Unknown commit operation: {key}")
    return files


def _sibling(path: str, file: File, blobs: bool) -> dict[str, Any]:
    """A file as the repo info lists it."""
    entry: dict[str, Any] = {"rfilename": path}
    if blobs:
        entry |= {"size": file.size, "blobId": file.blob_id}
        if file.lfs:
            entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    return entry


def _entries(commit: Commit) -> list[dict[str, Any]]:
    """All folders and files of a commit as the tree and paths-info endpoints list them."""
    folders = {str(folder) for path in commit.files for folder in Path(path).parents if folder.name}
    entries: list[dict[str, Any]] = []
    for folder in folders:
        listing = [(p, file.blob_id) for p, file in sorted(commit.files.items()) if p.startswith(f"{folder}/")]
        tree_id = hashlib.sha1(repr(listing).encode()).hexdigest()
        entries.append({"type": "directory", "path": folder, "oid": tree_id, "size": 0})
    for path, file in commit.files.items():
        entries.append({"type": "file", "path": path, "oid": file.blob_id, "size": file.size})
        if file.lfs:
            entries[-1]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    return sorted(entries, key=lambda entry: entry["path"])


def _front_matter(card: str) -> dict[str, Any]:
    """The metadata between the two `---` lines at the top of a card; empty if there is none."""
    block = re.match(r"---\s*\n(.*?)(?:\n|^)---\s*(?:\n|\Z)", card.replace("\r\n", "\n"), re.DOTALL | re.MULTILINE)
    metadata = yaml.safe_load(block.group(1)) if block else None
    if not isinstance(metadata, dict | None):
        raise yaml.YAMLError("the metadata is not a mapping")
    return metadata or {}


def _check_card(card: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a README.md: the few rules of the Hub's schema that adapters are known to trip over."""
    try:
        metadata = _front_matter(card)
    except yaml.YAMLError as error:
        return [f"YAML: {error}"], []
    if not metadata:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    for key in ("library_name", "pipeline_tag"):
        if not isinstance(metadata.get(key), str | None):
            errors.append(f'"{key}" must be a string')
    if not isinstance(metadata.get("tags"), list | None):
        errors.append('"tags" must be an array')
    if repo_type == "model":
        bases = metadata.get("base_model") or []
        for base in bases if isinstance(bases, list) else [bases]:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):  # a local path, say
                errors.append(f'"base_model" with value "{base}" is not valid. Use a model id of the Hub.')
    return errors, []


# -------------------------------------------------------------------- HTTP


class _Server(ThreadingHTTPServer):
    hub: HubStandIn
    daemon_threads = True  # clients keep their connections; nobody should wait for them
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may hang up; anything else is a bug here."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.hub.failures.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes; the second must not wait for an ACK of the first
    server: _Server

    def _serve(self) -> None:
        hub = self.server.hub
        body = self._read_body()  # always, or its bytes would be taken for the next request of this connection
        local = self.path.startswith("/")
        url = urlsplit(self.path) if local else None
        try:
            path, query = (url.path, parse_qs(url.query)) if url else (self.path, {})
            user = hub._authenticate(self.headers) if local else None
            reply = hub._answer(Request(self.command, path, query, self.headers, body, user))
        except HubError as error:
            reply = error.reply
        except Exception:
            hub.failures.append(f"{self.command} {self.path}\n{traceback.format_exc()}")
            reply = HubError(501, "The stand-in failed").reply  # not 500, which the client would retry for 20 s
        hub.log.append(Call(self.command, self.path, reply.status))
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = _serve

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: `HubStandIn.log` is the record."""


def main() -> None:
    """Serve until interrupted: `python -m tests.hub_standin --port N`."""
    parser = argparse.ArgumentParser(description="A stand-in for the Hugging Face Hub on loopback.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--user", default="me")
    parser.add_argument("--token", default=None, help="random if not given")
    options = parser.parse_args()
    with HubStandIn(options.user, options.token, options.port) as hub:
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
        print(" ".join(f"{name}={value}" for name, value in settings.items()), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            hub._thread.join()


if __name__ == "__main__":
    main()
