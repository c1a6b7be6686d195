"""Steps, tokens, computation, time and disk of a run, from counts and arithmetic."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from lora_recipes.data.files import Source, local_files, sources
from lora_recipes.data.readers import Chunk, rows_of
from lora_recipes.data.scan import scan
from lora_recipes.data.select import rows_in_slice
from lora_recipes.errors import LoraRecipesError
from lora_recipes.plan.cards import Target
from lora_recipes.plan.memory import Estimate
from lora_recipes.plan.storage import tensor_bytes
from lora_recipes.recipe import Recipe
from lora_recipes.recipe.defaults import MAX_LENGTH
from lora_recipes.run_dir import FEWEST_CHECKPOINTS, RunDir, read_json

ACHIEVED = 0.3  # of a data sheet's rate; an assumption that `--tflops` replaces
CHECKPOINTS = 500  # TrainingArguments' own save_steps
MATMUL = 1024  # width of the square matrices that a CPU's rate is measured with


def cost(recipe: Recipe, estimate: Estimate, teraflops: float | None) -> dict[str, Any]:
    """What a run takes beside memory.

    Args:
        teraflops: achieved rate of one device in 1e12 operations a second, where the user has measured one.

    Returns:
        {"rows", "steps", "tokens", "tokens_are", "flops", "seconds", "rate", "rate_is", "disk": {...} in bytes}; null
        where rows lie on the hub and are not counted yet.
    """
    target = estimate.target
    audited = _audited(recipe, estimate)
    rows = audited.get("epoch_rows") or _rows(recipe)
    packed = bool(recipe.get("training.packing"))
    if packed and audited:
        rows = max(1, -(-audited["epoch_tokens"] // estimate.length))  # rows that are full
    a_step = estimate.rows * estimate.accumulation * target.gpus
    training = estimate.choices.training
    steps = _steps(training, rows, a_step)
    known = audited.get("epoch_tokens") and rows and not packed
    tokens_a_row = audited["epoch_tokens"] / rows if known else estimate.length
    tokens = None if steps is None else int(steps * a_step * tokens_a_row)
    flops = None if tokens is None else tokens * flops_a_token(estimate, tokens_a_row)
    rate, said = _rate(target, teraflops)
    # Processes on a CPU share its cores; layers spread over devices compute one after the other.
    workers = 1 if target.gpu is None or target.sharding == "layers" else target.gpus
    return {
        "rows": rows,
        "steps": steps,
        "tokens": tokens,
        "tokens_are": "as audited, without padding" if audited else "at most: every row as long as it may be",
        "flops": flops,
        "seconds": None if flops is None or rate is None else flops / (rate * 1e12 * workers),
        "rate": rate,
        "rate_is": said,
        "disk": _disk(estimate, steps),
    }


def flops_a_token(estimate: Estimate, length: float) -> float:
    """Operations a trained token costs: 2 for each weight it meets forward, 2 for each backward through it, 2 more where
    weights are trained or activations computed again (Kaplan et al. 2020, arXiv 2001.08361, section 2.1, which counts 6);
    attention adds 2 x width of all heads x length forward in a causal model, and twice that backward.
    """
    config = estimate.config.get_text_config()
    trained = sum(parameter.numel() for parameter in estimate.trained)
    met = _weights_met(estimate)
    again = 1 if estimate.step().checkpointing is not None else 0
    lora = bool(estimate.recipe.section("lora"))
    weights = 2 * met * (2 + again) + 2 * trained * (3 + again if lora else 1)
    heads = getattr(config, "num_attention_heads", 0)
    width = heads * (getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(1, heads))
    return weights + 2 * width * length * getattr(config, "num_hidden_layers", 0) * (3 + again)


def _weights_met(estimate: Estimate) -> int:
    """Weights that one token is multiplied with: no input embedding, and of the experts only those it passes."""
    config = estimate.config.get_text_config()
    tied = bool(getattr(config, "tie_word_embeddings", False))
    met = estimate.base_parameters - (0 if tied else estimate.head_parameters)
    experts = estimate.expert_parameters
    count, passed = (
        next((n for name in names if (n := getattr(config, name, None))), 0) for names in (EXPERTS, PASSED)
    )
    return met - (experts - experts * passed // count if experts and count and passed else 0)


# As configs call their number, and how many a token passes.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
PASSED = ("num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token", "moe_k")


def _audited(recipe: Recipe, estimate: Estimate) -> dict[str, Any]:
    """The run's audit.json where it is about these rows: the same sources and length, written after all of them."""
    file = RunDir.of(recipe.name).audit
    found = read_json(file)
    if not found or found.get("max_length") != estimate.recipe.get("training.max_length", MAX_LENGTH):
        return {}
    named = [source.name for source in sources(recipe)]
    if [source["name"] for source in found["sources"]] != named:
        return {}
    files = [recipe.path, *(one.path for source in sources(recipe) for one in local_files(source, source.split))]
    return found if all(one.stat().st_mtime <= file.stat().st_mtime for one in files if one.exists()) else {}


