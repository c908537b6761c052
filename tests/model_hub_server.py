"""A server on loopback that speaks as much of the hub's protocol as models need: made, pushed to, and fetched."""

import base64
import hashlib
import http.server
import json
import re
import urllib.parse

import loopback

TOKENS = {"hf_writes_secret": True, "hf_reads_secret": False}


class ModelHub:
    """Keeps repositories of models in memory; large files come and go by Git LFS.

    Args:
      tokens: by name, whether it may write. Reading a private repository takes any of them.

    Attributes:
      repos: by name, {"private": bool, "commits": [{path: bytes}]}.
      requests: (method, path) of all.
      status: what every request is answered with, if it is not 0; code: its X-Error-Code; said: its X-Error-Message.
      damage: what becomes of the bytes of a file that is sent.
    """

    def __init__(self, tokens=None):
        self.tokens = tokens or {}
        self.repos, self.stored, self.requests = {}, {}, []
        self.status, self.code, self.said, self.damage = 0, "", "", lambda data: data
        hub = self

        class Handler(_Handler):
            def setup(self):
                self.hub = hub
                super().setup()

        self.server = loopback.Server(Handler)
        self.url = self.server.url

    def __enter__(self):
        self.server.start()
        return self

    def __exit__(self, *_):
        self.server.stop()

    def add(self, repo, files, private=False):
        self.repos[repo] = {"private": private, "commits": [dict(files)]}

    def files(self, repo):
        return self.repos[repo]["commits"][-1]


def _commit(number):
    return f"{number + 1:040x}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def begin(self):
        hub = self.hub
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urllib.parse.urlsplit(self.path)
        hub.requests.append((self.command, url.path))
        if hub.status:
            return self.refuse(hub.status, hub.code, hub.said)
        path = urllib.parse.unquote(url.path)
        for method, pattern, answer in (
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", self.validate),
            ("PUT", r"/storage/([0-9a-f]{64})", self.store),
            ("POST", r"/api/models/(\w+/[\w.-]+)/preupload/main", self.preupload),
            ("POST", r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch", self.batch),
            ("POST", r"/api/models/(\w+/[\w.-]+)/commit/main", self.commit),
            ("GET", r"/api/models/(\w+/[\w.-]+)(?:/revision/(\w+))?", self.info),
            ("GET", r"/api/models/(\w+/[\w.-]+)/tree/(\w+)", self.tree),
            ("GET", r"/(\w+/[\w.-]+)/resolve/(\w+)/(.+)", self.resolve),
        ):
            if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                if self.command not in ("GET", "HEAD", "PUT") and not self.may_write():
                    return None
                return answer(*match.groups())
        return self.refuse(404, "")

    do_GET = do_HEAD = do_POST = do_PUT = begin

    def may_write(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.tokens:
            self.refuse(401, "", "Invalid credentials in Authorization header" if token else "")
        elif not self.hub.tokens[token]:
            self.refuse(403, "")
        return bool(self.hub.tokens.get(token))

    def snapshot(self, repo, revision):
        """(commit, its files), or None once it is refused."""
        found = self.hub.repos.get(repo)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if found is None or (found["private"] and token not in self.hub.tokens):
            return self.refuse(404 if token else 401, "RepoNotFound")
        commits = {_commit(i): files for i, files in enumerate(found["commits"])}
        newest = _commit(len(found["commits"]) - 1)
        if (commit := {None: newest, "main": newest}.get(revision, revision)) not in commits:
            return self.refuse(404, "RevisionNotFound")
        return commit, commits[commit]

    def create(self):
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.hub.repos:
            return self.answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}, 409)
        self.hub.repos[repo] = {"private": asked.get("visibility") == "private", "commits": [{".gitattributes": b""}]}
        return self.answer({"url": f"{self.hub.url}/{repo}"})

    def validate(self):
        errors = [{"message": '"license" must be one of [...]'}] if "license: nonsense" in str(self.body) else []
        return self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo):
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".wav")) else "regular"}
            for f in json.loads(self.body)["files"]
        ]
        return self.answer({"files": [mode | {"shouldIgnore": False} for mode in modes]})

    def batch(self, repo):
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.hub.url}/storage/{o['oid']}"}}}
            for o in json.loads(self.body)["objects"]
        ]
        return self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.stored[oid] = self.body
        return self.answer({})

    def commit(self, repo):
        files = dict(self.hub.files(repo))
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commits = self.hub.repos[repo]["commits"]
        commits.append(files)
        commit = _commit(len(commits) - 1)
        return self.answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})

    def info(self, repo, revision):
        if found := self.snapshot(repo, revision):
            commit, files = found
            siblings = [{"rfilename": name} for name in files]
            private = self.hub.repos[repo]["private"]
            self.answer({"id": repo, "sha": commit, "private": private, "siblings": siblings, "tags": []})

    def tree(self, repo, revision):
        if found := self.snapshot(repo, revision):
            self.answer([self.entry(*item) for item in found[1].items()])

    def entry(self, path, data):
        entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if path.endswith((".safetensors", ".wav")):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 128}
        return entry

    def resolve(self, repo, revision, path):
        if not (found := self.snapshot(repo, revision)):
            return
        commit, files = found
        if path not in files:
            return self.refuse(404, "EntryNotFound")
        data = files[path]
        entry = self.entry(path, data)
        etag = entry.get("lfs", entry)["oid"]
        self.send(200, self.hub.damage(data), {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def refuse(self, status, code, said=""):
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": said})

    def answer(self, value, status=200):
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status, body, headers):
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def take_for_models(monkeypatch, hub, folder):
    """Makes this process take `hub` for the hub, with a cache of its own and no token."""
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage speaks another protocol
