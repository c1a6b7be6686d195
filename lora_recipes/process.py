"""Settings of the whole process that must be made before torch is imported; each has its reason."""

import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def prepare() -> None:
    """Set environment defaults; whatever the user has set wins."""
    # TRL sends a ping to the hub whenever a trainer starts.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Threads that wait at a barrier sleep instead of spinning. On an idle machine that costs nothing; beside another
    # busy process spinning made a training step 20 x slower (2 cores, GNU OpenMP).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
