"""Runs a command and writes what it took: a small process of its own, since a child's peak counts its parent's memory.

python -I -S clock.py RESULT CORES COMMAND...

CORES is how many it may run on; 0: all.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    result, cores, *command = sys.argv[1:]
    if int(cores):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
    started = time.time()
    running = subprocess.Popen(command)
    _, status, used = os.wait4(running.pid, 0)  # of the child and all that it waited for; the peak is of the largest
    took = {
        "rc": os.waitstatus_to_exitcode(status),
        "wall": time.time() - started,
        "cpu": used.ru_utime + used.ru_stime,
        "rss_mb": used.ru_maxrss / 1024,
        "started": started,
    }
    Path(result).write_text(json.dumps(took), encoding="utf-8")


if __name__ == "__main__":
    main()
