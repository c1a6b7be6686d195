"""Writing: what a kill leaves is gone on with, errors of any thread arrive, and memory does not grow with the model."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lora_recipes.errors import EXIT_MACHINE, MachineError, machine_fault
from lora_recipes.merge import direct, stream, weights
from lora_recipes.merge.checkpoint import INDEX
from lora_recipes.merge.direct import Sink, congruent, read_back
from lora_recipes.merge.stream import DONE, Merger
from lora_recipes.merge.weights import write_weights
from tests.conftest import ROOT
from tests.merge.toys import EXPERTS, SIZES, WHOLE, edit, make_adapter, make_base, plan, recipe_on, streamed, tensors_in

MODEL = {
    "vocab_size": 16_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
}  # 300 MB in 16 bits
MIB = 2**20


class Stopped(Exception):
    """What stands for a kill in this process."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base in 9 shards, and its adapter."""
    base = make_base(tmp_path_factory.mktemp("base"), shard="40KB")
    return base, make_adapter(base, tmp_path_factory.mktemp("adapter"), **WHOLE)


@pytest.fixture(scope="module")
def undisturbed(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return streamed(recipe_on(made[0]), made[1], tmp_path_factory.mktemp("undisturbed"))[1].checksums


def checksums_of(folder: Path) -> dict[str, str]:
    return {file.name: xxhash.xxh3_128(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def stop_in(monkeypatch: pytest.MonkeyPatch, title: str) -> None:
    """Let the merge stop when half of this shard is written."""
    shard = Merger._shard
    bytes_of = stream._bytes_of
    seen: list[torch.Tensor] = []

    def stopping(self: Merger, folder: Path, of: str) -> str:
        def stopped(tensor: torch.Tensor) -> memoryview:
            seen.append(tensor)
            if of == title and len(seen) > len(self.layout.shards[title]) // 2:
                raise Stopped
            return bytes_of(tensor)

        seen.clear()
        monkeypatch.setattr(stream, "_bytes_of", stopped)
        return shard(self, folder, of)

    monkeypatch.setattr(Merger, "_shard", stopping)


def stopped_in(number: int, made: tuple[Path, Path], folder: Path) -> list[str]:
    """Begin a merge that stops in this shard. Returns the names of those that were finished."""
    planned = plan(recipe_on(made[0]), made[1])
    title = sorted(planned.layout.shards)[number]
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_in(patch, title)
        write_weights(planned, folder)
    finished = sorted(file.name for file in folder.glob("*.safetensors"))
    assert finished == sorted(planned.layout.shards)[:number] and (folder / f".{title}.part").is_file()
    return finished


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_merge_that_was_stopped_goes_on_where_it_was(
    number: int, made: tuple[Path, Path], undisturbed: dict[str, str], tmp_path: Path
):
    finished = stopped_in(number, made, tmp_path / "merged")
    times = {name: (tmp_path / "merged" / name).stat().st_mtime_ns for name in finished}
    _, result = streamed(recipe_on(made[0]), made[1], tmp_path / "merged")
    assert result.kept == len(finished) and result.checksums == undisturbed == checksums_of(tmp_path / "merged")
    assert times == {name: (tmp_path / "merged" / name).stat().st_mtime_ns for name in finished}
    assert {file.name for file in (tmp_path / "merged").iterdir()} == undisturbed.keys() | {INDEX}


def test_the_rounding_that_is_reported_is_that_of_all_shards_also_after_a_stop(made: tuple[Path, Path], tmp_path: Path):
    _, whole = streamed(recipe_on(made[0]), made[1], tmp_path / "whole")
    stopped_in(4, made, tmp_path / "merged")
    _, result = streamed(recipe_on(made[0]), made[1], tmp_path / "merged")
    assert whole.rounded_away and result.rounded_away == whole.rounded_away


def test_a_finished_shard_that_was_damaged_is_written_again(
    made: tuple[Path, Path], undisturbed: dict[str, str], tmp_path: Path
):
    finished = stopped_in(4, made, tmp_path / "merged")
    file = tmp_path / "merged" / finished[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (tmp_path / "merged" / finished[2]).unlink()
    _, result = streamed(recipe_on(made[0]), made[1], tmp_path / "merged")
    assert result.kept == len(finished) - 2 and checksums_of(tmp_path / "merged") == undisturbed


def test_a_record_of_progress_that_cannot_be_read_is_no_progress(
    made: tuple[Path, Path], undisturbed: dict[str, str], tmp_path: Path
):
    stopped_in(4, made, tmp_path / "merged")
    (tmp_path / "merged" / DONE).write_text('{"plan": ')
    _, result = streamed(recipe_on(made[0]), made[1], tmp_path / "merged")
    assert result.kept == 0 and checksums_of(tmp_path / "merged") == undisturbed


CHANGES: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "another adapter": lambda base, adapter: edit(adapter / "adapter_model.safetensors", lambda _, t: t * 2) or {},
    "another scaling": lambda base, adapter: rescale(adapter) or {},
    "another base": lambda base, adapter: edit(min(base.glob("*.safetensors")), lambda _, t: t * 2) or {},
    "another type": lambda base, adapter: {"dtype": "float16"},
    "other shards": lambda base, adapter: {"max_shard_size": "100KB"},
    "one file": lambda base, adapter: {"max_shard_size": "1GB"},
    "a quantized base": lambda base, adapter: {"quantization": {"load_in_8bit": True}},
}


def rescale(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7}))


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_kept_of_a_merge_of_something_else(change: str, made: tuple[Path, Path], tmp_path: Path):
    base, adapter = (copied(folder, tmp_path / name) for folder, name in zip(made, ("base", "adapter"), strict=True))
    stopped_in(4, (base, adapter), tmp_path / "merged")
    recipe = recipe_on(base, **CHANGES[change](base, adapter))
    _, result = streamed(recipe, adapter, tmp_path / "merged")
    assert result.kept == 0
    streamed(recipe, adapter, tmp_path / "alone")
    assert checksums_of(tmp_path / "merged") == checksums_of(tmp_path / "alone")
    # Nothing of the first is left either: transformers would load it, and `publish` would publish it.
    assert names_in(tmp_path / "merged") == names_in(tmp_path / "alone")


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_type_the_base_was_quantized_from_is_part_of_the_plan(made: tuple[Path, Path]):
    """All else is the same, and the codes are others."""
    identities = {
        plan(recipe_on(made[0], {"load_in_4bit": True}, {"dtype": loaded}, dtype="float32"), made[1]).identity
        for loaded in ("float32", "bfloat16")
    }
    assert len(identities) == 2


def test_progress_is_kept_for_as_long_as_the_caller_wants(made: tuple[Path, Path], tmp_path: Path):
    """Proving a merged model may be killed for memory; writing it again would be for nothing."""
    planned = plan(recipe_on(made[0]), made[1])
    first = write_weights(planned, tmp_path, keep_progress=True)
    again = write_weights(planned, tmp_path, keep_progress=True)
    assert (first.kept, again.kept) == (0, len(first.checksums)) and first.checksums == again.checksums
    weights.forget_progress(tmp_path)
    assert names_in(tmp_path) == sorted([*first.checksums, INDEX])


def test_experts_that_a_kept_shard_holds_are_not_kept_in_memory(tmp_path: Path):
    base = make_base(tmp_path / "base", "qwen3_moe", shard="20KB", **EXPERTS)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    planned = plan(recipe_on(base), adapter)
    (tmp_path / "merged").mkdir()
    write_weights(planned, tmp_path / "merged", keep_progress=True)
    lost = [title for title, shard in planned.layout.shards.items() if any(u.converter for u, _ in shard)][1]
    (tmp_path / "merged" / lost).unlink()
    with weights.Files() as files:
        merger = Merger(planned.layout, files, None)
        merger.write(tmp_path / "merged", planned.identity)
    assert not merger.converted


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_how_many_threads_merge_changes_no_bit(
    workers: int,
    made: tuple[Path, Path],
    undisturbed: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Also with few copies of layers, and where the threads take turns as often as they can."""
    monkeypatch.setattr(stream, "BLOCK", 64)
    monkeypatch.setattr(stream, "COPIES", 2)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        planned = plan(recipe_on(made[0]), made[1])
        with weights.Files() as files:
            result = Merger(planned.layout, files, None, workers).write(tmp_path, planned.identity)
    finally:
        sys.setswitchinterval(interval)
    assert result.checksums == undisturbed == checksums_of(tmp_path)
    assert result.rounded_away == streamed(recipe_on(made[0]), made[1], tmp_path / "again")[1].rounded_away


def test_a_record_of_an_older_version_is_no_progress(
    made: tuple[Path, Path], undisturbed: dict[str, str], tmp_path: Path
):
    planned = plan(recipe_on(made[0]), made[1])
    write_weights(planned, tmp_path, keep_progress=True)
    done = json.loads((tmp_path / DONE).read_text())
    for record in done["shards"].values():
        record["sha256"] = record.pop("checksum")
    (tmp_path / DONE).write_text(json.dumps(done))
    result = write_weights(planned, tmp_path)
    assert result.kept == 0 and result.checksums == undisturbed


SCRIPT = """
import os, signal, sys
from pathlib import Path
from lora_recipes import process
process.prepare()
from lora_recipes.merge import stream
from lora_recipes.merge.weights import write_weights
from tests.merge.toys import plan, recipe_on

base, adapter, folder, what = sys.argv[1:]
planned = plan(recipe_on(base), Path(adapter))
Path(folder).mkdir(exist_ok=True)
if what == "kill":
    bytes_of, seen = stream._bytes_of, []

    def killed(tensor):
        seen.append(tensor.shape)
        if len(seen) == 15:
            os.kill(os.getpid(), signal.SIGKILL)
        return bytes_of(tensor)

    stream._bytes_of = killed


def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))


Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = kib("VmRSS")
write_weights(planned, Path(folder))
print("grown", kib("VmHWM") - before)
"""


def run(base: Path, adapter: Path, folder: Path, what: str) -> subprocess.CompletedProcess:
    arguments = [sys.executable, "-c", SCRIPT, base, adapter, folder, what]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="/proc/self/clear_refs")
def test_a_killed_process_leaves_what_the_next_one_goes_on_with(
    made: tuple[Path, Path], undisturbed: dict[str, str], tmp_path: Path
):
    killed = run(*made, tmp_path / "merged", "kill")
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "merged").glob(".*.part"))
    finished = len(list((tmp_path / "merged").glob("*.safetensors")))
    _, result = streamed(recipe_on(made[0]), made[1], tmp_path / "merged")
    assert result.kept == finished > 0 and checksums_of(tmp_path / "merged") == undisturbed
    assert names_in(tmp_path / "merged") == sorted([*undisturbed, INDEX])


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="/proc/self/clear_refs")
def test_memory_does_not_grow_with_the_model(tmp_path: Path):
    config = AutoConfig.for_model("llama", **(SIZES | MODEL | {"num_attention_heads": 16}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    zeros = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in model.state_dict().items()}
    (tmp_path / "base").mkdir()
    save_file(zeros, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    config.save_pretrained(tmp_path / "base")
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    del zeros
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", **WHOLE)
    result = run(tmp_path / "base", adapter, tmp_path / "merged", "measure")
    assert result.returncode == 0, result.stderr
    grown = int(result.stdout.split()[-1]) * 1024
    assert size > 280 * MIB and grown < size / 2
    assert any(tensor.any() for tensor in tensors_in(tmp_path / "merged").values())  # it did merge


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    planned = plan(recipe_on(made[0]), made[1])
    usage = namedtuple("usage", "total used free")
    free = planned.layout.bytes + weights.SPARE
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, free - 1))
    with pytest.raises(MachineError, match="make room") as caught:
        write_weights(planned, tmp_path)
    assert caught.value.exit_code == EXIT_MACHINE and not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, free))
    write_weights(planned, tmp_path)


def test_what_is_there_already_needs_no_room(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stopped_in(4, made, tmp_path / "merged")
    there = sum(file.stat().st_size for file in (tmp_path / "merged").iterdir() if file.name != DONE)
    planned = plan(recipe_on(made[0]), made[1])
    usage = namedtuple("usage", "total used free")
    free = planned.layout.bytes + weights.SPARE - there
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, free))
    assert write_weights(planned, tmp_path / "merged").kept == 4


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="/proc")
def test_a_disk_that_fills_up_while_writing(
    made: tuple[Path, Path], undisturbed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    planned = plan(recipe_on(made[0]), made[1])
    write, threads = os.writev, torch.get_num_threads()

    def full(descriptor: int, pieces: list[memoryview]) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == ".model-00004-of-00009.safetensors.part":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(direct.os, "writev", full)
        with pytest.raises(OSError, match="No space left") as caught:
            write_weights(planned, tmp_path)
    fault = machine_fault(caught.value)
    assert fault is not None and "model-00004" in str(fault)  # which file it was
    assert torch.get_num_threads() == threads
    assert write_weights(planned, tmp_path).checksums == undisturbed  # room was made


def test_a_disk_that_cannot_be_read(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    planned = plan(recipe_on(made[0]), made[1])

    def broken(*arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("lora_recipes.merge.checkpoint.os.preadv", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write_weights(planned, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_ctrl_c_while_merging_ends_it(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    planned = plan(recipe_on(made[0]), made[1])

    def interrupted(*arguments: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "merge_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_weights(planned, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) < len(planned.layout.shards)


SHM = Path("/dev/shm")


@pytest.mark.parametrize("where", ["disk", "memory", "nothing direct", "direct refused later"])
@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 8 * MIB - 1, 8 * MIB, 8 * MIB + 1, 17 * MIB + 5])
def test_a_sink_holds_every_byte_and_no_more_and_they_are_read_back(
    where: str, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "file"
    if where == "memory":
        if not os.access(SHM, os.W_OK):
            pytest.skip("no /dev/shm")
        path = SHM / f"lora-recipes-test-{os.getpid()}"
    if where == "nothing direct":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    if where == "direct refused later":
        refuse_direct(monkeypatch)
    data = torch.randint(0, 256, (length,), dtype=torch.uint8).numpy().tobytes()
    try:
        with Sink(path) as taking:
            for first in range(0, length, 3 * MIB):  # in pieces that are cut elsewhere than the sink's buffers
                taking.put(memoryview(data)[first : first + 3 * MIB])
        assert path.read_bytes() == data
        for cached in (False, True):
            assert read_back(path, taking.checksum, cached=cached) == hashlib.sha256(data).hexdigest()
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("where", ["disk", "direct refused later", "written in part"])
def test_bytes_that_lie_as_in_the_file_are_not_copied(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of any length, among others that lie elsewhere: the file is the same, and its long pieces are written from where they are."""
    lengths = random.Random(0)
    if where == "direct refused later":
        refuse_direct(monkeypatch)
    if where == "written in part":
        write, parts = os.writev, random.Random(1)

        def in_part(descriptor: int, pieces: list[memoryview]) -> int:
            several = pieces[: parts.randint(1, len(pieces))]
            return write(descriptor, [*several[:-1], several[-1][: parts.choice([4096, 5000, len(several[-1])])]])

        monkeypatch.setattr(direct.os, "writev", in_part)
    copied, copy = [], Sink._copy
    monkeypatch.setattr(Sink, "_copy", lambda self, data: copied.append(len(data)) or copy(self, data))
    content, long = bytearray(), 0
    with Sink(tmp_path / "file") as taking:
        for number in range(60):
            length = lengths.choice([1, 100, 4096, 70_000, 2 * MIB, 9 * MIB + 1])
            piece = congruent(length, len(content)) if number % 3 else memoryview(bytearray(length))
            piece[:] = lengths.randbytes(length)
            content += piece
            long += length if number % 3 and length >= 70_000 else 0
            taking.put(piece)
    assert (tmp_path / "file").read_bytes() == content
    assert taking.checksum == xxhash.xxh3_128(content).hexdigest()
    assert 0 < long <= len(content) - sum(copied) + 60 * 2 * 4096  # but for the pages at both ends


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems open a file so that it goes past the page cache, and refuse to write or to read (EINVAL)."""
    fcntl = pytest.importorskip("fcntl")
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("no O_DIRECT")

    def refusing(call: Callable[[int, Any], int]) -> Callable[[int, Any], int]:
        def refused(descriptor: int, data: Any) -> int:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return call(descriptor, data)

        return refused

    monkeypatch.setattr(direct.os, "writev", refusing(os.writev))
    monkeypatch.setattr(direct.os, "readv", refusing(os.readv))


def test_a_sink_that_is_left_by_an_error_closes_its_file(tmp_path: Path):
    with pytest.raises(Stopped), Sink(tmp_path / "file") as taking:
        taking.put(memoryview(b"some"))
        raise Stopped
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(taking.descriptor)
