"""Merges the adapter into a plain model, in its own process, and publishes it only when it answers like the adapter."""

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import kl_div
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_recipes import console
from lora_recipes.data.load import load_data
from lora_recipes.data.questions import Question, questions
from lora_recipes.errors import RefusedError, RunError
from lora_recipes.model.adapted import attach_adapter, check_adapter
from lora_recipes.model.answer import answer, generation_config
from lora_recipes.model.build import (
    end_token_ids,
    load_base,
    load_merged,
    load_tokenizer,
    make_servable,
    model_config,
)
from lora_recipes.model.machine import Choices, choose
from lora_recipes.model.source import Source, locate, materialise
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir, published, write_json
from lora_recipes.trained import require_same_adapter

PARITY_PROMPTS = 16
PARITY_TOKENS = 128  # last tokens of a prompt that are compared; bounds the memory of the stored logits
FALLBACK_PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.")


@dataclass(frozen=True)
class Tolerance:
    """What a merged model may differ by. Rounding to 16 bits moves logits; a wrong merge moves them much further."""

    max_abs_logit_difference: float
    mean_kl: float  # nats a token, KL(adapter ‖ merged)
    greedy_agreement: float  # share of prompts with the same greedy text


NEARER = 0.1  # KL to the adapter, as a share of the base's
NOTHING_LEARNT = 1e-7  # nats a token: such an adapter changes nothing that could be compared

TOLERANCES = {
    torch.float32: Tolerance(1e-3, 1e-6, 1.0),
    torch.bfloat16: Tolerance(2.0, 2e-2, 0.5),
    torch.float16: Tolerance(0.5, 5e-3, 0.75),
}


@dataclass(frozen=True)
class Behaviour:
    """How a model behaves on the parity prompts: logits of each ([tokens, vocabulary], float32), greedy texts."""

    logits: list[torch.Tensor]
    texts: list[str]


def merge(recipe: Recipe) -> dict[str, Any]:
    """Merge, reload what was written, compare it with the adapter, and publish `outputs/<name>/merged`.

    Returns:
        What is written to parity.json.

    Raises:
        RunError: no adapter, `merged/` exists, or there is nothing to merge.
        RefusedError: the base is quantized on disk, the adapter is broken or not finite, or the parity proof fails;
            nothing is published then.
    """
    started = time.monotonic()
    run_dir = RunDir.of(recipe.name)
    if not recipe.get("lora"):
        raise RunError(
            f"{recipe.path}: nothing to merge: without a `lora` section the whole model is trained, and training publishes "
            f"{run_dir.merged} itself. Next: lora-recipes generate {recipe.path}"
        )
    run_dir.require_adapter(recipe.path)
    if run_dir.merged.exists():
        raise RunError(f"{run_dir.merged} exists and is left as it is; move or delete it to merge again")
    require_same_adapter(recipe, run_dir)
    check_adapter(run_dir.adapter)
    run_dir.require_writable()
    choices = choose(recipe, training=False)
    source = materialise(locate(recipe))
    _refuse_quantized(recipe, source)
    tokenizer = load_tokenizer(recipe, source)
    ends = end_token_ids(recipe, source, tokenizer)
    asked = _parity_questions(recipe, tokenizer, ends)
    greedy = generation_config({"max_new_tokens": recipe.get("generation.max_new_tokens", 64)}, ends, tokenizer)

    model = attach_adapter(_merge_base(recipe, source, choices), run_dir.adapter)
    with model.disable_adapter():
        untrained = _logits(model, asked)
    before = _behaviour(model, tokenizer, asked, greedy)
    merged = model.merge_and_unload(safe_merge=True)
    make_servable(merged, ends, tokenizer)
    dtype = merged.dtype
    with published(run_dir.merged) as staging:
        merged.save_pretrained(staging, **_save_keywords(recipe))
        tokenizer.save_pretrained(staging)
        del merged, model
        after = _behaviour(load_merged(staging, recipe, choices), tokenizer, asked, greedy)
        report: dict[str, Any] = {
            "merged": str(run_dir.merged),
            "dtype": str(dtype).removeprefix("torch."),
        } | _difference(before, after)
        report |= {"base": recipe.get("merge.base", "original"), "prompts": len(asked)}
        report["mean_kl_of_the_adapter"] = _kl(before.logits, untrained)
        report["passed"] = _within(report, TOLERANCES[dtype])
        report["tolerance"] = vars(TOLERANCES[dtype])
        if recipe.get("quantization"):
            report["against_trained"] = _against_trained(
                recipe, source, choices, run_dir, after, tokenizer, asked, greedy
            )
        report["peak_rss_bytes"] = _peak_rss_bytes()
        report["seconds"] = round(time.monotonic() - started, 1)
        write_json(run_dir.parity, report)
        if not report["passed"]:
            raise RefusedError(
                f"the merged model does not answer like the adapter, so it is not published: logits differ by up to "
                f"{report['max_abs_logit_difference']:.3g}, mean KL {report['mean_kl']:.3g}, "
                f"{100 * report['greedy_agreement']:.0f} % of greedy texts are the same; see {run_dir.parity}"
            )
    _show(report, run_dir)
    return report


