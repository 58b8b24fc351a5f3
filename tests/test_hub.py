from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """A stand-in for the hub: one model at one revision, over the routes that snapshot_download uses."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.asked: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0]
        known = {f"/tiny/llama/resolve/{r}/{name}": name for name in self.server.files for r in (REVISION, "main")}
        if path.startswith("/api/models/tiny/llama/revision/") and path.rpartition("/")[2] in (REVISION, "main"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.reply(json.dumps({"id": "tiny/llama", "sha": REVISION, "siblings": siblings}).encode(), with_body)
        elif path == f"/api/models/tiny/llama/tree/{REVISION}":
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in self.server.files.items()
            ]
            self.reply(json.dumps(tree).encode(), with_body)
        elif path in known:
            self.reply(self.server.files[known[path]], with_body)
        else:
            missing = "RevisionNotFound" if path.startswith("/api/models/tiny/llama/") else "RepoNotFound"
            self.send_response(404)
            self.send_header("X-Error-Code", missing)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def reply(self, body: bytes, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tiny_hf: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in tiny_hf.iterdir()}
    # a publisher's repository holds more than edgekit wants
    server = Hub({**files, "pytorch_model.bin": b"pickle", "training_args.bin": b"pickle"})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def plan(hub: Hub, home: Path, model: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "EDGEKIT_CACHE": str(home / "store"),
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "edgekit", "plan", model, "--target", "jetson", "--json"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("name", ["tiny/llama", f"tiny/llama@{REVISION}"])
def test_a_hub_model_is_fetched_at_its_revision_without_pickles(hub: Hub, tmp_path: Path, name: str) -> None:
    done = plan(hub, tmp_path, name)
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["targets"][0]["model"]
    assert model["uri"] == "hub:tiny/llama"
    assert model["revision"] == REVISION
    assert not [path for path in hub.asked if path.endswith(".bin")]


def test_a_hub_model_has_the_digest_of_its_directory(hub: Hub, tmp_path: Path, tiny_hf: Path) -> None:
    fetched = json.loads(plan(hub, tmp_path, "tiny/llama").stdout)["targets"][0]["model"]
    local = json.loads(plan(hub, tmp_path, str(tiny_hf)).stdout)["targets"][0]["model"]
    assert fetched["digest"] == local["digest"]


@pytest.mark.parametrize("name", ["tiny/nothing", "tiny/llama@v9"])
def test_an_unknown_repository_or_revision_is_the_users_error(hub: Hub, tmp_path: Path, name: str) -> None:
    done = plan(hub, tmp_path, name)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["wanted"] == f"the hub model {name}"
