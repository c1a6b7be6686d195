"""Rules of what is trained and how: precision, quantization, the adapter and its first weights, optimizers, the merge's base."""

from collections.abc import Iterator

from lora_recipes.recipe.rules.finding import Finding, Values


def one_precision(values: Values) -> Iterator[Finding]:
    training = values.get("training", {})
    if training.get("fp16") and training.get("bf16"):
        yield Finding(
            "training.fp16",
            "and `training.bf16` are both true",
            "keep one: bf16 where the GPU has it, fp16 on T4 and V100",
        )


def one_quantization(values: Values) -> Iterator[Finding]:
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


def lora_targets(values: Values) -> Iterator[Finding]:
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


def full(values: Values) -> Iterator[Finding]:
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
    dtype = values.get("model", {}).get("dtype")
    if values.get("training", {}).get("fp16") and dtype in ("float16", "bfloat16"):
        yield Finding(
            "training.fp16",
            f"does not go with full fine-tuning of `model.dtype: {dtype}`: fp16's gradient scaler needs trained weights in "
            "float32",
            "write `dtype: float32`, or extend base/lora.yaml",
        )


def first_weights(values: Values) -> Iterator[Finding]:
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


def first_weights_together(values: Values) -> Iterator[Finding]:
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


def adapter_optimizers(values: Values) -> Iterator[Finding]:
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


def only_b(values: Values) -> Iterator[Finding]:
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


def merge_base(values: Values) -> Iterator[Finding]:
    if values.get("merge", {}).get("base") == "dequantized" and not values.get("quantization", {}).get("load_in_4bit"):
        yield Finding("merge.base", "is `dequantized`, which needs `quantization.load_in_4bit`", "drop the key")
