"""Processes that train together: the ones that are left say which one is gone, and end."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import DistStoreError, TCPStore

from lora_recipes import process, train
from lora_recipes.errors import EXIT_MACHINE, RankLost, RefusedError
from lora_recipes.run_dir import RunDir, read_json, write_json
from lora_recipes.train import launch, ranks
from lora_recipes.train.checkpoints import numbered, why_broken
from lora_recipes.train.trainer import RecipeTrainer
from tests.conftest import ROOT
from tests.train.launched import LONG, TORCHRUN, VERB, Launched, wait_until

RESET = "[third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"
TIMED_OUT = "[third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 20000ms for recv operation"
CLOSED = "Application timeout caused pair closure"
WAIT = 20  # seconds that ranks of these tests wait for each other
GRACE = 30  # seconds that torchrun gives a rank that does not end when another has failed


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """The launcher's store of a run of four; this process is rank 2."""
    made = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in (("RANK", 2), ("WORLD_SIZE", 4), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", made.port)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(ranks, "ANSWER", timedelta(seconds=0.3))
    return made


@pytest.fixture
def signals_back():
    before = {number: signal.getsignal(number) for number in process.STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("there", [(0,), (0, 1, 3), ()], ids=str)
def test_the_ranks_that_do_not_say_that_they_are_there_are_named(store: TCPStore, there: tuple[int, ...]):
    for rank in there:
        store.set(ranks.key(rank, ranks.LOST_CONTACT), "here")
    assert ranks.silent_ranks() == [rank for rank in (0, 1, 3) if rank not in there]
    assert store.check([ranks.key(2, ranks.LOST_CONTACT)])  # so the others do not take this one for gone


def test_of_the_silent_ranks_those_that_stand_still_are_named(store: TCPStore, monkeypatch: pytest.MonkeyPatch):
    """Rank 0 is there, 1 is halted or gone, and 3 waits for 1: it is silent too, and not the cause."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store.set(ranks.key(0, ranks.LOST_CONTACT), "here")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        for rank, pid in ((1, other.pid), (3, os.getpid())):
            store.set(ranks.key(rank, ranks.PROCESS), f"{ranks.pid_space()} {pid}")
        try:
            assert ranks.silent_ranks() == [1, 3]  # nobody stands still: who is silent
            other.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, other.pid, os.WSTOPPED | os.WNOWAIT)
            assert ranks.silent_ranks() == [1]
        finally:
            other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert ranks.silent_ranks() == [1]  # has ended, and nobody has asked for its exit code
    assert ranks.silent_ranks() == [1]
    store.set(ranks.key(1, ranks.PROCESS), f"elsewhere {other.pid}")
    assert ranks.silent_ranks() == [1, 3]
    ranks.introduce()
    assert store.get(ranks.key(2, ranks.PROCESS)).decode() == f"{ranks.pid_space()} {os.getpid()}"


def test_what_an_earlier_attempt_said_does_not_count(store: TCPStore, monkeypatch: pytest.MonkeyPatch):
    for rank in (0, 1, 3):
        store.set(ranks.key(rank, ranks.LOST_CONTACT), "here")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert ranks.silent_ranks() == [0, 1, 3]


def test_without_the_store_it_was_rank_0_that_held_it(store: TCPStore, monkeypatch: pytest.MonkeyPatch):
    def gone(*given: Any, **named: Any) -> TCPStore:
        raise DistStoreError("connection refused")

    monkeypatch.setattr(ranks, "TCPStore", gone)
    assert ranks.silent_ranks() == [0]
    monkeypatch.setenv("RANK", "0")
    assert ranks.silent_ranks() == []


@pytest.mark.parametrize(
    ("said", "told"),
    [(RESET, "is gone: it was killed"), (TIMED_OUT, "did not answer in time"), (CLOSED, "did not answer in time")],
)
def test_an_error_between_ranks_is_one_message(store: TCPStore, signals_back: None, said: str, told: str):
    for rank in (0, 3):
        store.set(ranks.key(rank, ranks.LOST_CONTACT), "here")
    lost = ranks.lost_contact(RuntimeError(f"{said}\nmore"))
    assert isinstance(lost, RankLost) and lost.exit_code == EXIT_MACHINE
    assert f"rank 1 of 4 {told}" in str(lost) and said in str(lost) and "more" not in str(lost).split(said)[1]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # the launcher's


def test_another_error_is_not_one_between_ranks(store: TCPStore):
    before = signal.getsignal(signal.SIGTERM)
    assert ranks.lost_contact(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert signal.getsignal(signal.SIGTERM) is before and not store.check([ranks.key(2, ranks.LOST_CONTACT)])


@pytest.mark.parametrize("first", [None, RefusedError("step 2: loss is nan")], ids=["nobody told", "told before"])
def test_a_rank_that_is_left_alone_writes_down_why_unless_the_one_that_left_has(
    first: RefusedError | None,
    write_recipe: Callable[..., Path],
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    """Rank 1 of two, whose exchange with rank 0 fails in its second step; rank 0 had told its outcome, or not."""
    run_dir, outcome = RunDir.of("tiny"), workdir / "outcome.json"
    real = RecipeTrainer.training_step

    def training_step(self: RecipeTrainer, *given: Any) -> torch.Tensor:
        if self.state.global_step == 1:
            monkeypatch.setenv("RANK", "1")
            if first:
                failed = {"state": "failed", "exit_code": first.exit_code, "reason": str(first)}
                write_json(run_dir.status, read_json(run_dir.status) | failed)
            raise RuntimeError(RESET)
        return real(self, *given)

    monkeypatch.setattr(RecipeTrainer, "training_step", training_step)
    monkeypatch.setattr(
        train, "_rank_lost", lambda error: RankLost("rank 0 of 2 is gone") if RESET in str(error) else None
    )
    monkeypatch.setenv(process.OUTCOME_FILE, str(outcome))
    expected = (first.exit_code, str(first)) if first else (EXIT_MACHINE, "rank 0 of 2 is gone")
    assert launch(str(write_recipe()), []) == expected[0]
    status = read_json(run_dir.status)
    assert (status["state"], status["exit_code"], status["reason"]) == ("failed", *expected)
    assert read_json(outcome) == {"exit_code": expected[0], "message": expected[1]}
    assert ("rank 0 of 2 is gone" in capsys.readouterr().err) == (first is None)


def launch_ranks(by: str, count: int, write_recipe: Callable[..., Path], workdir: Path) -> Launched:
    """Ranks that save every fifth step, under torchrun or `lora-recipes train`."""
    keys: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 2, "ddp_timeout": WAIT}
    config = workdir / "ranks.yaml"
    config.write_text(f"distributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: {count}\n")
    torchrun = [*TORCHRUN[:-1], str(count), ROOT / "run.py"]
    command = torchrun if by == "torchrun" else [*VERB, "--config_file", config]
    launched = Launched(command, write_recipe("lost", training=LONG | keys), workdir)
    wait_until(lambda: launched.step() >= 6)
    return launched


# With three each hears from one neighbour, so that a rank which is there is silent, too.
RUNS = [*((by, 2, lost) for by in ("torchrun", "verb") for lost in (0, 1)), ("torchrun", 3, 1), ("torchrun", 3, 2)]


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.promise("F15")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
@pytest.mark.parametrize(("by", "count", "lost"), RUNS)
def test_a_rank_that_is_killed_or_hangs_ends_the_run_and_is_named(
    by: str,
    count: int,
    lost: int,
    number: signal.Signals,
    write_recipe: Callable[..., Path],
    workdir: Path,
):
    launched = launch_ranks(by, count, write_recipe, workdir)
    ids = {
        rank: pid
        for pid in launched.members()
        for rank in range(count)
        if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text()
    }
    os.kill(ids[lost], number)
    code = launched.process.wait(WAIT + GRACE + 60)
    wait_until(lambda: not launched.members())
    log, status = Path(launched.log.name).read_text(), read_json(launched.run_dir.status)
    assert code == (EXIT_MACHINE if by == "verb" else 1), log
    assert (status["state"], status["exit_code"]) == ("failed", EXIT_MACHINE), log
    assert status["reason"].startswith(f"rank {lost} of {count} ") and status["reason"] in " ".join(log.split())
    run, found = read_json(launched.run_dir.manifest)["run"], numbered(launched.run_dir.checkpoints)
    assert found and all(why_broken(folder, run) is None for _, folder in found)
    assert not launched.run_dir.adapter.exists()