def _refuse_quantized(recipe: Recipe, source: Source) -> None:
    if getattr(model_config(recipe, source), "quantization_config", None) is not None:
        raise RefusedError(
            f"{recipe.where('model.pretrained_model_name_or_path')}: {source.named} is quantized on disk; merging into it "
            "would round the adapter away. Name the 16- or 32-bit model it was made from"
        )


def _merge_base(recipe: Recipe, source: Source, choices: Choices) -> PreTrainedModel:
    """The base to merge into: the original weights, or the 4-bit weights that were trained on, dequantized."""
    dtype = recipe.get("merge.dtype")
    if recipe.get("merge.base", "original") == "original":
        return load_base(recipe, source, choices, dtype=dtype, quantized=False)
    # Quantized from the type it was trained in: another type gives other 4-bit codes.
    base = load_base(recipe, source, choices).dequantize()
    return base.to(getattr(torch, dtype)) if dtype else base


def _save_keywords(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in recipe.section("merge").items() if key not in ("dtype", "base")}


def _parity_questions(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> list[Question]:
    found = questions(load_data(recipe, tokenizer, set(ends)))[:PARITY_PROMPTS]
    if found:
        return found
    return [Question(text, tokenizer(text)["input_ids"], None) for text in FALLBACK_PROMPTS]


def _behaviour(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[Question],
    greedy: GenerationConfig,
) -> Behaviour:
    answers = answer(model, tokenizer, [question.input_ids for question in asked], greedy, PARITY_PROMPTS, seed=0)
    return Behaviour(_logits(model, asked), [given.text for given in answers])


def _logits(model: PreTrainedModel | PeftModel, asked: list[Question]) -> list[torch.Tensor]:
    """[tokens, vocabulary] of each question, float32 on the CPU."""
    logits = []
    for question in asked:
        ids = torch.tensor([question.input_ids], device=model.device)
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits[0, -PARITY_TOKENS:].float().cpu())
    return logits


def _difference(before: Behaviour, after: Behaviour) -> dict[str, float]:
    """Largest logit difference, KL(before ‖ after) in nats a token, share of greedy texts that are the same."""
    pairs = list(zip(before.logits, after.logits, strict=True))
    same_top = sum(int((old.argmax(-1) == new.argmax(-1)).sum()) for old, new in pairs)
    same_text = sum(old == new for old, new in zip(before.texts, after.texts, strict=True))
    return {
        "max_abs_logit_difference": max((old - new).abs().max().item() for old, new in pairs),
        "mean_kl": _kl(before.logits, after.logits),
        "top1_agreement": same_top / sum(len(old) for old, _ in pairs),
        "greedy_agreement": same_text / len(before.texts),
    }


def _kl(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """KL(before ‖ after), nats, mean over tokens; rounding below zero is cut off."""
    total = sum(
        kl_div(new.log_softmax(-1), old.log_softmax(-1), log_target=True, reduction="sum").item()
        for old, new in zip(before, after, strict=True)
    )
    return max(total, 0.0) / sum(len(old) for old in before)


def _within(report: dict[str, Any], allowed: Tolerance) -> bool:
    """NaN fails every comparison, so a model that answers NaN does not pass.

    Beside the fixed limits: a merged model must be far nearer to the adapter than the untrained base is, so that a merge
    which lost a weak adapter does not hide behind the rounding of 16 bits.
    """
    learnt = report["mean_kl_of_the_adapter"]
    return (
        (learnt < NOTHING_LEARNT or report["mean_kl"] <= NEARER * learnt)
        and report["max_abs_logit_difference"] <= allowed.max_abs_logit_difference
        and report["mean_kl"] <= allowed.mean_kl
        and report["greedy_agreement"] >= allowed.greedy_agreement
    )


def _against_trained(
    recipe: Recipe,
    source: Source,
    choices: Choices,
    run_dir: RunDir,
    after: Behaviour,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[Question],
    greedy: GenerationConfig,
) -> dict[str, float]:
    """How far the merged model is from the quantized model that was trained. Reported, never a reason to fail."""
    trained = attach_adapter(load_base(recipe, source, choices), run_dir.adapter)
    return _difference(_behaviour(trained, tokenizer, asked, greedy), after)


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux


def _show(report: dict[str, Any], run_dir: RunDir) -> None:
    rows = [
        ("merged model", f"{run_dir.merged} ({report['dtype']}, into the {report['base']} base)"),
        (
            "adapter = merged",
            f"largest logit difference {report['max_abs_logit_difference']:.2g}, mean KL {report['mean_kl']:.2g}, "
            f"{100 * report['greedy_agreement']:.0f} % of {report['prompts']} greedy texts the same",
        ),
    ]
    if drift := report.get("against_trained"):
        rows.append(
            (
                "against the 4-bit model",
                f"largest logit difference {drift['max_abs_logit_difference']:.2g}, mean KL {drift['mean_kl']:.2g}, "
                f"{100 * drift['greedy_agreement']:.0f} % of greedy texts the same",
            )
        )
    console.facts("Merged and proved", [*rows, ("proof", str(run_dir.parity))])
