"""What a model's own config may ask for: numbers. Code, kernels and sizes beyond reason are refused before any load."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_recipes.errors import RefusedError
from lora_recipes.model.weights import require_own_files

# Where transformers takes the name of a hub repository of compiled code (5.23: integrations/hub_kernels.py, is_kernel).
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
KERNELS = ("use_kernels", "kernels", "kernel_config")
COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "num_labels",
)
MOST = 20_000  # layers, experts or labels: each is an object in Python, even without memory
SIZES = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "n_embd",
    "n_inner",
    "n_head",
    "d_model",
    "ffn_dim",
)
WIDEST = 1_000_000  # features, heads or tokens; the widest model known has 262,144
MOST_STRETCHED = 1_000_000  # times the positions it was trained with
UNBOUNDED = re.compile("limit|max")  # in a key: of Mamba, `time_step_limit` is [0.0, Infinity]
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")

GROWS = re.compile(r'"type"\s*:\s*"(Replace|Prepend)"')
MOST_GROWTH = 1_000  # times the length of a text; tokenizers write one character for another
PROBE = "aB 1."  # a pattern that finds nothing here, between two characters, adds text where there was none


def require_safe_folder(folder: Path, *, trusted: bool = False) -> None:
    """Look at the configs of a model's folder.

    Args:
        trusted: whether the recipe lets the model's own code run.

    Raises:
        RefusedError: a link that leaves the folder, or a config that asks for code.
    """
    require_own_files(folder)
    for file in (folder / name for name in CONFIGS):
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise RefusedError(f"{file}: cannot be read: {error}; get the file again") from None
        if not isinstance(values, dict):
            raise RefusedError(f"{file}: is no mapping; get the file again")
        require_safe_config(values, str(file), trusted=trusted)


def require_safe_config(values: dict[str, Any], where: str, *, trusted: bool = False) -> None:
    """Raises RefusedError for a config that would fetch compiled code, run its own, or build without end."""
    for key, value in _entries(values):
        name = key.rpartition(".")[2].strip("_").removesuffix("_internal")
        if name in IMPLEMENTATIONS and any("/" in text for text in _texts(value)):
            raise RefusedError(
                f"{where}: `{key}: {_short(value)}` names compiled code on the hub, which would run here; remove the entry, "
                "and choose in the recipe (model.attn_implementation: sdpa)"
            )
        if name in KERNELS and value:
            raise RefusedError(f"{where}: `{key}` asks for compiled code from the hub; remove the entry")
        if fault := _fault(key, name, value):
            raise RefusedError(f"{where}: `{key}` is {_short(value)}, {fault}; get the file again")
    if not trusted:
        _refuse_code(values, where)


def require_safe_tokenizer(file: Path) -> None:
    """Raises RefusedError for a tokenizer.json that makes a text longer without end, in code that no signal breaks off.

    One that cannot be read is left to the library, which says why.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if not GROWS.search(text):  # megabytes of vocabulary need not be read
            return
        values = json.loads(text)
        growths = [_growth(values.get(name)) for name in ("normalizer", "pre_tokenizer", "decoder")]
    except (OSError, ValueError, RecursionError, AttributeError):
        return
    if max(growths) > MOST_GROWTH:
        raise RefusedError(
            f"{file}: its steps (`Replace`) make a text up to {min(max(growths), 10**12):,} times as long, where tokenizers write "
            "one character for another; get the file again"
        )


def _growth(step: Any) -> int:
    """Times the length of a text that a step of a tokenizer, with all steps in it, makes of it at most."""
    parts = [step, *(value for _, value in _entries(step))]
    return math.prod(_times(part) for part in parts if isinstance(part, dict))


def _times(step: dict[str, Any]) -> int:
    written = str(step.get({"Replace": "content", "Prepend": "prepend"}.get(str(step.get("type")), ""), ""))
    pattern = step.get("pattern")
    if not isinstance(pattern, dict) or not written:
        return max(1, len(written))
    if plain := pattern.get("String"):
        return max(1, -(-len(written) // len(str(plain))))
    try:
        between = any(not match.group() for match in re.finditer(str(pattern.get("Regex", "")), PROBE))
    except (re.error, OverflowError, RecursionError):  # tokenizers know other forms than Python
        between = False
    return len(written) + between


def _fault(key: str, name: str, value: Any) -> str | None:
    """What is wrong with one entry of a config that is a number, or should be."""
    if name == "float" and value in ("NaN", "Infinity", "-Infinity"):
        value = float(value)  # how transformers writes them: {"__float__": "Infinity"}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not UNBOUNDED.search(key))):
        return "no finite number"
    if name in COUNTS and isinstance(value, int) and value > MOST:
        return f"more than any model has ({MOST:,})"
    if name in SIZES and number and not 0 <= value <= WIDEST:
        return f"and a size lies between 0 and {WIDEST:,}"
    if ("dropout" in name or name.endswith("pdrop")) and number and not 0 <= value <= 1:
        return "and a share lies between 0 and 1"
    rope = name == "rope_theta" or (name == "factor" and "rope" in key)
    if rope and (isinstance(value, str) or (number and value <= 0)):
        return "and positions are turned by a number above 0"
    if rope and name == "factor" and number and value > MOST_STRETCHED:
        return f"more than any model stretches its positions ({MOST_STRETCHED:,} times)"
    if name in ("return_dict", "use_return_dict") and value is False:
        return "and nothing that trains or answers can read what the model then gives; remove the entry"
    return None


def _refuse_code(values: dict[str, Any], where: str) -> None:
    """Code beside a model never runs unasked. Where transformers has the class itself, under the same name, that one is
    used: many models on the hub still carry the code of the days before it had."""
    wanted = values.get("auto_map")
    if not wanted or not isinstance(wanted, dict):
        return
    known = _known_classes(values.get("model_type"))
    for role in ("AutoConfig", "AutoModelForCausalLM"):
        if role in wanted and str(wanted[role]).rpartition(".")[2] not in known:
            raise RefusedError(
                f"{where}: `auto_map` names {_short(wanted[role])!r}, code that comes with the model and that transformers "
                "does not have. It is not run. If you have read it: model.trust_remote_code=true with model.revision "
                "pinned to that commit"
            )


def _known_classes(model_type: Any) -> set[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = (names.get(str(model_type)) for names in (CONFIG_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    return {str(name) for name in found if name}


def _entries(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings and lists."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in pairs:
        yield f"{prefix}{key}", value
        yield from _entries(value, f"{prefix}{key}.")


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [text for _, text in _entries(value) if isinstance(text, str)]


def _short(value: Any) -> str:
    return str(value)[:100]
