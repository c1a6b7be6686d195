"""The weight files that a folder claims to hold: their names, and whether they are data, whole, and its own."""

import json
import math
import os
import struct
from pathlib import Path, PurePosixPath
from typing import Any

from lora_recipes.errors import RefusedError

LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
BITS = {  # of one value, by safetensors' names (0.8: safetensors/src/tensor.rs)
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
CONVERT = "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"


def titles(variant: str | None, kind: str = "safetensors") -> tuple[str, str]:
    """Names of the only weight file, and of the index of several."""
    middle, stem = f".{variant}" if variant else "", "model" if kind == "safetensors" else "pytorch_model"
    return f"{stem}{middle}.{kind}", f"{stem}.{kind}.index{middle}.json"


def weight_map(index: Path) -> dict[str, str]:
    """Tensor → file, as an index says. Raises RefusedError for one that is broken, or names files of another folder."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RefusedError(f"{index}: no index of weights: {error!r}") from None
    if not found or not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise RefusedError(f"{index}: no index of weights: `weight_map` names no files")
    for name in sorted(set(found.values())):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name:
            raise RefusedError(
                f"{index}: `weight_map` names {name!r}, a file outside of this folder; it may be anybody's. Get the model "
                "from its publisher again"
            )
    return found


def require_own_files(folder: Path) -> None:
    """Raises RefusedError for a link that leaves the folder: what it leads to is not what the model's author wrote.

    In the hub's cache a snapshot is links to the blobs beside it, which is its own.
    """
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not file.is_symlink() or file.resolve().is_relative_to(home):
            continue
        target = Path(os.path.normpath(home / file.readlink()))
        if blobs is None or target.parent != blobs:
            raise RefusedError(
                f"{file}: a link to {file.readlink()}, outside of this folder; copy the file itself here"
            )


def require_weights(folder: Path, variant: str | None = None, *, allow_pickle: bool = False) -> str:
    """Look at the weights that would be loaded from a folder, without loading any.

    Args:
        allow_pickle: whether weights that are no safetensors may be loaded.

    Returns:
        "safetensors", or "bin".

    Raises:
        RefusedError: they are pickles, a file is torn or missing, or an index names what is not there.
    """
    single, index = (folder / title for title in titles(variant))
    if single.is_file():
        header_of(single)
        return "safetensors"
    if index.is_file():
        _require_shards(index)
        return "safetensors"
    pickled = [title for title in titles(variant, "bin") if (folder / title).is_file()]
    if pickled and not allow_pickle:
        raise RefusedError(
            f"{folder / pickled[0]}: a pickle, which can run code when it is loaded, and there is no {single.name}. Ask "
            f"the publisher for safetensors, or convert a model that you trust: {CONVERT}; --allow-pickle loads it as "
            "it is"
        )
    if pickled and pickled[0].endswith(".json"):
        _require_there(folder / pickled[0])
    return "bin" if pickled else "safetensors"


def _require_there(index: Path) -> dict[str, str]:
    files = weight_map(index)
    for name in sorted(set(files.values())):
        if not (index.parent / name).is_file():
            raise RefusedError(f"{index}: names {name}, which is not there; get the file again")
    return files


def _require_shards(index: Path) -> None:
    files = _require_there(index)
    held = {name: header_of(index.parent / name).keys() for name in set(files.values())}
    lost = sorted(tensor for tensor, name in files.items() if tensor not in held[name])
    if lost:
        raise RefusedError(f"{index}: {lost[0]} is not in {files[lost[0]]} ({len(lost)} tensors are not where it says)")


def read_entries(file: Path) -> tuple[int, dict[str, Any]]:
    """Byte where values begin, and name → entry, as a safetensors header has them; the caller says what a broken one means.

    Raises:
        ValueError, AttributeError, RecursionError, struct.error: it is no header.
    """
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > LONGEST_HEADER:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(stream.read(length))
    said = header.get("__metadata__") or {}
    if not all(isinstance(word, str) for word in said.values()):
        raise ValueError("`__metadata__` holds more than texts")
    return 8 + length, {name: entry for name, entry in header.items() if name != "__metadata__"}


def header_of(file: Path) -> dict[str, tuple[int, ...]]:
    """Tensor → shape, of a safetensors file that is as long as its header says.

    Raises:
        RefusedError: it is not, or is no safetensors file.
    """
    try:
        begin, entries = read_entries(file)
        shapes, end = _shapes(entries), begin + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, struct.error) as error:
        raise RefusedError(f"{file}: cannot be read, no safetensors file: {error}; get the file again") from None
    size = file.stat().st_size
    if size != end:
        raise RefusedError(f"{file}: {size:,} bytes long, where its header says {end:,}; it was cut off, get it again")
    return shapes


def _shapes(entries: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor → shape. Raises ValueError, KeyError or TypeError where the bytes of one are not those of its shape and type."""
    shapes: dict[str, tuple[int, ...]] = {}
    at = 0  # tensors lie one behind the other
    for name, entry in sorted(entries.items(), key=lambda pair: pair[1]["data_offsets"]):
        name.encode("utf-8")
        (first, last), shapes[name] = entry["data_offsets"], tuple(entry["shape"])
        if not all(type(size) is int and size >= 0 for size in shapes[name]):
            raise ValueError(f"{name} has the shape {str(entry['shape'])[:100]}")
        if first != at or (last - first) * 8 != BITS[entry["dtype"]] * math.prod(shapes[name]):
            raise ValueError(f"{name} does not lie where its shape and type ({entry['dtype']}) would have it")
        at = last
    return shapes
