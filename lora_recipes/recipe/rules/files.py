"""Rules of what a recipe names on disk or on the hub: data must be data when it is read, and code is pinned or refused."""

import re
from collections.abc import Iterator
from typing import Any

from lora_recipes.errors import EXIT_REFUSED
from lora_recipes.recipe.rules.finding import Finding, Values, sources_of
from lora_recipes.recipe.vocabulary import LOCAL_BUILDERS

# (ending of a file's name, why it is refused, the safe way)
_UNSAFE_ENDINGS = (
    (
        r"\.(pkl|pickle|pt|pth|npy|npz|joblib)",
        "a pickle, which runs code when it is read",
        "JSONL or Parquet is data only",
    ),
    (r"\.py", "a script, which runs code when it is read", "write its rows to JSONL or Parquet yourself"),
    (
        r"\.(zip|tar|tgz|tbz2|txz|tar\.\w+|7z|rar)",
        "an archive, which can write outside its folder",
        "unpack it yourself and name the files in it",
    ),
)
_UNSAFE_BUILDERS = ("pandas", "pickle")


def remote_code(values: Values) -> Iterator[Finding]:
    model = values.get("model", {})
    revision = str(model.get("revision", ""))
    pinned = len(revision) == 40 and all(character in "0123456789abcdef" for character in revision)
    if model.get("trust_remote_code") and not pinned:
        yield Finding(
            "model.trust_remote_code",
            "runs code from the hub, so it needs `model.revision` pinned to a commit (40 hex digits)",
            "write the commit whose code you have read, or drop the key",
            EXIT_REFUSED,
        )
    attention = str(model.get("attn_implementation", ""))
    if "/" in attention and not re.fullmatch(r"[^/:@]+/[^/:@]+@[0-9a-f]{40}(:[^/:@]+)?", attention):
        yield Finding(
            "model.attn_implementation",
            "names compiled code on the hub, which can change and runs here",
            "write `sdpa` or `flash_attention_2`, or pin it to a commit: owner/name@ and 40 hex digits",
            EXIT_REFUSED,
        )
    if model.get("use_safetensors") is False:
        yield Finding(
            "model.use_safetensors",
            "is false, with which pickles would be loaded that can run code",
            "drop the key; --allow-pickle on the command line loads weights that are no safetensors",
            EXIT_REFUSED,
        )


def local_files(values: Values) -> Iterator[Finding]:
    for prefix, source in sources_of(values):
        builder = source.get("path")
        if builder not in LOCAL_BUILDERS:
            continue
        if not source.get("data_files"):
            yield Finding(
                f"{prefix}.data_files",
                f"is missing: `path: {builder}` reads the files that it names",
                "write data_files: {train: my.jsonl}",
            )
        for key in ("name", "revision", "cache_dir"):
            if source.get(key) is not None:
                yield Finding(
                    f"{prefix}.{key}", f"has no effect with `path: {builder}`, which reads local files", "drop it"
                )


def unsafe_files(values: Values) -> Iterator[Finding]:
    """Refused for security: data must be data when it is read, and the same data the next time."""
    for prefix, source in sources_of(values):
        if source.get("path") in _UNSAFE_BUILDERS:
            yield Finding(
                f"{prefix}.path",
                f"`{source['path']}` reads pickles, which run code when they are read",
                "convert the rows to JSONL or Parquet",
                EXIT_REFUSED,
            )
        for key in ("path", "data_dir", "data_files"):
            for text in _texts(source.get(key)):
                if reason := _unsafe(text):
                    yield Finding(f"{prefix}.{key}", *reason, EXIT_REFUSED)


def _unsafe(text: str) -> tuple[str, str] | None:
    """(message, hint) about a path or file name that must not be read. A URL is not repeated: it may hold a password."""
    schemes = [scheme for scheme in re.findall(r"([^:/]*)://", text) if scheme != "hf"]
    if schemes:
        return (
            f"names a URL ({schemes[0]}), whose content is not pinned and can change",
            "download the file, check its sha256 and name the copy",
        )
    for ending, what, way_out in _UNSAFE_ENDINGS:
        if re.search(ending + r"[\s/]*$", text, re.IGNORECASE):
            return f"names {what}: '{text}'", way_out
    return None


def _texts(value: Any) -> list[str]:
    """All texts in a value of `data_files`: a text, a list of them, or a mapping to either."""
    if isinstance(value, dict):
        return [text for child in value.values() for text in _texts(child)]
    if isinstance(value, list):
        return [text for child in value for text in _texts(child)]
    return [value] if value else []
