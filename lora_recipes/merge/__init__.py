"""Merges the adapter into a plain model, shard by shard, and publishes it only when it answers like the adapter."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_recipes import console
from lora_recipes.data.load import LoadedData
from lora_recipes.errors import MachineError, RecipeError, RefusedError, RunError
from lora_recipes.merge import parity
from lora_recipes.merge.parity import TOLERANCES, Asked, Proof
from lora_recipes.merge.stream import Streamed, forget_progress
from lora_recipes.merge.weights import Planned, plan_weights, write_weights
from lora_recipes.model.adapted import attach_adapter, check_adapter, require_change
from lora_recipes.model.adapters import combine, parse_weighted
from lora_recipes.model.answer import generation_config
from lora_recipes.model.build import (
    base_generation_config,
    load_base,
    make_servable,
    meta_model,
    model_config,
)
from lora_recipes.model.compare import record, recorded_differences
from lora_recipes.model.files import model_folder
from lora_recipes.model.folder import require_publishable, write_sums
from lora_recipes.model.identity import base_of, write_provenance
from lora_recipes.model.machine import Choices, choose, memory_available, peak_rss_bytes, release_memory
from lora_recipes.model.source import Source, locate, materialise
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import SUMS, Locked, RunDir, file_sha256, published, write_json
from lora_recipes.trained import as_trained, require_own_adapter, require_same_adapter

MUCH_ROUNDED = 0.1  # of the adapter's change; what the merge type then loses is worth a word
BASES = ("original", "dequantized")
SCRATCH = ".parity"  # in the run folder: logits of the models that are compared


@dataclass(frozen=True)
class _Job:
    """Everything that is settled before anything is computed."""

    recipe: Recipe
    run_dir: RunDir
    adapter: Path
    source: Source
    choices: Choices
    tokenizer: PreTrainedTokenizerBase
    ends: list[int]
    data: LoadedData
    asked: Asked
    planned: Planned

    @property
    def base(self) -> str:
        return self.recipe.get("merge.base", "original")

    @property
    def dtype(self) -> torch.dtype:
        return self.planned.model.config.dtype

    @property
    def behaviour(self) -> bool:
        return self.recipe.get("merge.proof", "behaviour") == "behaviour"


def merge(
    recipe: Recipe, *, force: bool = False, adapters: list[str] | None = None, method: str = "svd"
) -> dict[str, Any]:
    """Merge, reload what was written, compare it with the adapter, and publish `outputs/<name>/merged`.

    Args:
        force: merge into another base than the adapter was trained on.
        adapters: `name=weight` of several adapters, which are combined first.
        method: how they are combined.

    Returns:
        What is written to parity.json.

    Raises:
        RunError: no adapter, `merged/` exists, or there is nothing to merge.
        MachineError: memory or disk is too small for what is asked.
        RecipeError: the base is quantized on disk.
        RefusedError: the adapter is broken or another's, or the parity proof fails; nothing is published then.
    """
    started = time.monotonic()
    run_dir = RunDir.of(recipe.name)
    _require_mergeable(recipe, run_dir, adapters or [])
    run_dir.require_writable()
    lock = Locked(run_dir.lock)
    lock.acquire(wait=False)
    try:
        job = _settle(recipe, run_dir, force, adapters or [], method)
        report = _merged(job, _emptied(run_dir.root / SCRATCH), started)
    finally:
        shutil.rmtree(run_dir.root / SCRATCH, ignore_errors=True)
        lock.release()
    _show(report, run_dir)
    if adapters:
        console.say(
            "This model is of several adapters; what `evaluate` and `generate` measured is of the run's own, so `status` will "
            "not say ship."
        )
    return report


def _emptied(folder: Path) -> Path:
    """A folder for this merge alone. One of its name was left by a merge that was killed: the run folder is locked."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _require_mergeable(recipe: Recipe, run_dir: RunDir, adapters: list[str]) -> None:
    if not recipe.get("lora"):
        raise RunError(
            f"{recipe.path}: nothing to merge: without a `lora` section the whole model is trained, and training publishes "
            f"{run_dir.merged} itself. Next: lora-recipes generate {recipe.path}"
        )
    if run_dir.merged.exists():
        raise RunError(f"{run_dir.merged} exists and is left as it is; move or delete it to merge again")
    if not adapters:
        run_dir.require_adapter(recipe.path)


def _settle(recipe: Recipe, run_dir: RunDir, force: bool, adapters: list[str], method: str) -> _Job:
    choices = choose(recipe, training=False)
    source = materialise(locate(recipe))
    adapter = _one_adapter(recipe, run_dir, source, force, adapters, method)
    check_adapter(adapter)
    require_change(adapter)
    if getattr(model_config(recipe, source), "quantization_config", None) is not None:
        raise RecipeError(
            f"{recipe.where('model.pretrained_model_name_or_path')}: {source.named} is quantized on disk; merging into it "
            "would round the adapter away. Name the 16- or 32-bit model it was made from"
        )
    opened = as_trained(recipe, run_dir, source)
    limit = {"max_new_tokens": recipe.get("generation.max_new_tokens", 64)}
    greedy = generation_config(limit, opened.ends, opened.tokenizer)
    asked = parity.to_ask(opened.data, opened.tokenizer, greedy)
    planned = plan_weights(recipe, source, choices, adapter)
    job = _Job(recipe, run_dir, adapter, source, choices, opened.tokenizer, opened.ends, opened.data, asked, planned)
    _require_memory(job)
    return job


