"""What is written is whole, for whom it is meant, and never half of two; a lock ends with the process that took it."""

import json
import multiprocessing
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_recipes import console, run_dir
from lora_recipes.cli import main
from lora_recipes.errors import DataError, RefusedError, RunError
from lora_recipes.run_dir import Locked, published, read_json, read_jsonl, write_json, write_jsonl, write_text

ROOT = Path(__file__).parent.parent


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- files ------------------------------------------------------------------------------------------------------------


def test_two_processes_may_write_one_file_at_once(workdir: Path):
    def write(text: str) -> None:
        for _ in range(100):
            write_text(workdir / "a.json", text * 1000)

    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(text,)) for text in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert (workdir / "a.json").read_text() in ("a" * 1000, "b" * 1000) and names(workdir) == ["a.json"]


def test_two_threads_may_write_one_file_at_once(workdir: Path):
    inside = threading.Barrier(2)

    def rows(name: str) -> Iterator[dict[str, Any]]:
        yield {"name": name}
        inside.wait(10)  # both files are open
        yield {"name": name}

    writers = [threading.Thread(target=write_jsonl, args=(workdir / "a.jsonl", rows(name))) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert read_jsonl(workdir / "a.jsonl") in ([{"name": name}] * 2 for name in "ab") and names(workdir) == ["a.jsonl"]


def test_rows_are_written_as_they_come_and_a_failure_leaves_the_old_file_alone(workdir: Path):
    path = workdir / "deeper" / "a.jsonl"
    write_jsonl(path, iter([{"a": 1}, {"a": "é\u2028"}]))
    assert read_jsonl(path) == [{"a": 1}, {"a": "é\u2028"}]

    def broken() -> Iterator[dict[str, Any]]:
        yield {"a": 2}
        assert len(names(path.parent)) == 2
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_jsonl(path, broken())
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_jsonl(path) == [{"a": 1}, {"a": "é\u2028"}] and names(path.parent) == ["a.jsonl"]


def test_a_private_file_is_never_readable_by_others(workdir: Path):
    previous = os.umask(0o022)
    try:
        write_json(workdir / "a.json", {})
        write_jsonl(workdir / "a.jsonl", [])
        write_jsonl(workdir / "b.jsonl", [{"a": 1}])

        def rows() -> Iterator[dict[str, Any]]:
            yield {}
            assert {mode(path) for path in workdir.iterdir() if path.name.endswith(".tmp")} == {0o600}

        write_jsonl(workdir / "b.jsonl", rows(), mode=0o600)
        write_text(workdir / "c.txt", "", mode=0o600)
        write_json(workdir / "c.json", {}, mode=0o600)
    finally:
        os.umask(previous)
    assert mode(workdir / "a.json") == mode(workdir / "a.jsonl") == 0o644
    assert mode(workdir / "b.jsonl") == mode(workdir / "c.txt") == mode(workdir / "c.json") == 0o600


def test_half_of_a_surrogate_pair_is_written_as_its_escape(workdir: Path):
    write_text(workdir / "a.txt", "a\ud83d")
    assert (workdir / "a.txt").read_text() == "a\\ud83d"
    write_json(workdir / "a.json", {"a\ud83d": "\udc4d"})
    assert read_json(workdir / "a.json") == {"a\ud83d": "\udc4d"}
    write_jsonl(workdir / "a.jsonl", [{"a": "\ud83d"}])
    assert read_jsonl(workdir / "a.jsonl") == [{"a": "\ud83d"}]


@pytest.mark.parametrize(("private", "file_mode"), [(True, 0o600), (False, 0o644)])
def test_a_published_folder_may_be_for_its_owner_only(workdir: Path, private: bool, file_mode: int):
    with published(workdir / "cache" / "data", private=private) as staging:
        assert mode(staging) == 0o700 or not private
        (staging / "deeper").mkdir()
        (staging / "deeper" / "rows").write_text("secret")
    folder = workdir / "cache" / "data"
    assert mode(folder / "deeper" / "rows") == file_mode
    assert (mode(folder) == 0o700) is private


@pytest.mark.parametrize("name", ["adapter", "merged", "combined", "exports", "checkpoints"])
def test_a_file_where_a_folder_is_written_is_told_before_anything_is_spent(workdir: Path, name: str):
    (workdir / "outputs" / "r").mkdir(parents=True)
    (workdir / "outputs" / "r" / name).write_text("somebody's")
    with pytest.raises(RunError, match=f"{name}: is a file, where a folder is written"):
        run_dir.RunDir.of("r").require_writable()
    with pytest.raises(RunError, match="is a file"), published(workdir / "outputs" / "r" / name):
        pytest.fail("it would be replaced")
    assert (workdir / "outputs" / "r" / name).read_text() == "somebody's"


@pytest.mark.parametrize("name", ["status.json", "manifest.json", "generations.jsonl", "rejected.jsonl"])
def test_a_folder_where_a_file_is_written_is_told_before_anything_is_spent(workdir: Path, name: str):
    (workdir / "outputs" / "r" / name).mkdir(parents=True)
    with pytest.raises(RunError, match=f"{name}: is a folder, where a file is written"):
        run_dir.RunDir.of("r").require_writable()


def test_a_folder_in_the_place_of_a_page_is_one_message(write_recipe: Any, capsys: pytest.CaptureFixture):
    path = write_recipe()
    Path("outputs/tiny/preview.html").mkdir(parents=True)
    assert main(["preview", str(path), "--html"]) == 2
    assert "preview.html: is a folder, where a file is written" in " ".join(capsys.readouterr().err.split())
    assert names(Path("outputs/tiny")) == ["preview.html"]


def test_a_file_that_an_earlier_try_did_not_leave_makes_way_for_staging(workdir: Path):
    (workdir / ".adapter.staging").write_text("a file")
    with published(workdir / "adapter") as staging:
        (staging / "weights").write_text("w")
    assert names(workdir) == ["adapter"]


# -- locks ------------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from lora_recipes.run_dir import Locked
lock = Locked(Path("x.lock"))
lock.acquire(wait=False)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_is_a_plain_file(workdir: Path):
    os.mkfifo("pipe.lock")
    Path("folder.lock").mkdir()
    Path("link.lock").symlink_to("elsewhere")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.lock")
    for name in ("pipe.lock", "folder.lock", "link.lock", "socket.lock"):
        with pytest.raises(RefusedError, match=f"{name}: is no plain file"):
            Locked(Path(name))


def test_who_waits_for_a_lock_is_told_whom_for(workdir: Path):
    told: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as holder:
        assert holder.stdin and holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=rf"in use by another process \(pid {holder.pid} on "):
            Locked(Path("x.lock")).acquire(wait=False)

        def waiting(text: str) -> None:
            told.append(text)
            holder.stdin.close()  # which ends it

        lock = Locked(Path("x.lock"))
        lock.acquire(wait=True, waiting=waiting)
    assert len(told) == 1 and f"x.lock is held by pid {holder.pid} on " in told[0] and "waiting" in told[0]
    assert Path("x.lock").read_text().startswith(f"pid {os.getpid()} on ")
    lock.release()
    Locked(Path("x.lock")).acquire(wait=True, waiting=told.append)
    assert len(told) == 1


