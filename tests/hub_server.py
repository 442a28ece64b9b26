"""A Hugging Face Hub on 127.0.0.1, with as much of its API as downloads and pushes use, for tests without network."""

import base64
import contextlib
import fnmatch
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


COMMIT = "0" * 40
LARGE = ("*.safetensors", "*.mp4", "*.png")  # what goes to large file storage, if `large_files` is set


class HubServer:
    """
    Attributes:
        url: for HF_ENDPOINT.
        files: what the repositories hold: {repo_id: {filename: bytes}}; what is pushed appears here. A data set
            stands under "datasets/<repo_id>".
        created: {repo_id: whether it was created as private}.
        branches: {repo_id: those that were made beside `main`}; their files are not kept apart.
        large_files: whether weights, videos and pictures are uploaded as large files (LFS).
        uploaded: {sha256: bytes} of large files.
        readers: tokens that may not write.
    """

    def __init__(self, large_files=False):
        self.files, self.created, self.branches, self.url = {}, {}, {}, ""
        self.large_files, self.uploaded, self.readers = large_files, {}, set()

    @contextlib.contextmanager
    def serve(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.split("?")[0].strip("/")
                for revision in ("main", COMMIT):
                    if f"/resolve/{revision}/" in path:
                        repo_id, name = path.removeprefix("api/").split(f"/resolve/{revision}/")
                        return self.send_file(hub.files.get(repo_id, {}).get(name.replace("%20", " ")))
                repo_id = self.repo_id()
                files = hub.files.get(repo_id)
                if files is None:
                    return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                if "/tree/" in path:
                    _, _, folder = path.partition("/tree/")[2].partition("/")
                    tree = hub.list_folder(files, folder.replace("%20", " "), "recursive=true" in self.path.lower())
                    if folder and not tree:
                        return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                    return self.answer(200, json.dumps(tree).encode())
                siblings = [{"rfilename": name} for name in files]
                about = {"id": repo_id.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings, "tags": []}
                return self.answer(200, json.dumps(about).encode())

            do_HEAD = do_GET

            def do_PUT(self):
                content = self.rfile.read(int(self.headers["Content-Length"] or 0))
                hub.uploaded[self.path.rsplit("/", 1)[1]] = content
                self.answer(200, b"")

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                path = self.path.split("?")[0].strip("/")
                repo_id = self.repo_id()
                reply = {}
                writes = path == "api/repos/create" or "/preupload/" in path or "/commit/" in path
                if writes and (self.headers["Authorization"] or "").removeprefix("Bearer ") in hub.readers:
                    error = "You don't have the rights to write here with this token"
                    return self.answer(403, json.dumps({"error": error}).encode(), {"X-Error-Message": error})
                if path == "api/repos/create":
                    asked = json.loads(body)
                    repo_id = (
                        f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                    )
                    if asked.get("type") == "kernel":
                        repo_id = f"kernels/{repo_id}"
                    hub.created[repo_id] = bool(asked.get("private")) or asked.get("visibility") == "private"
                    hub.files.setdefault(repo_id, {})
                    reply = {"url": f"{hub.url}/{repo_id}", "name": repo_id}
                elif "/branch/" in path:
                    hub.branches.setdefault(repo_id, []).append(path.partition("/branch/")[2])
                elif "/preupload/" in path:
                    names = [file["path"] for file in json.loads(body)["files"]]
                    reply = {"files": [self.preupload(name) for name in names]}
                elif path.endswith("/info/lfs/objects/batch"):
                    objects = json.loads(body)["objects"]
                    for entry in objects:
                        entry["actions"] = {"upload": {"href": f"{hub.url}/upload/{entry['oid']}"}}
                    reply = {"transfer": "basic", "objects": objects}
                elif "/commit/" in path:
                    for line in body.splitlines():
                        entry = json.loads(line)
                        if entry["key"] == "file":
                            content = base64.b64decode(entry["value"]["content"])
                            hub.files[repo_id][entry["value"]["path"]] = content
                        elif entry["key"] == "lfsFile":
                            hub.files[repo_id][entry["value"]["path"]] = hub.uploaded[entry["value"]["oid"]]
                    reply = {"commitUrl": f"{hub.url}/{repo_id}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
                elif "/paths-info/" in path:
                    wanted = json.loads(body)["paths"] if body.startswith(b"{") else []
                    tree = hub.list_folder(hub.files.get(repo_id, {}), "", True)
                    reply = [entry for entry in tree if entry["path"] in wanted]
                self.answer(200, json.dumps(reply).encode())

            def repo_id(self):
                kind, *name = self.path.split("?")[0].strip("/").removeprefix("api/").split("/")[:3]
                return "/".join(name) if kind == "models" else "/".join([kind, *name])

            def preupload(self, name):
                large = hub.large_files and any(fnmatch.fnmatch(name, pattern) for pattern in LARGE)
                return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

            def send_file(self, content):
                if content is None:
                    return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
                asked = self.headers["Range"]
                if asked is None:
                    return self.answer(200, content, {**headers, "Accept-Ranges": "bytes"})
                first, last = asked.removeprefix("bytes=").split("-")
                part = content[int(first) : int(last or len(content)) + 1]
                headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
                return self.answer(206, part, headers)

            def answer(self, status, content, headers=None):
                self.send_response(status)
                for name, value in {"Content-Length": len(content), **(headers or {})}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    @staticmethod
    def list_folder(files, folder, recursive):
        """What the Hub says is in `folder` of a repository: files, and folders as well."""
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for name, content in files.items():
            if not name.startswith(prefix):
                continue
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                path = prefix + "/".join(parts[:depth])
                if recursive or depth == 1:
                    entries[path] = {"type": "directory", "path": path, "size": 0, "oid": COMMIT}
            if recursive or len(parts) == 1:
                digest = hashlib.sha1(content).hexdigest()
                entries[name] = {"type": "file", "path": name, "size": len(content), "oid": digest}
        return list(entries.values())