def _one_adapter(
    recipe: Recipe, run_dir: RunDir, source: Source, force: bool, adapters: list[str], method: str
) -> Path:
    """The run's own adapter, or the one that is made of several."""
    if not adapters:
        require_same_adapter(recipe, run_dir, source, force=force)
        return run_dir.adapter
    weighted = parse_weighted(adapters)
    for folder, _ in weighted.values():
        require_own_adapter(folder, recipe, source, force=force)
        check_adapter(folder)
    report = combine(meta_model(model_config(recipe, source), recipe), weighted, method, run_dir.combined)
    write_provenance(run_dir.combined, base_of(recipe, source), combined=report)
    write_sums(run_dir.combined)
    return run_dir.combined


def _require_memory(job: _Job) -> None:
    """The proof loads the model, in the type it is merged in; merging does not."""
    cpu = job.choices.device == "cpu"
    needed = job.planned.layout.bytes
    # Without a device_map a model is loaded on one GPU, the first of those that are visible.
    gpus = [0] if job.recipe.get("model.device_map") is None else range(torch.cuda.device_count())
    free = memory_available() if cpu else sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
    if job.behaviour and needed > free:
        elsewhere = "on the CPU (training.use_cpu=true) or "
        if len(gpus) < torch.cuda.device_count():
            elsewhere = f"on all GPUs (model.device_map=auto), {elsewhere}"
        raise MachineError(
            f"the proof of a merge loads the model: {needed / 2**30:.1f} GiB, of which {free / 2**30:.1f} GiB are free "
            f"{'here' if cpu else 'on the GPU'}. Merge {'' if cpu else elsewhere}on a machine "
            "with more memory, or set merge.proof=weights: then only the weights are proved, not that the model behaves like "
            "the adapter"
        )


def _merged(job: _Job, scratch: Path, started: float) -> dict[str, Any]:
    """Observe the adapter, write the model, hold one against the other, publish."""
    observed: dict[str, tuple[Path, list[str]]] = {}
    report: dict[str, Any] = {
        "merged": str(job.run_dir.merged),
        "dtype": str(job.dtype).removeprefix("torch."),
        "base": job.base,
        "adapter_sha256": file_sha256(job.adapter / "adapter_model.safetensors"),
        "prompts": len(job.asked.prompts),
        "rows": len(job.asked.rows) - len(job.asked.prompts),
    }
    if job.behaviour:
        report |= _observe(job, scratch, observed)
    with published(job.run_dir.merged, resumes=True) as staging:
        began = time.monotonic()
        # A proof that is killed costs no second merge.
        streamed = write_weights(job.planned, staging, keep_progress=True)
        report |= {
            "written_bytes": job.planned.layout.bytes,
            "written_seconds": round(time.monotonic() - began, 2),
            "rounded_away": streamed.rounded_away,
            "dropped": job.planned.layout.dropped,
        }
        _write_rest(job, staging)
        require_publishable(staging)
        try:
            proved, sums = _proved(job, staging, streamed, observed, report.pop("learnt", None))
            report |= proved
        finally:
            peak = max(peak_rss_bytes(), report.pop("fresh_peak_rss_bytes", 0))
            report |= {"peak_rss_bytes": peak, "seconds": round(time.monotonic() - started, 1)}
            write_json(job.run_dir.parity, {"passed": False} | report)
        if not report["passed"]:
            raise RefusedError(
                f"the merged model does not answer like the adapter, so it is not published: logits differ by up to "
                f"{report['max_abs_logit_difference']:.3g}, mean KL {report['mean_kl']:.3g}, "
                f"{100 * report['greedy_agreement']:.0f} % of greedy texts are the same; see {job.run_dir.parity}"
                + _lost_to_rounding(report)
            )
        forget_progress(staging)
        write_sums(staging, sums)
        report["merged_sha256"] = file_sha256(staging / SUMS)
        write_json(job.run_dir.parity, report)
    return report


def _lost_to_rounding(report: dict[str, Any]) -> str:
    lost = report["rounded_away"] or 0.0
    if lost < MUCH_ROUNDED:
        return ""
    return f". {report['dtype']} rounds {100 * lost:.0f} % of the adapter's change away: set merge.dtype=float32"