def test_a_forked_process_does_not_hold_the_lock_on(workdir: Path):
    lock = Locked(Path("x.lock"))
    lock.acquire(wait=False)
    started, done = multiprocessing.Event(), multiprocessing.Event()
    child = multiprocessing.get_context("fork").Process(target=lambda: (started.set(), done.wait(30)))
    child.start()
    try:
        assert started.wait(30)
        with pytest.raises(RunError):
            Locked(Path("x.lock")).acquire(wait=False)  # the child's end of it does not let others in
        lock.release()
        Locked(Path("x.lock")).acquire(wait=False)
    finally:
        done.set()
        child.join()


# -- the terminal -----------------------------------------------------------------------------------------------------

NASTY = "a\x1b]0;owned\x07\x9b31m\u202eb\ud800\n\tc"


def unsafe(text: str) -> list[str]:
    return [sign for sign in text if (not sign.isprintable() and sign not in "\n\t") or "\ud800" <= sign <= "\udfff"]


def test_what_people_are_told_holds_no_escape_sequence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    console.say(NASTY)
    console.error(NASTY)
    console.facts(NASTY, [(NASTY, NASTY)])
    console.table(NASTY, [NASTY], [[NASTY]])

    def broken(args: Any) -> int:
        raise DataError(NASTY)

    monkeypatch.setitem(main.__globals__["VERBS"], "check", broken)
    assert main(["check", "x.yaml"]) == 2
    err = capsys.readouterr().err
    assert unsafe(err) == [] and "a␛]0;owned<U+0007><U+009B>31m<U+202E>b<U+D800>\n" in err
    assert "error: a␛" in err


def test_half_of_a_surrogate_pair_is_no_reason_to_print_no_json(capfdbinary: pytest.CaptureFixture[bytes]):
    console.emit_json({"a": "é\ud83d"})
    sys.stdout.flush()
    out = capfdbinary.readouterr().out
    assert out.decode() == '{"a": "é\\ud83d"}\n' and json.loads(out) == {"a": "é\ud83d"}


# -- options of one verb ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["audit", "-n", "3"], "`-n` belongs to `preview`"),
        (["check", "--row", "3"], "`--row` belongs to `preview`"),
        (["train", "--html"], "`--html` belongs to `preview`"),
        (["merge", "--resume"], "`--resume` belongs to `train`"),
        (["preview", "--config_file", "a.yaml"], "`--config_file` belongs to `train`"),
        (["new", "--config_file", ""], "`--config_file` belongs to `train`"),
    ],
)
def test_an_option_of_another_verb_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main([*words, "x.yaml"]) == 2
    assert said in capsys.readouterr().err
    assert main([*words, "x.yaml", "--json"]) == 2
    assert said in json.loads(capsys.readouterr().out)["error"]["message"]


def test_temporary_names_are_not_kept(workdir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_dir.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write_text(workdir / "a.txt", "text")
    assert names(workdir) == []
