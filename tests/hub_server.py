"""A small Hugging Face hub on the loopback interface: the calls that uploading and downloading a model make,
with large files by git LFS."""
import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "kQ7zR2mW" * 4   # may write as ada
READ = "hf_" + "rEadOnLy" * 4    # may only read
STRANGER = "hf_" + "b0bB0b0b" * 4  # may write, as bob

class Repo:
    def __init__(self, private): self.private, self.branches, self.commits = private, {"main": {}}, []

class Server(ThreadingHTTPServer):
    daemon_threads = True
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.storage, self.requests = {}, {}, []   # requests: (method, path, headers, body)
        # pattern of a path -> (status, text) to answer with
        self.fail = {}
        self.users = {
            TOKEN: dict(name="ada", role="write", orgs=["looms"]),
            READ: dict(name="ada", role="read", orgs=[]), STRANGER: dict(name="bob", role="write", orgs=[])
        }
    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}"
    def files(self, repo_id, branch="main"): return self.repos[repo_id].branches[branch]
    def heard(self, pattern): return [(m, p, h, b) for m, p, h, b in self.requests if re.search(pattern, p)]
    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        return self
    def __exit__(self, *args): self.shutdown(); self.server_close()

def git_oid(data): return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
def is_large(path): return path.endswith((".safetensors", ".png"))

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass

    def send(self, data=b"", status=200, **headers):
        if not isinstance(data, bytes):
            data, headers = json.dumps(data).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for k, v in headers.items(): self.send_header(k.replace("_", "-"), v)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(data)

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size)); self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_any(self):
        url, body = urlsplit(self.path), self.body()
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.server.requests.append((self.command, path, dict(self.headers), body))
        for pattern, (status, text) in self.server.fail.items():
            if re.search(pattern, path): return self.send(dict(error=text), status)
        if m := re.fullmatch(r"/storage/(\w{64})", path): return self.store(m[1], body)
        self.user = self.server.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if self.user is None: return self.send(dict(error="Invalid username or password."), 401)
        for method, pattern, answer in ROUTES:
            if method == self.command and (m := re.fullmatch(pattern, path)):
                return answer(self, body, **m.groupdict())
        self.send(dict(error=f"no such page: {self.command} {path}"), 404)
    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def store(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid: return self.send(dict(error="wrong content"), 400)
        self.server.storage[oid] = body
        self.send()

    def whoami(self, body):
        self.send(
            dict(
                type="user", name=self.user["name"], orgs=[dict(name=o) for o in self.user["orgs"]],
                auth=dict(type="access_token", accessToken=dict(displayName="t", role=self.user["role"])),
            )
        )

    def create(self, body):
        o = json.loads(body)
        owner = o.get("organization") or self.user["name"]
        repo_id = f"{owner}/{o['name']}"
        if self.user["role"] != "write" or owner not in (self.user["name"], *self.user["orgs"]):
            return self.send(dict(error="You may not create this."), 403)
        new = repo_id not in self.server.repos
        if new: self.server.repos[repo_id] = Repo(o.get("visibility") == "private" or bool(o.get("private")))
        self.send(
            dict(url=f"{self.server.url}/{repo_id}")
            | ({} if new else dict(error="You already created this model repo")),
            200 if new else 409,
        )

    def validate(self, body):
        text = json.loads(body)["content"]
        (
            self.send({})
            if text.startswith("---\n")
            else self.send(dict(errors=[dict(message="no metadata")], warnings=[]), 400)
        )

    def repo(self, repo_id, writes=True):
        "The repository, or None after an answer that refuses."
        found = self.server.repos.get(repo_id)
        if found is None:
            return self.send(dict(error="Repository not found"), 404, X_Error_Code="RepoNotFound")
        if writes and (
            self.user["role"] != "write"
            or repo_id.split("/")[0] not in (self.user["name"], *self.user["orgs"])
        ):
            return self.send(dict(error="You may not write here."), 403)
        return found

    def preupload(self, body, repo_id, branch):
        if not (repo := self.repo(repo_id, "create_pr" not in self.query)): return
        if branch not in repo.branches:
            return self.send(dict(error="no such branch"), 404, X_Error_Code="RevisionNotFound")
        def answer(path):
            old = repo.branches[branch].get(path)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if is_large(path) else git_oid(old)
            return dict(
                path=path, uploadMode="lfs" if is_large(path) else "regular", shouldIgnore=False, oid=oid
            )
        self.send(dict(files=[answer(f["path"]) for f in json.loads(body)["files"]]))

    def batch(self, body, repo_id):
        def answer(o):
            known = o["oid"] in self.server.storage
            return dict(oid=o["oid"], size=o["size"]) | (
                {}
                if known
                else dict(
                    actions=dict(
                        upload=dict(href=f"{self.server.url}/storage/{o['oid']}"),
                        verify=dict(href=f"{self.server.url}/{repo_id}.git/verify")
                    )
                )
            )
        self.send(dict(transfer="basic", objects=[answer(o) for o in json.loads(body)["objects"]]))

    def verify(self, body, repo_id):
        self.send({}, 200 if json.loads(body)["oid"] in self.server.storage else 404)

    def commit(self, body, repo_id, branch):
        pr = "create_pr" in self.query
        if not (repo := self.repo(repo_id, not pr)): return
        added, header = {}, None
        for o in map(json.loads, body.splitlines()):
            v = o["value"]
            if o["key"] == "header": header = v
            elif o["key"] == "file": added[v["path"]] = base64.b64decode(v["content"])
            elif o["key"] == "lfsFile": added[v["path"]] = self.server.storage[v["oid"]]
        repo.commits.append((branch, header["summary"], sorted(added)))
        place = f"refs/pr/{len(repo.commits)}" if pr else branch
        repo.branches[place] = repo.branches[branch] | added
        oid = hashlib.sha1(body).hexdigest()
        self.send(
            dict(
                commitUrl=f"{self.server.url}/{repo_id}/commit/{oid}", commitOid=oid,
                pullRequestUrl=f"{self.server.url}/{repo_id}/discussions/{len(repo.commits)}" if pr else None,
            )
        )

    def branch(self, body, repo_id, branch):
        if not (repo := self.repo(repo_id)): return
        if branch in repo.branches: return self.send(dict(error="Reference already exists"), 409)
        repo.branches[branch] = dict(repo.branches["main"])
        self.send({}, 201)

    def info(self, body, repo_id, branch="main"):
        if not (repo := self.repo(repo_id, writes=False)): return
        self.send(
            dict(
                _id="1", id=repo_id, modelId=repo_id, sha=f"{len(repo.commits):040x}", private=repo.private,
                tags=[], downloads=0, likes=0, siblings=[dict(rfilename=o) for o in repo.branches[branch]]
            )
        )

    def resolve(self, body, repo_id, branch, file):
        if not (repo := self.repo(repo_id, writes=False)): return
        # the client asks for the commit that HEAD told it
        place = branch if branch in repo.branches else "main"
        data = repo.branches[place].get(file)
        if data is None:
            return self.send(
                b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=f"{len(repo.commits):040x}"
            )
        self.send(
            data, ETag=f'"{git_oid(data)}"', X_Repo_Commit=f"{len(repo.commits):040x}", Accept_Ranges="bytes"
        )

_repo, _at = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<branch>.+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami), ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{_repo}/preupload/{_at}", Handler.preupload),
    ("POST", f"/{_repo}\\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", f"/{_repo}\\.git/verify", Handler.verify),
    ("POST", f"/api/models/{_repo}/commit/{_at}", Handler.commit),
    ("POST", f"/api/models/{_repo}/branch/{_at}", Handler.branch),
    ("GET", f"/api/models/{_repo}", Handler.info),
    ("GET", f"/api/models/{_repo}/revision/{_at}", Handler.info),
    *((m, f"/{_repo}/resolve/(?P<branch>[^/]+)/(?P<file>.+)", Handler.resolve) for m in ("GET", "HEAD")),
]
