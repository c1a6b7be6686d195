"""Rules that hold between keys of a recipe: each a small function that names both keys and the way out."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from lora_recipes.errors import EXIT_REFUSED, EXIT_USER
from lora_recipes.recipe.nodes import Node
from lora_recipes.recipe.problem import Origin, Problem
from lora_recipes.recipe.vocabulary import LOCAL_BUILDERS

Values = dict[str, Any]


METRIC = re.compile(r"(eval_)?(\w+_)?(loss|mean_token_accuracy|entropy)")  # what an evaluation logs


class Finding(NamedTuple):
    """What is wrong with a dotted key, the way out, and the exit code it leads to."""

    key: str
    message: str
    hint: str = ""
    exit_code: int = EXIT_USER


def rule_problems(root: Node, file: str) -> list[Problem]:
    """Findings of all rules. Runs only on a recipe whose keys and types are right.

    A finding about a key that is not there points at the source in the list it belongs to, else at the file the user
    named.
    """
    values: Values = {name: node.plain() for name, node in root.value.items()}
    problems = []
    for rule in RULES:
        for found in rule(values):
            steps: list[str | int] = [int(step) if step.isdecimal() else step for step in found.key.split(".")]
            node = root.find(steps)
            written = node is not root.find(steps[:-1]) or any(isinstance(step, int) for step in steps)
            origin = node.key if written else Origin(file)
            if found.exit_code == EXIT_REFUSED and not origin.line:
                origin = Origin("command line")  # without the word: a URL in it may hold a password
            problems.append(Problem(origin, *found))
    return problems


def broken_rules(values: Values) -> list[Finding]:
    """What the rules find in the plain values of a recipe."""
    return [found for rule in RULES for found in rule(values)]


def _sources(values: Values) -> list[tuple[str, dict[str, Any]]]:
    """(dotted key, keys) of each source, whether `dataset` is one mapping or a list of them."""
    dataset = values.get("dataset", {})
    if isinstance(dataset, list):
        return [(f"dataset.{index}", source) for index, source in enumerate(dataset)]
    return [("dataset", dataset)]


def _required(values: Values) -> Iterator[Finding]:
    if not values.get("model", {}).get("pretrained_model_name_or_path"):
        yield Finding(
            "model.pretrained_model_name_or_path",
            "is missing",
            "name a hub id, a local folder or package:NAME",
        )
    for prefix, source in _sources(values):
        if not source.get("path"):
            yield Finding(f"{prefix}.path", "is missing", "name a builder such as `json` with data_files, or a hub id")


def _one_precision(values: Values) -> Iterator[Finding]:
    training = values.get("training", {})
    if training.get("fp16") and training.get("bf16"):
        yield Finding(
            "training.fp16",
            "and `training.bf16` are both true",
            "keep one: bf16 where the GPU has it, fp16 on T4 and V100",
        )


def _one_quantization(values: Values) -> Iterator[Finding]:
    quantization = values.get("quantization")
    if quantization is None:
        return
    if quantization.get("load_in_4bit") and quantization.get("load_in_8bit"):
        yield Finding("quantization.load_in_4bit", "and `quantization.load_in_8bit` are both true", "keep one")
    elif not quantization.get("load_in_4bit") and not quantization.get("load_in_8bit"):
        yield Finding(
            "quantization.load_in_4bit",
            "is not set, so nothing would be quantized",
            "set it, or drop the section: `quantization: null`",
        )


def _lora_targets(values: Values) -> Iterator[Finding]:
    lora = values.get("lora")
    if lora is None:
        return
    if not lora.get("target_modules") and not lora.get("target_parameters"):
        yield Finding("lora.target_modules", "is missing", "write `target_modules: all-linear`, or list the layers")
    targets = lora.get("target_modules")
    if "lm_head" in (targets if isinstance(targets, list) else [targets]):
        yield Finding(
            "lora.target_modules",
            "holds `lm_head`, which SFTTrainer's loss reads directly, so its adapter would never train",
            "use `modules_to_save: [lm_head]`",
        )
    if lora.get("task_type") not in (None, "CAUSAL_LM"):
        yield Finding("lora.task_type", "must be CAUSAL_LM: recipes fine-tune causal language models")


def _full(values: Values) -> Iterator[Finding]:
    """Without a `lora` section the whole model is trained."""
    if "lora" in values:
        return
    for section, why in (
        ("quantization", "quantized weights cannot be trained"),
        ("merge.base", "there is no adapter to merge into anything"),
    ):
        name, _, key = section.partition(".")
        if name in values and (not key or values[name].get(key) is not None):
            yield Finding(
                section,
                f"does not go with full fine-tuning, which a recipe without `lora` asks for: {why}",
                "extend base/qlora.yaml or base/lora.yaml, or drop it",
            )


def _first_weights(values: Values) -> Iterator[Finding]:
    lora, quantization = values.get("lora") or {}, values.get("quantization")
    start = lora.get("init_lora_weights")
    if start in ("corda", "lora_ga"):
        yield Finding(
            "lora.init_lora_weights",
            f"`{start}` needs an initialisation step before training, which this runner does not run yet; without it PEFT "
            "trains plain LoRA",
            "eva, loftq, pissa and olora are run",
        )
    if str(start).startswith(("pissa", "olora")) and quantization:
        yield Finding(
            "lora.init_lora_weights",
            f"`{start}` splits each weight in two, and with `quantization` what is left of it would be rounded to 4 bits, "
            "so that the adapter fits no base that anybody has",
            "use `loftq` on a quantized base, or drop `quantization`",
        )
    if start == "loftq" and not quantization:
        yield Finding(
            "lora.init_lora_weights",
            "`loftq` makes up for what quantization takes from a weight, and nothing is quantized",
            "extend base/qlora.yaml, or drop it",
        )
    if start == "loftq" and quantization and quantization.get("load_in_8bit"):
        yield Finding("lora.init_lora_weights", "`loftq` is for 4 bits; 8 bits lose too little", "drop it")
    if lora.get("eva_config") is not None and start != "eva":
        yield Finding("lora.eva_config", "has no effect without `init_lora_weights: eva`", "set it, or drop this")


def _first_weights_together(values: Values) -> Iterator[Finding]:
    lora = values.get("lora") or {}
    start = str(lora.get("init_lora_weights"))
    splits = start.startswith(("pissa", "olora"))
    if (splits or start in ("eva", "loftq")) and lora.get("target_parameters"):
        yield Finding(
            "lora.init_lora_weights",
            f"`{start}` is computed from matrices, and `lora.target_parameters` names stacks of them",
            "drop one",
        )
    if start == "eva" and lora.get("trainable_token_indices"):
        yield Finding(
            "lora.init_lora_weights",
            "`eva` does not go with `lora.trainable_token_indices`: PEFT looks for directions in the embedding too, "
            "and finds none",
            "drop one",
        )
    if splits and lora.get("use_rslora") and (lora.get("rank_pattern") or lora.get("alpha_pattern")):
        yield Finding(
            "lora.use_rslora",
            f"does not go with `{start}` and a `rank_pattern` or `alpha_pattern`: PEFT cannot make such an adapter fit the "
            "untouched base when it is published",
            "drop the pattern, or `use_rslora`",
        )
    if splits and lora.get("layer_replication"):
        yield Finding(
            "lora.layer_replication",
            f"does not go with `{start}`: layers that share a weight would each take their part out of it",
            "drop one",
        )


def _adapter_optimizers(values: Values) -> Iterator[Finding]:
    training = values.get("training", {})
    plus, fixed = training.get("loraplus_lr_ratio"), training.get("lorafa")
    for key in ("loraplus_lr_ratio", "lorafa"):
        if training.get(key) and "lora" not in values:
            yield Finding(f"training.{key}", "has no effect without a `lora` section", "drop it")
    if plus and fixed:
        yield Finding(
            "training.lorafa", "trains B alone, so `training.loraplus_lr_ratio` has no A to differ from", "keep one"
        )
    if training.get("loraplus_lr_embedding") is not None and not plus:
        yield Finding(
            "training.loraplus_lr_embedding",
            "has no effect without `training.loraplus_lr_ratio`",
            "set that, or drop this",
        )
    if fixed and training.get("optim", "adamw_torch") not in ("adamw_torch", "adamw_torch_fused"):
        yield Finding(
            "training.optim",
            "has no effect with `training.lorafa`, which is an AdamW of its own, on projected gradients",
            "write `optim: adamw_torch`, or drop it",
        )
    if fixed and training.get("optim_args"):
        yield Finding("training.optim_args", "has no effect with `training.lorafa`", "drop it")
    if plus and str(training.get("optim")).startswith(("galore", "apollo", "lomo", "adalomo")):
        yield Finding(
            "training.optim",
            "groups weights in its own way, so `training.loraplus_lr_ratio` would have no effect",
            "write `optim: adamw_torch`, or drop the ratio",
        )


def _only_b(values: Values) -> Iterator[Finding]:
    """LoRA-FA pairs each A with the B that follows it; anything between them would be taken for one of the two."""
    lora = values.get("lora") or {}
    if not values.get("training", {}).get("lorafa"):
        return
    for key in ("use_dora", "lora_bias", "target_parameters"):
        if lora.get(key):
            yield Finding(
                "training.lorafa", f"does not go with `lora.{key}`: it trains plain pairs of A and B", "drop one"
            )
    if lora.get("init_lora_weights") == "mica":
        yield Finding("training.lorafa", "trains B alone, and `init_lora_weights: mica` A alone", "drop one")


def _evaluation(values: Values) -> Iterator[Finding]:
    training, sources = values.get("training", {}), _sources(values)
    wanted = training.get("eval_strategy", "no") != "no" or training.get("eval_on_start")
    if wanted and not any(source.get("eval_split") for _, source in sources):
        yield Finding(
            "training.eval_strategy",
            "needs held-out rows",
            f"set `{sources[0][0]}.eval_split`, or `eval_strategy: 'no'`",
        )
    if training.get("load_best_model_at_end") and not wanted:
        yield Finding("training.load_best_model_at_end", "needs `training.eval_strategy`")
    metric = training.get("metric_for_best_model")
    if metric and not METRIC.fullmatch(metric):
        yield Finding(
            "training.metric_for_best_model",
            f"is {metric!r}, which no evaluation measures",
            "write loss, mean_token_accuracy or entropy, or those of one data source: NAME_loss",
        )
    for prefix, source in sources:
        if source.get("eval_split") == source.get("split", "train"):
            yield Finding(
                f"{prefix}.eval_split",
                "is the training split itself",
                "name a split that is not trained on, or a share such as 0.05",
            )


def _packing(values: Values) -> Iterator[Finding]:
    training = values.get("training", {})
    if training.get("eval_packing") and not training.get("packing"):
        yield Finding(
            "training.eval_packing",
            "without `training.packing` lets documents see each other in TRL's evaluation",
            "set both or neither",
        )
    if training.get("packing") and training.get("max_length", 0) is None:
        yield Finding("training.packing", "needs a `training.max_length`, the length of a packed row")
    if training.get("packing_strategy") == "wrapped":
        yield Finding(
            "training.packing_strategy",
            "`wrapped` cuts rows anywhere and lets the documents of a packed row see each other",
            "write `bfd`, or `bfd_split` to split long rows",
        )
    if training.get("shuffle_dataset") and not training.get("packing"):
        yield Finding(
            "training.shuffle_dataset",
            "has no effect without `training.packing`: the trainer shuffles rows by itself",
            "drop it, or choose `training.train_sampling_strategy`",
        )
    if training.get("padding_free") and not training.get("packing") and training.get("max_length", 0) is not None:
        yield Finding(
            "training.padding_free",
            "does not cut rows at `training.max_length`",
            "set `packing: true`, or `max_length: null`",
        )


def _remote_code(values: Values) -> Iterator[Finding]:
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


def _merge_base(values: Values) -> Iterator[Finding]:
    if values.get("merge", {}).get("base") == "dequantized" and not values.get("quantization", {}).get("load_in_4bit"):
        yield Finding("merge.base", "is `dequantized`, which needs `quantization.load_in_4bit`", "drop the key")


def _generation(values: Values) -> Iterator[Finding]:
    generation = values.get("generation")
    if generation is None:
        return
    if not generation.get("max_new_tokens"):
        yield Finding(
            "generation.max_new_tokens",
            "is missing: an answer that never ends needs a limit",
            "write `max_new_tokens: 128`",
        )
    sampling = [key for key in ("temperature", "top_p", "top_k") if generation.get(key) is not None]
    if sampling and not generation.get("do_sample"):
        yield Finding(
            f"generation.{sampling[0]}",
            "has no effect without `generation.do_sample: true`",
            "set do_sample, or drop it",
        )


# Builders of datasets that read the files in `data_files` and nothing else.


def _local_files(values: Values) -> Iterator[Finding]:
    for prefix, source in _sources(values):
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


def _unsafe_files(values: Values) -> Iterator[Finding]:
    """Refused for security: data must be data when it is read, and the same data the next time."""
    for prefix, source in _sources(values):
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


def _steps(values: Values) -> Iterator[Finding]:
    if values.get("training", {}).get("max_steps") == 0:
        yield Finding(
            "training.max_steps",
            "is 0, which the Trainer takes for no limit: it would train all of `training.num_train_epochs`",
            "write a number from 1 on, or drop it",
        )


def _streaming(values: Values) -> Iterator[Finding]:
    training, sources = values.get("training", {}), _sources(values)
    streamed = [prefix for prefix, source in sources if source.get("streaming")]
    if not streamed:
        return
    key = f"{streamed[0]}.streaming"
    others = [prefix for prefix, _ in sources if prefix not in streamed]
    if others:
        yield Finding(key, f"is true, but not in `{others[0]}`", "stream all sources or none")
    if training.get("max_steps", -1) < 1:
        yield Finding(
            key, "needs `training.max_steps`: how many rows come is not known before", "write max_steps: 1000"
        )
    if training.get("train_sampling_strategy") == "group_by_length":
        yield Finding(
            "training.train_sampling_strategy",
            f"has no effect with `{key}`: rows that are not read yet have no length",
            "drop one of the two",
        )


def _row_limits(values: Values) -> Iterator[Finding]:
    for prefix, source in _sources(values):
        if source.get("max_bad_fraction") is not None and source.get("bad_rows") != "skip":
            yield Finding(
                f"{prefix}.max_bad_fraction",
                "has no effect without `bad_rows: skip`: the first bad row stops",
                "set bad_rows, or drop it",
            )
        if source.get("max_truncated_fraction") is not None and source.get("truncation") not in ("drop", "keep_start"):
            yield Finding(
                f"{prefix}.max_truncated_fraction",
                "has no effect without `truncation: drop` or `keep_start`: the first long row stops",
                "set truncation, or drop it",
            )


def _truncation(values: Values) -> Iterator[Finding]:
    training = values.get("training", {})
    if training.get("packing") and training.get("packing_strategy") == "bfd_split":
        why, way_out = "`training.packing_strategy: bfd_split`: long rows are split, not cut", "drop it, or write `bfd`"
    elif training.get("max_length", 0) is None:
        why, way_out = "`training.max_length: null`: no row is too long", "set a max_length, or drop it"
    else:
        return
    for prefix, source in _sources(values):
        if source.get("truncation") is not None:
            yield Finding(
                f"{prefix}.truncation",
                f"has no effect with {why}",
                way_out,
            )


def _control_tokens(values: Values) -> Iterator[Finding]:
    for prefix, source in _sources(values):
        if source.get("control_tokens") == "keep" and source.get("format") != "text":
            yield Finding(
                f"{prefix}.control_tokens",
                "is `keep`, with which a row of any form but plain text could forge a turn of the dialogue",
                "write `format: text` if the rows are, or `control_tokens: escape`",
            )


ASKED = ("contains", "equals", "regex", "json", "stops", "differs_from_base")  # what a prompt of `checks` may ask


def _checks(values: Values) -> Iterator[Finding]:
    """What could only fail, or could never fail, is told before anything is trained."""
    checks, generation = values.get("checks", {}), values.get("generation", {})
    held_out = any(source.get("eval_split") for _, source in _sources(values))
    if checks.get("scores") and (not held_out or generation.get("max_rows") == 0):
        reason = "`generation.max_rows` is 0" if held_out else "no source has a `dataset.eval_split`"
        yield Finding(
            "checks.scores", f"cannot be measured: {reason}, so no row is answered", "hold rows out, or drop it"
        )
    for number, entry in enumerate(checks.get("prompts", [])):
        key = f"checks.prompts.{number}"
        if not any(entry.get(name, name == "stops") is not False for name in ASKED):
            yield Finding(key, "asks nothing of the answer", f"add one of {', '.join(ASKED)}")
        if not (entry.get("max_new_tokens") or generation.get("max_new_tokens")):
            yield Finding(
                key,
                "has no limit: an answer that never ends needs one",
                "write `max_new_tokens: 128` here, or in `generation` for all prompts",
            )
        if "regex" in entry and (why := _regex_fault(entry["regex"])):
            yield Finding(f"{key}.regex", f"is no regular expression: {why}", "see Python's `re` for the syntax")
        if isinstance(entry.get("json"), dict) and (why := _schema_fault(entry["json"])):
            yield Finding(f"{key}.json", f"is no JSON schema: {why}", "write `true` where any JSON will do")


def _regex_fault(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None


def _schema_fault(schema: dict[str, Any]) -> str | None:
    """Why a JSON schema cannot be used. What it refers to must be in itself: nothing is fetched."""
    try:
        Draft202012Validator.check_schema(schema)
        whole = Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver()
        for reference in _references(schema):
            whole.lookup(reference)
    except SchemaError as error:
        return f"{error.json_path}: {error.message}"
    except Unresolvable as error:
        return f"{error.ref!r} is not in it"
    return None


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (value[name] for name in ("$ref", "$dynamicRef") if isinstance(value.get(name), str))
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    for child in children:
        yield from _references(child)


RULES: list[Callable[[Values], Iterator[Finding]]] = [
    _required,
    _one_precision,
    _one_quantization,
    _lora_targets,
    _full,
    _first_weights,
    _first_weights_together,
    _adapter_optimizers,
    _only_b,
    _evaluation,
    _packing,
    _remote_code,
    _merge_base,
    _generation,
    _local_files,
    _unsafe_files,
    _steps,
    _streaming,
    _row_limits,
    _truncation,
    _control_tokens,
    _checks,
]
