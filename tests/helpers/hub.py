"""A hub on this machine, for the real download and upload code."""

import base64
import hashlib
import http.server
import json
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A hub of one repository, ``microsoft/tiny``, with branch main; further ones may be uploaded.

    Attributes:
        files: of ``microsoft/tiny``.
        uploaded: the files of each other repository and branch.
        token: that requests need, if any.
        readers: tokens that may not write.
        served: the files that were downloaded, in order.
        stored: large files, by their SHA-256: what ``git lfs`` would store.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.uploaded: dict[tuple[str, str], dict[str, bytes]] = {}
        self.created: dict[str, dict] = {}
        self.token: str | None = None
        self.readers: set[str] = set()
        self.served: list[str] = []
        self.stored: dict[str, bytes] = {}
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def do_POST(self):
                content = self.read_body()
                sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
                if self.path == "/api/validate-yaml":
                    self.send_json({"errors": [], "warnings": []})
                elif not sent or (hub.token and sent not in (hub.token, *hub.readers)):
                    self.send_json({"error": "Invalid credentials in Authorization header"}, 401)
                elif sent in hub.readers:
                    self.send_json({"error": "Forbidden: you need a token with write access"}, 403)
                else:
                    self.send_json(hub.post(self.path, content))

            def do_PUT(self):
                content = self.read_body()
                hub.stored[hashlib.sha256(content).hexdigest()] = content
                self.send_json({})

            def read_body(self):
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                content = b""
                while size := int(self.rfile.readline(), 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return content

            def answer(self, body):
                if self.path.startswith("/api/"):  # what is known of a repository that could not be created
                    self.send_json({"error": "Repository not found"}, 404)
                    return
                owner, name, _, revision, file = self.path.lstrip("/").split("/", 4)
                error = None
                refused = hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}"
                if refused or (owner, name) != ("microsoft", "tiny"):
                    error = "RepoNotFound"
                elif revision not in ("main", "v1", COMMIT):
                    error = "RevisionNotFound"
                elif file not in hub.files:
                    error = "EntryNotFound"
                content = b"" if error else hub.files[file]
                self.send_response(404 if error else 200)
                if error:
                    self.send_header("X-Error-Code", error)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body and not error:
                    hub.served.append(file)
                    self.wfile.write(content)

            def send_json(self, value, status=200):
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def post(self, path: str, content: bytes) -> dict:
        """Answer the requests of an upload: create, branch, preupload, the batch of large files, commit."""
        if path == "/api/repos/create":
            wanted = json.loads(content)
            repository = f"{wanted['organization']}/{wanted['name']}"
            self.created[repository] = wanted
            return {"url": f"{self.url}/{repository}", "id": repository}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            for wanted in objects:
                wanted["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
            return {"transfer": "basic", "objects": objects}
        _, _, _, owner, name, kind, revision = path.split("/")
        if kind == "branch":
            return {}
        if kind == "preupload":
            files = json.loads(content)["files"]
            large = (".safetensors", ".png")
            modes = {f["path"]: "lfs" if f["path"].endswith(large) else "regular" for f in files}
            return {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
        assert kind == "commit", path
        files = self.uploaded.setdefault((f"{owner}/{name}", revision), {})
        for entry in map(json.loads, content.splitlines()):
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
        commit = {"commitUrl": f"{self.url}/{owner}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
        return {"success": True, **commit, "pullRequestUrl": None}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
