"""Other tools doing the same LoRA job on the same machine, each in its own environment, counted by one hook.

lay_out(folder, data), then install(PEERS[name], lab), then measure(name, job, steps, folder, threads) and the others.
`traced` runs any other command, ours too, counted the same way. Nothing here imports torch into the caller.
"""

from benchmarks.peers.install import install
from benchmarks.peers.lab import Lab, default_folder, lay_out, opened
from benchmarks.peers.measure import (
    PEERS,
    adapter_of,
    held_out_loss,
    held_out_of,
    measure,
    measure_help,
    measure_merge,
    traced,
)
from benchmarks.peers.peer import TARGETS, CannotError, Job

__all__ = [
    "PEERS",
    "TARGETS",
    "CannotError",
    "Job",
    "Lab",
    "adapter_of",
    "default_folder",
    "held_out_loss",
    "held_out_of",
    "install",
    "lay_out",
    "measure",
    "measure_help",
    "measure_merge",
    "opened",
    "traced",
]
