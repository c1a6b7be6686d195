"""One virtual environment per tool, made with pip from its pins; done again only when the pins change."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.lab import Lab
from benchmarks.peers.peer import TORCH, Peer
from benchmarks.peers.run import measured

HOURS = 3600


def install(peer: Peer, lab: Lab) -> dict[str, Any]:
    """Make the tool's environment and what else it needs once. Returns its row: `rc`, and `error` where it failed."""
    venv = lab.venv(peer.name)
    stamp = venv / "installed.json"
    wanted = json.dumps([list(words) for words in peer.pip])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return {"peer": peer.name, "rc": 0, "version": version(peer, lab), "again": True}
    stamp.unlink(missing_ok=True)
    constraints = lab.folder / "constraints.txt"
    constraints.write_text(TORCH + "\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
    pip = [lab.bin(peer.name, "python"), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    steps = [("pip", [*pip, *words], {}) for words in peer.pip]
    row: dict[str, Any] = {"peer": peer.name, "rc": 0}
    for name, words, environment in steps:
        row |= measured(words, lab, f"{peer.name}-{name}", threads=1, environment=environment, timeout=HOURS)
        if row["rc"] != 0:
            return row
    for command in peer.prepare(lab):
        row |= measured(command.words, lab, f"{peer.name}-prepare", threads=1, environment=command.environment)
        if row["rc"] != 0:
            return row
    frozen = subprocess.run([*pip[:3], "freeze"], check=True, stdout=subprocess.PIPE, text=True)
    (venv / "freeze.txt").write_text(frozen.stdout, encoding="utf-8")
    stamp.write_text(wanted, encoding="utf-8")
    return row | {"version": version(peer, lab)}


def version(peer: Peer, lab: Lab) -> str | None:
    """What is installed, from the environment's metadata; None where it is not."""
    name = peer.distribution.replace("-", "_")
    found = sorted(lab.venv(peer.name).glob(f"lib/python*/site-packages/{name}-*.dist-info"))
    return found[0].name.removesuffix(".dist-info").rpartition("-")[2] if found else None


def site_packages(lab: Lab, tool: str) -> Path:
    return next(lab.venv(tool).glob("lib/python*/site-packages"))
