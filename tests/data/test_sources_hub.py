"""Hub datasets, loaded by real processes from a small server that imitates the hub, then from the cache."""

import json
import os
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.processes import python_path

ROOT = Path(__file__).parents[2]
COMMIT = "a" * 40
PINNED = f"user/rows@one#{COMMIT}"  # data.revision after the #
OTHER = f"user/rows@one#{'b' * 40}"
CARD = """---
configs:
- config_name: one
  default: true
  data_files: [{split: train, path: train.csv}, {split: test, path: test.csv}]
- config_name: two
  data_files: [{split: train, path: two.csv}]
---
"""
FILES = {"README.md": CARD, "train.csv": "text\na\nb\n", "test.csv": "text\nt\n", "two.csv": "text\nother\n"}
PROGRAM = """
import sys
from ptune_dist.data.sources import load_rows
from ptune_dist.errors import UserError
for source in sys.argv[1:]:
    try:
        name, _, revision = source.partition("#")
        rows = load_rows(name, key="data.train", default_split="train", revision=revision or None)
        print([row["text"] for row in rows.read(0, len(rows))])
    except UserError as error:
        print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """One dataset, user/rows, with two configs."""

    def log_message(self, *_):
        pass

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(self.path.split("?")[0])
        status = 404
        headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        body = ""
        if path.startswith("/datasets/user/rows/resolve/"):
            name = path.split("/", 6)[6]
            headers = {"X-Repo-Commit": COMMIT, "X-Error-Code": "EntryNotFound"}
            if name in FILES:
                status = 200
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"'}
                body = FILES[name]
        elif path.startswith("/api/datasets/user/rows/tree/"):
            listing = [{"type": "file", "oid": "b" * 40, "size": len(FILES[name]), "path": name} for name in FILES]
            status = 200
            headers = {}
            body = json.dumps(listing)
        elif path.startswith("/api/datasets/user/rows"):
            siblings = [{"rfilename": name} for name in FILES]
            status = 200
            headers = {}
            body = json.dumps({"id": "user/rows", "sha": COMMIT, "siblings": siblings})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    do_GET = do_HEAD = do_POST = answer


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The results of load_rows while the hub answers, and after it has stopped."""
    folder = tmp_path_factory.mktemp("hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name} | {
        "HF_HOME": str(folder / "hf"),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "PYTHONPATH": python_path(ROOT),
        "NO_PROXY": "127.0.0.1",
    }

    def load(*sources: str) -> dict[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *sources],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert done.stderr == ""
        return dict(zip(sources, done.stdout.splitlines(), strict=True))

    online = load(
        PINNED, "user/rows", "user/rows:test", "user/rows@two", "user/rows@three", "user/rows:dev", "user/none"
    )
    server.shutdown()
    server.server_close()
    return online, load(PINNED, OTHER, "user/rows@one", "user/rows@one:test", "user/rows", "user/none")


def test_name_config_and_split(answers):
    online, _ = answers
    assert online["user/rows"] == "['a', 'b']"
    assert online["user/rows:test"] == "['t']"
    assert online["user/rows@two"] == "['other']"


def test_wrong_config_split_and_name_are_each_reported_in_one_line(answers):
    online, _ = answers
    assert "BuilderConfig 'three' not found. Available: ['one', 'two']" in online["user/rows@three"]
    assert "Unknown split \"dev\". Should be one of ['train', 'test']" in online["user/rows:dev"]
    assert "'user/none' doesn't exist on the Hub" in online["user/none"]


def test_without_a_network_the_cache_serves_what_was_loaded_before(answers):
    _, offline = answers
    assert offline["user/rows@one"] == "['a', 'b']"
    assert offline["user/rows@one:test"] == "['t']"
    assert (
        "the hub cannot be reached: There are multiple 'user/rows' configurations in the cache" in offline["user/rows"]
    )
    assert "there is no network, or the name is wrong" in offline["user/none"]


def test_a_commit_is_taken_from_the_cache_only_where_it_is_the_one_asked_for(answers):
    online, offline = answers
    assert online[PINNED] == offline[PINNED] == "['a', 'b']"
    says = f"user/rows@one in the cache is of commit {COMMIT}, and not of data.revision {'b' * 40}"
    assert offline[OTHER] == f"data.train: {says}; the hub cannot be reached"