def _observe(job: _Job, scratch: Path, observed: dict[str, tuple[Path, list[str]]]) -> dict[str, Any]:
    """What base, adapter and, for a quantized run, the trained model and both bases do on the same tokens."""
    found: dict[str, Any] = {}
    bases: dict[str, Any] = {}
    quantized = bool(job.recipe.get("quantization"))
    if quantized:
        trained = attach_adapter(load_base(job.recipe, job.source, job.choices), job.adapter)
        observed["trained"] = _observed(trained, job, scratch / "trained")
        del trained
        release_memory()
    for name in BASES if quantized else (job.base,):
        base = _base(job, name).eval()
        if name == job.base:  # before the adapter is on it: switching one off leaves trained biases in the base
            record(base, job.asked.rows, scratch / "base")
        model = attach_adapter(base, job.adapter)
        if name == job.base:
            observed["adapter"] = _observed(model, job, scratch / "adapter")
            learnt = recorded_differences(job.asked.rows, scratch / "adapter", scratch / "base")
            found["learnt"] = learnt["mean_kl"]
        if quantized:
            bases[name] = parity.difference(model, job.tokenizer, job.asked, *observed["trained"])
        del base, model
        release_memory()
    return found | ({"bases": bases} if quantized else {})


def _observed(model: PeftModel, job: _Job, folder: Path) -> tuple[Path, list[str]]:
    return folder, parity.observe(model, job.tokenizer, job.asked, folder)


def _base(job: _Job, name: str) -> PreTrainedModel:
    """The base as it would be merged into: the original weights, or the quantized ones that were trained on, opened."""
    dtype = job.recipe.get("merge.dtype")
    if name == "original":
        return load_base(job.recipe, job.source, job.choices, dtype=dtype, quantized=False)
    # Quantized from the type it was trained in: another type gives other codes.
    base = load_base(job.recipe, job.source, job.choices).dequantize()
    return base.to(getattr(torch, dtype)) if dtype else base


def _write_rest(job: _Job, staging: Path) -> None:
    """Configs, tokenizer and template; and the code of a model that brings its own."""
    model = job.planned.model
    model.generation_config = base_generation_config(job.recipe, job.source)  # one without weights has only a default
    make_servable(model, job.ends, job.tokenizer)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(staging)
    model.generation_config.save_pretrained(staging)
    job.tokenizer.save_pretrained(staging)
    if getattr(model.config, "auto_map", None):
        for file in model_folder(job.recipe, job.source).glob("*.py"):
            shutil.copy(file, staging)


def _proved(
    job: _Job, staging: Path, streamed: Streamed, observed: dict[str, tuple[Path, list[str]]], learnt: float | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """(what goes into the report, sha256 of each weight file as it was read back)"""
    proof = Proof(
        staging,
        job.recipe,
        job.choices,
        job.asked,
        parity.template_samples(job.data),
        job.ends,
        streamed.checksums,
        observed,
        job.behaviour,
    )
    found = parity.prove(proof)
    report = {"template_rows": found["template_rows"], "fresh_peak_rss_bytes": found["peak_rss_bytes"]}
    if not job.behaviour:
        unmeasured = dict.fromkeys(("max_abs_logit_difference", "mean_kl", "greedy_agreement"))
        return report | unmeasured | {"proof": "weights", "passed": True}, found["sha256"]
    difference, allowed = found["behaviour"]["adapter"], TOLERANCES[job.dtype]
    assert learnt is not None
    report |= difference | {"mean_kl_of_the_adapter": learnt, "tolerance": vars(allowed), "proof": "behaviour"}
    report["answers_in_common"] = min(allowed.greedy_agreement, TOLERANCES[_computes_in(job)].greedy_agreement)
    if trained := found["behaviour"].get("trained"):
        report["against_trained"] = trained
    return report | {"passed": parity.within(difference, learnt, allowed)}, found["sha256"]


def _computes_in(job: _Job) -> torch.dtype:
    """The type in which the adapter answers where it was trained: a 4-bit base may compute in another than the merged one."""
    named = job.choices.quantization.get("bnb_4bit_compute_dtype")
    return getattr(torch, named) if named else job.dtype


def _show(report: dict[str, Any], run_dir: RunDir) -> None:
    rows = [("merged model", f"{run_dir.merged} ({report['dtype']}, into the {report['base']} base)")]
    if report["proof"] == "behaviour":
        rows.append(
            (
                "adapter = merged",
                f"largest logit difference {report['max_abs_logit_difference']:.2g}, mean KL {report['mean_kl']:.2g}, "
                f"{100 * report['greedy_agreement']:.0f} % of {report['prompts']} greedy texts the same",
            )
        )
    else:
        rows.append(("adapter = merged", "not measured (merge.proof: weights)"))
    for name, drift in report.get("bases", {}).items():
        loss = "—" if drift["loss"] is None else f"{drift['loss']:.4f} (trained {drift['reference_loss']:.4f})"
        rows.append(
            (
                f"into the {name} base",
                f"loss {loss}, KL to the trained model {drift['mean_kl']:.2g}, "
                f"{100 * drift['greedy_agreement']:.0f} % of greedy texts the same",
            )
        )
    if report["rounded_away"] is not None:
        rows.append(("rounded away", f"{100 * report['rounded_away']:.2g} % of the change ({report['dtype']})"))
    rows.append(("same tokens", f"{report['template_rows']} training rows, with the exported tokenizer and template"))
    console.facts("Merged and proved", [*rows, ("proof", str(run_dir.parity))])
