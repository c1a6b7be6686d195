"""What the rows of a split are made of, as hashes: what is cached is bound to them."""

import hashlib
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from lora_recipes.data.files import Source, local_files
from lora_recipes.data.formats import RowSettings
from lora_recipes.data.readers import load_hub
from lora_recipes.run_dir import file_sha256


def settings_key(settings: RowSettings) -> dict[str, Any]:
    """What of the settings and of the code decides how a row is read."""
    return {"settings": asdict(settings), "code": _code_version()}


def content_of(source: Source, split: str) -> list[Any] | None:
    """What the rows of a split are made of; None when that cannot be told without reading them."""
    if not source.is_hub():
        return [[str(file.path), file.kind, file_hash(file.path)] for file in local_files(source, split)]
    revision = str(source.keys.get("revision") or "")
    if source.get("streaming"):
        pinned = len(revision) == 40
        return [source.keys["path"], source.keys.get("name"), revision, split] if pinned else None
    return [source.keys["path"], split, load_hub(source, split)._fingerprint]


def file_hash(path: Path) -> str:
    """sha256 of a file, once for each state of it."""
    seen = path.stat()
    return _hash_of(path, seen.st_ino, seen.st_size, seen.st_mtime_ns)


@cache
def _hash_of(path: Path, *state: int) -> str:
    return file_sha256(path)


@cache
def _code_version() -> str:
    """Changes with the code that makes tokens of rows."""
    folder = Path(__file__).parent
    names = ("formats.py", "masks.py", "encode.py", "readers.py", "prepare.py")
    return hashlib.sha256("".join((folder / name).read_text(encoding="utf-8") for name in names).encode()).hexdigest()
