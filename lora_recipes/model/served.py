"""Answers of a model folder as users get them: from `transformers serve` over HTTP, through the `openai` client."""

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from lora_recipes.errors import MachineError

NEEDED = ("openai", "fastapi", "uvicorn")  # of the extra `serve`
STARTS_WITHIN = 600.0  # seconds; a large model is read from a slow disk
ANSWERS_WITHIN = 600.0  # seconds a question
POLL = 0.1  # seconds between two looks at a server that starts
TAIL = 15  # lines of the server's log in an error


def served_answers(folder: Path, conversations: list[list[dict[str, Any]]], max_new_tokens: int) -> list[str]:
    """Greedy answers of a server of its own on a free loopback port, one a conversation, in their order.

    Args:
        folder: a plain model, as `merge` publishes it.
        conversations: messages, each {"role", "content"}; the last is the user's.
        max_new_tokens: limit of each answer.

    Raises:
        MachineError: the extra `serve` is not installed, or the server does not start, dies, or refuses a question.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MachineError(f"serving needs {', '.join(missing)}: pip install 'lora-recipes[serve]'")
    from openai import OpenAI, OpenAIError

    with _server(folder) as (address, log):
        client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=ANSWERS_WITHIN, max_retries=0)
        answers = []
        for messages in conversations:
            try:
                given = client.chat.completions.create(
                    model=str(folder),
                    messages=cast(Any, messages),
                    max_tokens=max_new_tokens,
                    temperature=0.0,
                )
            except OpenAIError as error:
                raise MachineError(f"the server of {folder} gave no answer: {error}\n{_tail(log)}") from None
            answers.append(given.choices[0].message.content or "")
    return answers


@contextmanager
def _server(folder: Path) -> Iterator[tuple[str, Path]]:
    """(address, log file) of a server that is ready; it has ended when the block has."""
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory(prefix="lora-recipes-serve-") as scratch:
        log = Path(scratch) / "server.log"
        with log.open("wb") as stream:
            server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=_environment()
            )
        try:
            _wait_until_ready(server, address, folder, log)
            yield address, log
        finally:
            _stop(server)


def _environment() -> dict[str, str]:
    """Offline, and with no proxy between this process and its own server."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(server: subprocess.Popen[bytes], address: str, folder: Path, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    limit = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < limit:
        try:
            with opener.open(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            pass  # not yet
        try:
            code = server.wait(POLL)
        except subprocess.TimeoutExpired:
            continue
        raise MachineError(f"the server of {folder} ended with code {code} before it was ready:\n{_tail(log)}")
    raise MachineError(f"the server of {folder} was not ready within {STARTS_WITHIN:.0f} seconds:\n{_tail(log)}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:])
