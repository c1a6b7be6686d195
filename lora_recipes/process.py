"""Settings of the whole process that must be made before torch is imported, each with its reason; processes that end
together."""

import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA, either of them under WSL, AMD
LAUNCH_CONFIG = "accelerate/default_config.yaml"  # what `accelerate config` writes, in Hugging Face's cache
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # schedulers and people ask with these
PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
# Where exit code and message go for a caller behind a launcher, which turns every failure into 1.
OUTCOME_FILE = "LORA_RECIPES_OUTCOME_FILE"
THREADS = "LORA_RECIPES_THREADS"  # of a CPU run that repeats another: sums depend on how they are shared out
SHUTDOWN = "600"  # seconds that torchrun gives its ranks to save, instead of 30


def is_set(environment: Mapping[str, str], name: str) -> bool:
    """Whether a variable is what accelerate takes for true. (Its own parser would import all of it.)"""
    return environment.get(name, "").lower() in ("y", "yes", "t", "true", "on", "1")


def prepare() -> None:
    """Set environment defaults; whatever the user has set wins."""
    # TRL sends a ping to the hub whenever a trainer starts.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Threads that wait at a barrier sleep instead of spinning. On an idle machine that costs nothing; beside another
    # busy process spinning made a training step 20 x slower (2 cores, GNU OpenMP).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # oneDNN keeps what it has compiled for a shape, of which rows of all lengths bring ever new ones: by itself 1,024, which
    # came to 450 MB of a bf16 training of the demo model. Fewer cost no time.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    # tokenizers warns when a process that has used it forks (data loader workers).
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # On CPUs with AVX512_BF16 bitsandbytes asks for a package that would fetch a kernel from the hub, for the very path
    # that `model.build.keep_canonical_4bit` switches off.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # transformers 5.23 warns about its own use of a name that it has deprecated.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


@contextmanager
def importing(*, alone: bool) -> Iterator[None]:
    """Around imports of whole libraries. What they make stays, so a search for garbage among it is time lost.

    Args:
        alone: this process does one thing and ends: no later search has to look at the libraries again. Elsewhere nothing
            is changed.
    """
    if not alone:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def launcher(config_file: str | None) -> list[str]:
    """What Python is told before the name of the module that trains.

    Without a GPU and without an accelerate config `accelerate launch` has nothing to set: it would import torch (a CPU
    second or two) only to start one process, so that process is started directly.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    configured = config_file is not None or Path(home, LAUNCH_CONFIG).expanduser().is_file()
    if not configured and not any(Path(device).exists() for device in GPU_DEVICES):
        return ["-m"]
    config = ["--config_file", config_file] if config_file is not None else []
    return ["-m", "accelerate.commands.launch", "--quiet", *config, "--module"]


def follow_parent(number: int = signal.SIGTERM) -> None:
    """Ask the kernel for a signal when the parent of this process ends. Linux only."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def run_to_the_end(command: list[str], environment: dict[str, str]) -> tuple[int, str | None]:
    """Run a command and hand on every signal that asks to stop, for the command knows how.

    Returns:
        its exit code, and the name of the first signal.
    """
    import subprocess  # which no quick answer has to wait for

    asked: list[int] = []

    def hand_on(number: int, _: object) -> None:
        asked.append(number)
        child.send_signal(number)

    given = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SHUTDOWN} | os.environ | environment
    child = subprocess.Popen(command, env=given, stdout=sys.stderr, preexec_fn=follow_parent)
    before = {number: signal.signal(number, hand_on) for number in STOPPING}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, signal.Signals(asked[0]).name if asked else None
