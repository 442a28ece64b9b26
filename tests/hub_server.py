"""A Hugging Face Hub on 127.0.0.1, with as much of its API as downloads and pushes use, for tests without network."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


COMMIT = "0" * 40


class HubServer:
    """
    Attributes:
        url: for HF_ENDPOINT.
        files: what the repositories hold: {repo_id: {filename: bytes}}; what is pushed appears here.
        created: {repo_id: whether it was created as private}.
    """

    def __init__(self):
        self.files, self.created, self.url = {}, {}, ""

    @contextlib.contextmanager
    def serve(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.split("?")[0].strip("/")
                if "/resolve/main/" in path:
                    repo_id, name = path.split("/resolve/main/")
                    content = hub.files.get(repo_id, {}).get(name)
                    if content is None:
                        return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                    etag = hashlib.sha256(content).hexdigest()
                    return self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
                repo_id = "/".join(path.split("/")[2:4])
                files = hub.files.get(repo_id)
                if files is None:
                    return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                if "/tree/main" in path:
                    tree = [{"type": "file", "path": name, "size": 1, "oid": COMMIT} for name in files]
                    return self.answer(200, json.dumps(tree).encode())
                return self.answer(200, json.dumps({"id": repo_id, "sha": COMMIT, "siblings": []}).encode())

            do_HEAD = do_GET

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                path = self.path.split("?")[0].strip("/")
                repo_id = "/".join(path.split("/")[2:4])
                reply = {}
                if path == "api/repos/create":
                    asked = json.loads(body)
                    repo_id = (
                        f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                    )
                    hub.created[repo_id] = bool(asked.get("private")) or asked.get("visibility") == "private"
                    hub.files.setdefault(repo_id, {})
                    reply = {"url": f"{hub.url}/{repo_id}", "name": repo_id}
                elif "/preupload/" in path:
                    asked = json.loads(body)["files"]
                    reply = {
                        "files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
                    }
                elif "/commit/" in path:
                    for line in body.splitlines():
                        entry = json.loads(line)
                        if entry["key"] == "file":
                            content = base64.b64decode(entry["value"]["content"])
                            hub.files[repo_id][entry["value"]["path"]] = content
                    reply = {"commitUrl": f"{hub.url}/{repo_id}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
                self.answer(200, json.dumps(reply).encode())

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
