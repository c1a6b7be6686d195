"""`push`: what arrives at a hub on loopback is what lies here; nothing private leaves, and a dry run sends nothing."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

from lora_recipes.cli import main
from lora_recipes.run_dir import RunDir, write_json
from tests.export.models import make_model
from tests.export.test_engines import adapter

TOKEN = "hf_" + "a" * 34
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What a fake hub was asked, and the files that were committed to it."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.created: dict[str, Any] | None = None
        self.tokens: set[str | None] = set()
        self.private = True
        self.refuse = 0  # status code of every answer, where it is set
        self.commits: dict[str, dict[str, Any]] = {}  # branch → {"summary", "files": {path: bytes}}


class Handler(BaseHTTPRequestHandler):
    """The addresses of the hub that an upload asks, on which every file goes inline."""

    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(("GET", path))
        if path == "/api/models/me/orders":
            self._answer({"id": "me/orders", "private": self.hub.private, "sha": SHA, "siblings": [], "tags": []})
        else:
            self._answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        self.hub.requests.append(("POST", path))
        self.hub.tokens.add(self.headers.get("Authorization"))
        address = f"http://{self.headers['Host']}/me/orders"
        if self.hub.refuse:
            self._answer({"error": "no"}, self.hub.refuse)
        elif path == "/api/repos/create":
            self.hub.created = json.loads(body)
            self._answer({"url": address, "name": "me/orders", "id": "1"})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path.startswith("/api/models/me/orders/branch/"):
            self._answer({})
        elif path.startswith("/api/models/me/orders/preupload/"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif path.startswith("/api/models/me/orders/commit/"):
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self.hub.commits[path.rsplit("/", 1)[1]] = {"summary": lines[0]["value"]["summary"], "files": files}
            self._answer({"commitUrl": f"{address}/commit/{SHA}", "commitOid": SHA, "hookOutput": "", "success": True})
        else:
            self._answer({"error": "not found"}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback, which this process takes for the real one."""
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": found}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def trained(write_recipe: Callable[..., Path], tiny_model: Path) -> tuple[Path, RunDir]:
    """A recipe that names a repository, and its run folder with an adapter and the records of a run."""
    path = write_recipe(hub={"repo_id": "me/orders"})
    run_dir = RunDir.of(path.stem)
    adapter(tiny_model, run_dir.adapter)
    (run_dir.adapter / "README.md").unlink()
    config = json.loads((run_dir.adapter / "adapter_config.json").read_text())
    write_json(run_dir.adapter / "adapter_config.json", config | {"base_model_name_or_path": "tiny"})
    write_json(
        run_dir.manifest,
        {
            "argv": ["/home/ann/run.py", "--token", TOKEN],
            "base": {"source": "folder", "name": str(tiny_model), "revision": None, "sha256": None},
            "data": {"/home/ann/data/orders.jsonl": "ab12", "data/more.jsonl": "cd34"},
            "versions": {"peft": "0.21.2"},
        },
    )
    write_json(
        run_dir.parity, {"passed": True, "mean_kl": 1.5e-9, "merged": "outputs/tiny/merged", "tolerance": {"x": 1}}
    )
    write_json(run_dir.evaluation, {"eval_loss": {"base": 2.5, "adapter": 0.25}})
    return path, run_dir


