"""Rules of rows and steps: what is held out, packed, streamed, cut or left out."""

import re
from collections.abc import Iterator

from lora_recipes.recipe.rules.finding import Finding, Values, sources_of

METRIC = re.compile(r"(eval_)?(loss|mean_token_accuracy)")  # what an evaluation measures on every machine


def evaluation(values: Values) -> Iterator[Finding]:
    training, sources = values.get("training", {}), sources_of(values)
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
            "write loss or mean_token_accuracy",
        )
    if training.get("eval_steps") is not None and "eval_strategy" not in training:
        yield Finding(
            "training.eval_steps",
            "has no effect without `training.eval_strategy: steps`",
            "set that, or drop this",
        )
    for prefix, source in sources:
        if source.get("eval_split") == source.get("split", "train"):
            yield Finding(
                f"{prefix}.eval_split",
                "is the training split itself",
                "name a split that is not trained on, or a share such as 0.05",
            )


def best(values: Values) -> Iterator[Finding]:
    """What measures which checkpoint is the best, and so stays, where nothing is ever measured. A decision against it is no
    oversight."""
    training = values.get("training", {})
    if "eval_strategy" in training or training.get("eval_on_start"):
        return
    for key in ("metric_for_best_model", "greater_is_better"):
        if training.get(key) is not None:
            yield Finding(f"training.{key}", "has no effect without `training.eval_strategy`", "set that, or drop this")


def workers(values: Values) -> Iterator[Finding]:
    training = values.get("training", {})
    if training.get("dataloader_num_workers"):
        return
    for name in ("persistent_workers", "multiprocessing_context", "prefetch_factor"):
        if training.get(f"dataloader_{name}"):
            yield Finding(
                f"training.dataloader_{name}",
                "is about the processes that read rows, and `training.dataloader_num_workers` asks for none",
                "write `dataloader_num_workers: 2`, or drop it",
            )


def packing(values: Values) -> Iterator[Finding]:
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


def steps(values: Values) -> Iterator[Finding]:
    training = values.get("training", {})
    warmup, most = training.get("warmup_steps", 0), training.get("max_steps", -1)
    if most > 1 and warmup >= most and training.get("lr_scheduler_type") != "constant":
        yield Finding(
            "training.warmup_steps",
            f"is {warmup}, and the run ends after `training.max_steps: {most}`, before the rate is what it should be",
            "write fewer, or a share of all steps such as 0.03",
        )
    if most == 0:
        yield Finding(
            "training.max_steps",
            "is 0, which the Trainer takes for no limit: it would train all of `training.num_train_epochs`",
            "write a number from 1 on, or drop it",
        )


def streaming(values: Values) -> Iterator[Finding]:
    training, sources = values.get("training", {}), sources_of(values)
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


def row_limits(values: Values) -> Iterator[Finding]:
    for prefix, source in sources_of(values):
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


def truncation(values: Values) -> Iterator[Finding]:
    training = values.get("training", {})
    if training.get("packing") and training.get("packing_strategy") == "bfd_split":
        why, way_out = "`training.packing_strategy: bfd_split`: long rows are split, not cut", "drop it, or write `bfd`"
    elif training.get("max_length", 0) is None:
        why, way_out = "`training.max_length: null`: no row is too long", "set a max_length, or drop it"
    else:
        return
    for prefix, source in sources_of(values):
        if source.get("truncation") is not None:
            yield Finding(
                f"{prefix}.truncation",
                f"has no effect with {why}",
                way_out,
            )


def control_tokens(values: Values) -> Iterator[Finding]:
    for prefix, source in sources_of(values):
        if source.get("control_tokens") == "keep" and source.get("format") != "text":
            yield Finding(
                f"{prefix}.control_tokens",
                "is `keep`, with which a row of any form but plain text could forge a turn of the dialogue",
                "write `format: text` if the rows are, or `control_tokens: escape`",
            )
