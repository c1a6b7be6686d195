"""The proof of a merge: what was written is loaded in a fresh process, as its users will, and held against the adapter."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from signal import SIGKILL
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_recipes.data.load import LoadedData
from lora_recipes.data.questions import questions
from lora_recipes.data.rerender import Sample, differing, samples
from lora_recipes.errors import MachineError, RefusedError
from lora_recipes.merge.direct import read_back
from lora_recipes.model.answer import answer
from lora_recipes.model.build import load_merged
from lora_recipes.model.compare import Row, differences, prompt_row, record, trained_row
from lora_recipes.model.machine import Choices, peak_rss_bytes
from lora_recipes.model.quantizer import begin_without
from lora_recipes.recipe import Recipe

PROMPTS = 16
ROWS = 16  # held-out rows, else training rows
TOKENS = 64  # of a prompt or row, its last: bounds the logits that are kept on disk
RERENDERED = 100  # training rows of each source
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
class Asked:
    """What both models are given: prompts that they answer, and rows on which their logits are compared."""

    prompts: list[list[int]]
    rows: list[Row]
    greedy: GenerationConfig


def to_ask(data: LoadedData, tokenizer: PreTrainedTokenizerBase, greedy: GenerationConfig) -> Asked:
    """The recipe's prompts, and rows that it held out; rows it trained on where it held out none."""
    found = [question.input_ids for question in questions(data, PROMPTS)]
    prompts = found or [tokenizer(text)["input_ids"] for text in FALLBACK_PROMPTS]
    taken = data.heldout() or data.train()
    kept = [trained_row(row["input_ids"], row["labels"], TOKENS) for row in taken.take(ROWS)]
    rows = [prompt_row(prompt, TOKENS) for prompt in prompts] + [row for row in kept if row is not None]
    return Asked(prompts, rows, greedy)


def texts(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, asked: Asked) -> list[str]:
    """Greedy answers."""
    return [given.text for given in answer(model, tokenizer, asked.prompts, asked.greedy, PROMPTS, seed=0)]


def observe(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, asked: Asked, folder: Path
) -> list[str]:
    """Keep a model's logits in `folder`, and return its greedy answers."""
    record(model, asked.rows, folder)
    return texts(model, tokenizer, asked)


def difference(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    folder: Path,
    answers: list[str],
) -> dict[str, Any]:
    """How a model differs from the one observed in `folder`, whose greedy answers are given."""
    given = texts(model, tokenizer, asked)
    same = sum(old == new for old, new in zip(answers, given, strict=True))
    return differences(model, asked.rows, folder) | {"greedy_agreement": same / len(given)}


@dataclass(frozen=True)
class Proof:
    """What a fresh process needs to hold a merged folder against what was observed of others.

    Attributes:
        observed: name → (folder of its logits, its greedy answers).
        behaviour: False: only files, tokenizer and configs are looked at; no weights are loaded.
    """

    folder: Path
    recipe: Recipe
    choices: Choices
    asked: Asked
    samples: list[Sample]
    ends: list[int]
    checksums: dict[str, str]
    observed: dict[str, tuple[Path, list[str]]]
    behaviour: bool


def template_samples(data: LoadedData) -> list[Sample]:
    """Training rows that the exported tokenizer must make the same tokens of."""
    return samples(data, RERENDERED)


def fresh_process(recipe: Recipe) -> Executor:
    """An interpreter of its own (`spawn`), which shares nothing with this one but the files."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=begin_without, initargs=(recipe,))


def prove(proof: Proof) -> dict[str, Any]:
    """Reload a merged folder, in a fresh process where its behaviour is looked at.

    Returns:
        {"sha256": {file: its sum}, "behaviour": {name: differences from it}, "template_rows", "peak_rss_bytes"}

    Raises:
        RefusedError: a file is not what was written, the template is another, or the end tokens are lost.
        MachineError: the process was killed, which the system does when memory runs out.
    """
    return in_fresh_process(_reloaded, proof, proof.recipe, proof.folder) if proof.behaviour else _reloaded(proof)


def in_fresh_process(work: Callable[[Any], Any], argument: Any, recipe: Recipe, folder: Path) -> Any:
    """What `work` returns or raises in a process of its own.

    Args:
        folder: what is looked at there, for the message.

    Raises:
        MachineError: the process was killed.
        RuntimeError: it ended in another way before it answered, which is a bug.
    """
    others = active_children()
    with fresh_process(recipe) as fresh:
        answer = fresh.submit(work, argument)
        started = [child for child in active_children() if child not in others]
        try:
            return answer.result()
        except BrokenProcessPool as error:
            for child in started:
                child.join()
            if -SIGKILL in [child.exitcode for child in started]:
                raise MachineError(
                    f"{folder}: the process that reloaded the merged model was killed, as the system does when memory runs "
                    "out. What was merged is kept: run merge again, with more memory, or set merge.proof=weights"
                ) from None
            raise RuntimeError(f"the process that reloaded {folder} ended before it answered, see above") from error


def _reloaded(proof: Proof) -> dict[str, Any]:
    sums = {
        name: read_back(proof.folder / name, checksum, cached=proof.behaviour)  # weights that are loaded next stay
        for name, checksum in proof.checksums.items()
    }
    code = {"trust_remote_code": True} if proof.recipe.get("model.trust_remote_code") else {}
    tokenizer = AutoTokenizer.from_pretrained(proof.folder, **code)
    _require_template(proof, tokenizer)
    _require_ends(proof, tokenizer)
    found: dict[str, Any] = {"sha256": sums, "template_rows": len(proof.samples), "behaviour": {}}
    if proof.behaviour:
        model = load_merged(proof.folder, proof.recipe, proof.choices)
        for name, (folder, answers) in proof.observed.items():
            found["behaviour"][name] = difference(model, tokenizer, proof.asked, folder, answers)
    return found | {"peak_rss_bytes": peak_rss_bytes()}


def _require_template(proof: Proof, tokenizer: PreTrainedTokenizerBase) -> None:
    other = differing(proof.samples, tokenizer, set(proof.ends))
    if other:
        raise RefusedError(
            f"{proof.folder}: the exported tokenizer and template make other tokens of {len(other)} of "
            f"{len(proof.samples)} training rows than those that were trained on; the model would be asked in another form "
            "than it has learnt"
        )


def _require_ends(proof: Proof, tokenizer: PreTrainedTokenizerBase) -> None:
    declared = GenerationConfig.from_pretrained(proof.folder).eos_token_id
    ends = declared if isinstance(declared, list) else [declared]
    lost = [tokenizer.convert_ids_to_tokens(token) for token in proof.ends if token not in ends]
    if lost:
        raise RefusedError(
            f"{proof.folder / 'generation_config.json'}: eos_token_id lacks {', '.join(map(str, lost))}, which the model "
            "learnt to end with, so whoever serves it would not stop there"
        )


def within(report: dict[str, Any], learnt: float, allowed: Tolerance) -> bool:
    """NaN fails every comparison, so a model that answers NaN does not pass.

    Beside the fixed limits: a merged model must be far nearer to the adapter than the untrained base is, so that a merge
    which lost a weak adapter does not hide behind the rounding of 16 bits.

    Args:
        learnt: KL(adapter ‖ base), nats a token.
    """
    return (
        (learnt < NOTHING_LEARNT or report["mean_kl"] <= NEARER * learnt)
        and report["max_abs_logit_difference"] <= allowed.max_abs_logit_difference
        and report["mean_kl"] <= allowed.mean_kl
        and report["greedy_agreement"] >= allowed.greedy_agreement
    )