class _Counting:
    """The work on one chunk: its rows."""

    def __call__(self, chunk: Chunk) -> int:
        return sum(1 for _ in rows_of(chunk))


def _rows(recipe: Recipe) -> int | None:
    """Rows of an epoch, weights included; None where a source lies on the hub, or is not there."""
    total = 0.0
    for source in sources(recipe):
        counted = _rows_of(source, recipe)
        if counted is None:
            return None
        share = source.get("eval_split") if isinstance(source.get("eval_split"), float) else 0.0
        total += counted * (1 - share) * source.get("weight", 1)
    return round(total)


def _rows_of(source: Source, recipe: Recipe) -> int | None:
    if source.is_hub():
        return None
    try:
        rows = sum(
            count for _, count in scan(source, source.split, _Counting(), recipe.get("training.dataset_num_proc"))
        )
        first, last = rows_in_slice(source, source.split, rows) if "[" in source.split else (0, rows)
    except LoraRecipesError:  # `check` and `audit` say what is wrong with the data; memory can be planned without
        return None
    return last - first


def _steps(training: dict[str, Any], rows: int | None, a_step: int) -> int | None:
    if training.get("max_steps", -1) > 0:
        return training["max_steps"]
    if not rows:
        return None
    epochs = training.get("num_train_epochs", 3.0)
    return max(1, math.ceil(epochs * -(-rows // a_step)))


def _rate(target: Target, teraflops: float | None) -> tuple[float | None, str]:
    if teraflops is not None:
        return teraflops, "as given"
    if target.teraflops is not None:
        return ACHIEVED * target.teraflops, f"{ACHIEVED:.0%} of the {target.teraflops:g} in the data sheet, assumed"
    if target.gpu is not None:
        return None, "not known for this card; say it with --tflops"
    return _matmul_rate() / 2, "half of what a float32 matrix product reaches here, measured now"


def _matmul_rate() -> float:
    """1e12 operations a second that this CPU reaches in a float32 matrix product; the best of three."""
    left, right = torch.ones(MATMUL, MATMUL), torch.ones(MATMUL, MATMUL)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2 * MATMUL**3 / best / 1e12


def checkpoints_kept(training: Mapping[str, Any], steps: int | None) -> int:
    """Checkpoints that a run leaves.

    Args:
        training: settings by the names of trl.SFTConfig.
    """
    if training.get("save_strategy", "steps") == "no":
        return 0
    if training.get("save_strategy", "steps") == "epoch":
        kept = max(1, math.ceil(training.get("num_train_epochs", 3.0)))
    else:
        every = training.get("save_steps", CHECKPOINTS)
        kept = 1 if steps is None else max(1, int(1 / every) if every < 1 else -(-steps // int(every)))
    return min(kept, max(FEWEST_CHECKPOINTS, training.get("save_total_limit") or kept))


def _disk(estimate: Estimate, steps: int | None) -> dict[str, int]:
    """Bytes: one checkpoint (trained weights and optimizer states), all that are kept, adapter, merged model."""
    training, recipe = estimate.choices.training, estimate.recipe
    trained = tensor_bytes(estimate.trained)
    one = trained + estimate.memory_of_states
    kept = checkpoints_kept(training, steps)
    merged = recipe.get("merge.dtype") or str(estimate.dtype).removeprefix("torch.")
    return {
        "checkpoint": one,
        "checkpoints": kept * one,
        "adapter": trained if recipe.section("lora") else 0,
        "merged": estimate.base_parameters * getattr(torch, merged).itemsize,
    }
