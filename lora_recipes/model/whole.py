"""Models that a process builds whole, though the launch shares models out."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def not_shared_out() -> Iterator[None]:
    """Meanwhile DeepSpeed's ZeRO-3 leaves models alone.

    Once transformers knows its config, every model that is built is given away in parts to all processes: one without memory
    too, whose weights then have no size, and one that a single process builds, which waits for the others for ever.
    """
    from transformers.integrations import deepspeed  # not at import: commands that build nothing read this module too

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept
