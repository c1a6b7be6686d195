"""`adapter_config.json` held against what PEFT knows, before PEFT reads it: an adapter may come from anybody."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import peft
from jsonschema import Draft202012Validator
from peft import LoraConfig
from referencing import Registry

from lora_recipes.errors import RefusedError, RunError
from lora_recipes.limits import pattern_fault
from lora_recipes.model.safe import MOST
from lora_recipes.recipe.check import section_keys

LARGEST_FILE = 10_000_000  # bytes; `trainable_token_indices` may be long
MAX_RANK = 16_384  # no layer of a model is wider
MAX_ALPHA = 1e6
MAX_DEPTH = 4
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")  # a regular expression where it is one text
PATTERN_KEYS = ("rank_pattern", "alpha_pattern")  # regular expressions as keys
OWN_RULES = {"r", "lora_alpha", "lora_dropout", *PATTERN_KEYS}  # looser than a recipe's
FILES = ("cache_file", "covariance_file")  # of nested configs: PEFT unpickles what they name


def read_config(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config of an adapter, which is plain LoRA of a size that its weights have.

    `base_model_name_or_path` is what the adapter says of itself; nothing is ever loaded from there.

    Args:
        shapes: of the adapter's tensors, by key.

    Raises:
        RefusedError: it cannot be read, or asks for code, files, or sizes that no adapter has.
        RunError: it is of a kind, or of a version of PEFT, that is not known here.
    """
    file = folder / "adapter_config.json"
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise ValueError(f"{file.stat().st_size:,} bytes")
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RefusedError(f"{file}: cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise RefusedError(f"{file}: is no mapping")
    _require_known(file, config)
    for problem in _problems(config):
        raise RefusedError(f"{file}: {problem}; get the adapter from its publisher again, or train it here")
    _require_ranks(file, config, shapes)
    _require_quick_patterns(file, config, shapes)
    return config


def _require_known(file: Path, config: dict[str, Any]) -> None:
    made = f"written by PEFT {config.get('peft_version', 'of an unknown version')}, here is {peft.__version__}"
    if str(config.get("peft_type", "")).upper() != "LORA":
        raise RunError(f"{file}: `peft_type` is {_short(config.get('peft_type'))}, and recipes load LORA ({made})")
    unknown = sorted(config.keys() - _fields())
    if unknown and _newer(str(config.get("peft_version", ""))):
        raise RunError(f"{file}: `{_short(unknown[0])}` is not known here ({made}); upgrade PEFT to load it")
    if unknown:
        raise RefusedError(f"{file}: `{_short(unknown[0])}` is no field of peft.LoraConfig ({made}); remove it")


@cache
def _fields() -> frozenset[str]:
    return frozenset(field.name for field in fields(LoraConfig))


def _newer(version: str) -> bool:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d{1,9}", text)[:3]]

    return numbers(version) > numbers(peft.__version__)


def _problems(config: dict[str, Any]) -> Iterator[str]:
    for name, rank in {"r": config.get("r", 8), **_named(config, "rank_pattern")}.items():
        if not _number(rank, whole=True) or not 1 <= rank <= MAX_RANK:
            yield f"`{_short(name)}` is {_short(rank)}, and a rank is a whole number from 1 to {MAX_RANK:,}"
    for name, alpha in {"lora_alpha": config.get("lora_alpha", 8), **_named(config, "alpha_pattern")}.items():
        if not _number(alpha) or abs(alpha) > MAX_ALPHA:
            yield f"`{_short(name)}` is {_short(alpha)}, and alpha is a number up to {MAX_ALPHA:,.0f}"
    for name in PATTERN_KEYS:
        if not isinstance(config.get(name), dict | None):
            yield f"`{name}` is {_short(config[name])}, and names of layers are given numbers there"
    dropout = config.get("lora_dropout", 0.0)
    if not _number(dropout) or not 0 <= dropout <= 1:
        yield f"`lora_dropout` is {_short(dropout)}, and a share lies between 0 and 1"
    library = (config.get("auto_mapping") or {}) if isinstance(config.get("auto_mapping"), dict | None) else {"": ""}
    if library and not re.fullmatch(r"transformers\.models(\.\w+)+", str(library.get("parent_library"))):
        yield f"`auto_mapping` names the module {_short(library.get('parent_library'))}, which would be imported"
    if config.get("megatron_config") or config.get("megatron_core") not in (None, "megatron.core"):
        yield "`megatron_core` names a module that would be imported"
    if not _layers(config.get("layer_replication")) <= MOST:
        yield f"`layer_replication` makes more than {MOST:,} layers, or is no list of ranges"
    known = section_keys("lora")
    for name, value in config.items():
        if name in known and name not in OWN_RULES and not _is_of(value, known[name]):
            yield f"`{name}` is {_short(value)}, which no LoraConfig has there"
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        yield f"`task_type` is {_short(config['task_type'])}, and recipes train CAUSAL_LM"
    for key, value, depth in _entries(config):
        if key.rpartition(".")[2] in FILES and value:
            yield f"`{_short(key)}` names a file that would be unpickled"
        if depth > MAX_DEPTH:
            yield f"`{_short(key)}` is nested more than {MAX_DEPTH} deep"


def _is_of(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is what a recipe may write there. What PEFT itself saves, it saves as null where it is not set."""
    return value is None or Draft202012Validator(schema, registry=Registry()).is_valid(value)


def _named(config: dict[str, Any], key: str) -> dict[str, Any]:
    found = config.get(key)
    return {f"{key}.{name}": value for name, value in found.items()} if isinstance(found, dict) else {}


def _number(value: Any, *, whole: bool = False) -> bool:
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value))


def _layers(value: Any) -> float:
    """Layers that `layer_replication` asks for; infinite for one that is no list of ranges."""
    try:
        ranges = [(start, end) for start, end in value or []]
    except (TypeError, ValueError):
        return math.inf
    whole = all(_number(edge, whole=True) for pair in ranges for edge in pair)
    return sum(end - start for start, end in ranges) if whole and all(0 <= a < b for a, b in ranges) else math.inf


def _entries(value: Any, prefix: str = "", depth: int = 1) -> Iterator[tuple[str, Any, int]]:
    """(dotted key, value, depth) of all that is nested."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in pairs:
        yield f"{prefix}{key}", child, depth
        if isinstance(child, dict | list) and depth <= MAX_DEPTH:
            yield from _entries(child, f"{prefix}{key}.", depth + 1)


def _require_ranks(file: Path, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A rank that the weights do not have fails late, or makes tensors of any size. Of experts one matrix holds many."""
    if config.get("target_parameters"):
        return
    ranks = {config.get("r", 8), *(config.get("rank_pattern") or {}).values()}
    for name, shape in shapes.items():
        is_first = name.endswith(("lora_A.weight", "lora_embedding_A")) and "experts" not in name
        if is_first and shape and shape[0] not in ranks:
            told = ", ".join(str(rank) for rank in sorted(ranks))
            raise RefusedError(
                f"{file}: its matrices have rank {shape[0]}, its config says r = {told} ({name}); the two files are of "
                "different adapters"
            )


def _require_quick_patterns(file: Path, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A regular expression can take longer than the world lasts. It is tried on the names it is made for."""
    patterns = [config[key] for key in PATTERNS if isinstance(config.get(key), str)]
    patterns += [pattern for key in PATTERN_KEYS for pattern in config.get(key) or {}]
    names = {re.sub(r"^base_model\.model\.|\.lora_.*$", "", name) for name in shapes}
    names |= {name.rpartition(".")[0] for name in names}
    for pattern in patterns:
        if fault := pattern_fault(pattern, names):
            raise RefusedError(f"{file}: {fault}")


def _short(value: Any) -> str:
    return repr(value)[:100]