def pushed(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["push", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_files_that_arrive_are_the_files_that_lie_here(
    trained: tuple[Path, RunDir], hub: Hub, capsys: pytest.CaptureFixture
):
    path, run_dir = trained
    code, found = pushed(capsys, str(path), "hub.commit_message=First")
    assert code == 0, found
    assert hub.created == {"name": "orders", "organization": "me", "visibility": "private"}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert list(hub.commits) == ["main"] and hub.commits["main"]["summary"] == "First"
    arrived = hub.commits["main"]["files"]
    for file in run_dir.adapter.iterdir():
        assert arrived[file.name] == file.read_bytes()
    assert set(arrived) == {file.name for file in run_dir.adapter.iterdir()} | {"README.md", "manifest.json"}
    assert found["files"] == [
        {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in sorted(arrived.items())
    ]
    assert found["commit"].endswith(f"/me/orders/commit/{SHA}") and found["dry_run"] is False


def test_card_and_manifest_say_what_is_known_and_nothing_of_this_machine(
    trained: tuple[Path, RunDir], hub: Hub, capsys: pytest.CaptureFixture, tiny_model: Path
):
    path, _ = trained
    assert pushed(capsys, str(path))[0] == 0
    arrived = hub.commits["main"]["files"]
    manifest = json.loads(arrived["manifest.json"])
    assert "argv" not in manifest and manifest["data"] == {"orders.jsonl": "ab12", "data/more.jsonl": "cd34"}
    assert manifest["base"]["name"] == tiny_model.name
    card = arrived["README.md"].decode()
    assert "base_model" not in card and "license:" not in card  # neither is known to be on the hub
    for said in (
        "library_name: peft",
        "| Licence of this model | not stated |",
        "LoRA, r = 4, alpha = 8",
        "`data/more.jsonl`, `orders.jsonl`",
        "| evaluation: eval loss / adapter | 0.25 |",
        "| merge parity: passed | true |",
        "| merge parity: mean kl | 1.5e-09 |",
    ):
        assert said in card
    for told in (b"/home/ann", TOKEN.encode(), str(tiny_model).encode(), str(Path.cwd()).encode()):
        assert all(told not in data for data in arrived.values())


def test_a_dry_run_lists_the_same_files_and_sends_nothing(
    trained: tuple[Path, RunDir], hub: Hub, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    path, _ = trained
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, listed = pushed(capsys, str(path), "--dry_run")
    assert code == 0 and listed["dry_run"] is True and listed["commit"] is None
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    sent = pushed(capsys, str(path))[1]
    assert sent["files"] == listed["files"] and len(listed["files"]) >= 4


def test_a_card_of_the_folder_is_sent_as_it_is(trained: tuple[Path, RunDir], hub: Hub, capsys: pytest.CaptureFixture):
    path, run_dir = trained
    (run_dir.adapter / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n")
    assert pushed(capsys, str(path))[0] == 0
    assert hub.commits["main"]["files"]["README.md"] == (run_dir.adapter / "README.md").read_bytes()


def test_branch_folder_and_visibility_are_the_recipes(
    trained: tuple[Path, RunDir], hub: Hub, capsys: pytest.CaptureFixture
):
    path, run_dir = trained
    make_model(run_dir.merged, "llama-tied")
    assert main(["export", str(path)]) == 0
    hub.private = False
    words = ("hub.folder=exports", "hub.revision=gguf", "hub.private=false")
    code, found = pushed(capsys, str(path), *words)
    assert code == 0 and found["private"] is False
    assert hub.created is not None and hub.created["visibility"] == "public"
    assert ("POST", "/api/models/me/orders/branch/gguf") in hub.requests
    arrived = hub.commits["gguf"]["files"]
    assert set(arrived) == {"Modelfile", "README.md", "SHA256SUMS", "manifest.json", "tiny-f16.gguf"}
    exported = json.loads((run_dir.exports / "manifest.json").read_text())
    assert json.loads(arrived["manifest.json"])["exports"] == exported


def test_a_public_repository_is_not_filled_by_a_private_push(
    trained: tuple[Path, RunDir], hub: Hub, capsys: pytest.CaptureFixture
):
    hub.private = False
    code, found = pushed(capsys, str(trained[0]))
    assert code == 4 and "exists and is public; nothing was sent" in found["error"]["message"]
    assert hub.commits == {}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("notes.md", f"my token\nis {TOKEN}", "notes.md:2: looks like a secret (hf_a…)"),
        ("notes.txt", "trained in /home/ann/models/x", "notes.txt:1: a path of a machine (/home/ann)"),
        ("extra.json", '{"cache": "/very/own/place"}', "extra.json: a path of a machine (/very/own/place)"),
        ("extra.json", '{"file": "C:\\\\models\\\\x"}', "a path of a machine (C:"),
        ("tokenizer.json", f'{{"a": "{TOKEN}"}}', "tokenizer.json:1: looks like a secret"),
        ("optimizer.pt", "x", "optimizer.pt: a pickle"),
    ],
)
def test_what_is_private_or_unsafe_is_never_sent(
    trained: tuple[Path, RunDir], hub: Hub, capsys: pytest.CaptureFixture, name: str, text: str, said: str
):
    path, run_dir = trained
    (run_dir.adapter / name).write_text(text)
    for words in ((), ("--dry_run",)):
        code, found = pushed(capsys, str(path), *words)
        assert code == 4 and said in found["error"]["message"]
        assert TOKEN not in found["error"]["message"]
    assert hub.requests == []


def test_urls_relative_paths_and_vocabulary_are_not_taken_for_paths_of_a_machine(
    trained: tuple[Path, RunDir], hub: Hub, capsys: pytest.CaptureFixture
):
    path, run_dir = trained
    (run_dir.adapter / "notes.md").write_text("see https://huggingface.co/home/ann and data/orders and a/root/x, 1/2")
    (run_dir.adapter / "tokenizer.json").write_text('{"model": {"vocab": {"/home/ann": 1, "/": 2}}}')
    assert pushed(capsys, str(path))[0] == 0


def test_a_link_out_of_the_folder_is_refused(
    trained: tuple[Path, RunDir], hub: Hub, capsys: pytest.CaptureFixture, tmp_path: Path
):
    path, run_dir = trained
    (tmp_path / "elsewhere.txt").write_text("private")
    (run_dir.adapter / "notes.txt").symlink_to(tmp_path / "elsewhere.txt")
    code, found = pushed(capsys, str(path))
    assert code == 4 and "a link could publish what lies elsewhere" in found["error"]["message"]


def test_offline_without_a_dry_run_is_one_message(
    trained: tuple[Path, RunDir], hub: Hub, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, found = pushed(capsys, str(trained[0]))
    assert code == 3 and "HF_HUB_OFFLINE is set" in found["error"]["message"] and hub.requests == []


@pytest.mark.parametrize(("status", "help"), [(401, "hf auth login"), (403, "may not write"), (500, "push again")])
def test_what_the_hub_refuses_is_one_message(
    trained: tuple[Path, RunDir], hub: Hub, capsys: pytest.CaptureFixture, status: int, help: str
):
    hub.refuse = status
    code, found = pushed(capsys, str(trained[0]))
    assert code == 3 and help in found["error"]["message"] and "\n" not in found["error"]["message"]
    assert hub.commits == {}


def test_a_hub_that_cannot_be_reached_is_one_message(
    trained: tuple[Path, RunDir], hub: Hub, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # nothing listens there
    code, found = pushed(capsys, str(trained[0]))
    assert code == 3 and "cannot be reached" in found["error"]["message"]


def test_what_is_missing_is_named(
    write_recipe: Callable[..., Path], trained: tuple[Path, RunDir], capsys: pytest.CaptureFixture
):
    path, _ = trained
    code, found = pushed(capsys, str(path), "hub.folder=merged")
    assert code == 2 and f"lora-recipes merge {path}" in found["error"]["message"]
    code, found = pushed(capsys, str(path), "hub.repo_id=a/b/c")
    assert code == 2 and "'a/b/c' is no repository" in found["error"]["message"]
    code, found = pushed(capsys, str(write_recipe(name="bare")))
    assert code == 2 and "set hub.repo_id=OWNER/NAME" in found["error"]["message"]
