"""One virtual environment per tool, made with pip from its pins; done again only when the pins change."""

import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.peers.lab import Lab
from benchmarks.peers.peer import TORCH, Command, Peer
from benchmarks.peers.run import measured


def install(peer: Peer, lab: Lab) -> dict[str, Any]:
    """Make the tool's environment, and once what else it needs. Returns its row: `rc`, and `error` where it failed."""
    if peer.own:
        return {"peer": peer.name, "rc": 0, "version": version(peer, lab), "seconds": 0.0}
    venv = lab.venv(peer.name)
    stamp, wanted = venv / "installed.json", json.dumps(peer.pip)
    started = time.monotonic()
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        for number, command in enumerate(_commands(peer, lab)):
            took = measured(
                command.words, lab, f"{peer.name}-install-{number}", threads=1, environment=command.environment
            )
            if took["rc"] != 0:
                return {"peer": peer.name, "rc": took["rc"], "error": took["error"]}
        stamp.write_text(wanted, encoding="utf-8")
    return {"peer": peer.name, "rc": 0, "version": version(peer, lab), "seconds": time.monotonic() - started}


def _commands(peer: Peer, lab: Lab) -> Iterator[Command]:
    constraints = lab.folder / "constraints.txt"
    constraints.write_text(TORCH + "\n", encoding="utf-8")
    python = lab.bin(peer.name, "python")
    for words in peer.pip:
        yield Command([python, "-m", "pip", "install", "--quiet", "--constraint", str(constraints), *words])
    yield from peer.prepare(lab)
    yield Command([python, "-m", "pip", "freeze"])  # for the log: what pip chose


def version(peer: Peer, lab: Lab) -> str | None:
    """What is installed, from the environment's metadata; None where it is not."""
    if peer.own:
        return importlib.metadata.version(peer.distribution)
    name = peer.distribution.replace("-", "_")
    found = sorted(lab.venv(peer.name).glob(f"lib/python*/site-packages/{name}-*.dist-info"))
    return found[0].name.removesuffix(".dist-info").rpartition("-")[2] if found else None
