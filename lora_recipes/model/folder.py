"""What a published model folder may hold, and the list of checksums it is held against afterwards."""

import re
from pathlib import Path

from lora_recipes.errors import BrokenFile, RefusedError
from lora_recipes.redact import find_secret
from lora_recipes.run_dir import SUMS, file_sha256, write_text

LINE = re.compile(r"([0-9a-f]{64})  ([^/\\\0][^\\\0]*)")  # of a list of checksums

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
LOADED = (".safetensors", ".json", ".jinja", ".py", *PICKLES)
TEXTS = (".json", ".jinja", ".md", ".txt", ".py", ".model_card", ".yaml")
# Hold every short text there is: Qwen's has "/root" and "/workspace" as tokens.
VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"}
LONGEST_TEXT = 64 * 2**20  # bytes; a tokenizer.json may have 20 MB


def require_publishable(folder: Path, *, adapter: bool = False) -> None:
    """Look for what must not leave this machine, or would load as something else.

    Args:
        adapter: whether the folder is an adapter's. A plain model beside an adapter config is adapted twice by transformers.

    Raises:
        RefusedError: a pickle, an adapter in a plain model's folder, a path of this machine, or a secret.
    """
    here = [str(place) for place in {Path.home(), Path.cwd()} if len(place.parts) > 1]
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.suffix in PICKLES:
            raise RefusedError(f"{file}: a pickle, which runs code when it is loaded; nothing is published")
        if file.name.startswith("adapter_") and not adapter:
            raise RefusedError(
                f"{file}: an adapter in a plain model's folder would be applied twice; nothing is published"
            )
        if file.suffix not in TEXTS or file.stat().st_size > LONGEST_TEXT:
            continue
        text = file.read_text(encoding="utf-8")
        if find_secret(text):
            raise RefusedError(f"{file}: holds what looks like a secret; nothing is published")
        for place in here if file.name not in VOCABULARIES else []:
            if re.search(rf"{re.escape(place)}(/|\"|$)", text, re.MULTILINE):
                raise RefusedError(f"{file}: holds a path of this machine ({place}); nothing is published")


def write_sums(folder: Path, known: dict[str, str] | None = None) -> None:
    """Write the sha256 of every file in the folder.

    Args:
        known: file name → sha256, for those that are known already.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    sums = {name: (known or {}).get(name) or file_sha256(folder / name) for name in names}
    write_text(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def read_sums(folder: Path) -> dict[str, str]:
    """File name → sha256; {} where there is no list. Raises BrokenFile where it is none, or names what is not in the folder."""
    file = folder / SUMS
    if not file.is_file():
        return {}
    try:
        found = [LINE.fullmatch(line) for line in file.read_text(encoding="utf-8").splitlines()]
        lines = {match[2]: match[1] for match in found if match}
        if len(lines) < len(found) or any(".." in Path(name).parts for name in lines):
            raise ValueError("a line is no sha256 and name of a file in it")
    except ValueError as error:
        raise BrokenFile(f"{file}: is no list of checksums ({error}); publish {folder} again") from None
    return lines


def require_intact(folder: Path) -> None:
    """Raises RefusedError when a file of a published folder is not, bit for bit, what was published.

    A folder without a list comes from elsewhere, and is taken as it is. Beside a list, what a library would load is listed.
    """
    listed = read_sums(folder)
    unlisted = [file.name for file in sorted(folder.glob("*")) if file.suffix in LOADED and file.name not in listed]
    if unlisted and (folder / SUMS).is_file():
        raise RefusedError(f"{folder / SUMS}: does not list {unlisted[0]}; {folder} is not what was published")
    for name, expected in listed.items():
        if not (folder / name).is_file():
            raise RefusedError(f"{folder / name}: is gone; {folder} is not what was published. Publish it again")
        if file_sha256(folder / name) != expected:
            raise RefusedError(
                f"{folder / name}: its sha256 is not that of {folder / SUMS}: the disk or somebody has changed it. "
                f"Delete {folder} and make it again"
            )
