"""Whether a run folder holds the run of this very recipe: what was trained is compared with what is asked now."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_recipes import console
from lora_recipes.data.load import LoadedData, load_data
from lora_recipes.errors import RefusedError, RunError
from lora_recipes.model.build import end_token_ids, load_tokenizer
from lora_recipes.model.folder import read_sums, require_intact
from lora_recipes.model.identity import base_of, require_base
from lora_recipes.model.initialise import changes_base
from lora_recipes.model.source import Source
from lora_recipes.recipe import Recipe, load_recipe
from lora_recipes.run_dir import SUMS, RunDir, file_sha256, read_json, text_sha256

# What an adapter is bound to. The other sections may change between training and the steps after it.
ADAPTER_KEYS = ("model", "quantization", "lora")
SCALING = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
RUN_KEYS = (*ADAPTER_KEYS, "dataset", "training")


@dataclass(frozen=True)
class Opened:
    """What the steps after training read before any weight: how the model is asked, and the run's rows.

    Attributes:
        ends: tokens that end an answer.
    """

    tokenizer: PreTrainedTokenizerBase
    ends: list[int]
    data: LoadedData


def as_trained(recipe: Recipe, run_dir: RunDir, source: Source) -> Opened:
    """Tokenizer, end tokens and rows of a run, in the form that it was trained in.

    Raises:
        RefusedError: the chat template is another than it was trained with.
    """
    tokenizer = load_tokenizer(recipe, source)
    ends = end_token_ids(recipe, source, tokenizer)
    data = load_data(recipe, tokenizer, set(ends))
    _require_same_template(run_dir, tokenizer.chat_template)
    return Opened(tokenizer, ends, data)


def require_same_adapter(recipe: Recipe, run_dir: RunDir, source: Source | None, *, force: bool = False) -> None:
    """Whether `adapter/` is what this recipe trained, bit for bit, on this very base. Nothing to hold in full fine-tuning.

    An adapter fits every model of the same shape, without any error: only the record of the run can tell.

    Args:
        source: the base, with its weights on this machine; None for a step that does not need the base.
        force: use the adapter on another base than it was trained on.

    Raises:
        RefusedError: the adapter was trained on another base or with another `lora` section, or was changed since.
    """
    _require_listed(run_dir)
    if not recipe.get("lora"):
        return
    changed = changed_keys(recipe, run_dir, ADAPTER_KEYS[1:] if force else ADAPTER_KEYS)
    if changed:
        lines = "\n".join(f"  {line}" for line in changed.values())
        raise RefusedError(
            f"{run_dir.adapter} was trained by another recipe:\n{lines}\nuse the recipe it was trained with"
        )
    _require_same_scaling(recipe, run_dir)
    require_own_adapter(run_dir.adapter, recipe, source, force=force)


def _require_same_scaling(recipe: Recipe, run_dir: RunDir) -> None:
    """Ranks and scaling stand in the adapter's config, beside its weights: a wrong one changes every answer in silence."""
    lora, saved = recipe.section("lora"), read_json(run_dir.adapter / "adapter_config.json")
    if changes_base(lora):
        return  # published as another adapter, of twice the rank, for the untouched base
    for key in SCALING:
        if key in lora and saved.get(key) != lora[key]:
            raise RefusedError(
                f"{run_dir.adapter / 'adapter_config.json'}: {key} is {saved.get(key)}, the adapter was trained with "
                f"{lora[key]} ({recipe.where(f'lora.{key}')}); put it back"
            )


def _require_listed(run_dir: RunDir) -> None:
    """Raises RefusedError where the checksums of what this run published are not those that it wrote down: whoever changes a
    file can write a new list beside it."""
    published = read_json(run_dir.manifest).get("published", {})
    of_merge = read_json(run_dir.parity).get("merged_sha256")
    records: list[tuple[Path, Any, Callable[[Path], Any]]] = []
    if published:
        records.append((run_dir.root / published["folder"], published["files"], read_sums))
    if of_merge:
        records.append((run_dir.merged, of_merge, lambda folder: file_sha256(folder / SUMS)))
    for folder, recorded, read in records:
        if not folder.is_dir():
            continue
        if not (folder / SUMS).is_file():
            raise RefusedError(
                f"{folder / SUMS}: is gone, so nobody can tell whether {folder} is what was published; put it back, or publish "
                "it again"
            )
        if read(folder) != recorded:
            raise RefusedError(
                f"{folder / SUMS}: is not the list that was written when {folder} was published; put it back, or publish it again"
            )


def require_own_adapter(folder: Path, recipe: Recipe, source: Source | None, *, force: bool = False) -> None:
    """Raises RefusedError when an adapter was changed since it was published, or belongs to another base."""
    require_intact(folder)
    if source is None:
        return
    if doubt := require_base(folder, base_of(recipe, source), force=force):
        console.say(f"note: {doubt}", "yellow")


def _require_same_template(run_dir: RunDir, template: str | None) -> None:
    """Raises RefusedError when a model would be asked with another chat template than it was trained with.

    Args:
        template: the tokenizer's, after `load_data` has settled it.
    """
    trained = read_json(run_dir.manifest).get("chat_template_sha256")
    now = text_sha256(template) if template else None
    if trained != now and run_dir.manifest.is_file():
        raise RefusedError(
            f"{run_dir.root}: the chat template is not the one that was trained with (sha256 {str(trained)[:12]} then, "
            f"{str(now)[:12]} now); the model would be asked in another form than it has learnt. Put the template back "
            "(training.chat_template_path, or the model's own), or train again under another name"
        )


def require_same_heldout(recipe: Recipe, run_dir: RunDir, tokens: dict[str, str], seed: int) -> None:
    """Raises RunError when a held-out share is drawn anew: rows would be scored that were trained on."""
    manifest = read_json(run_dir.manifest)
    before = (manifest.get("tokens", tokens), manifest.get("seed", seed))
    shares = [key for key, keys in recipe.datasets() if isinstance(keys.get("eval_split"), float)]
    if shares and before != (tokens, seed):
        raise RunError(
            f"{recipe.where(f'{shares[0]}.eval_split')}: `eval_split` is a share, and data, template or training.seed are not "
            f"those of the training ({run_dir.manifest}), so rows that were trained on would be asked; put them back, or "
            "hold out a split by name"
        )


def changed_keys(recipe: Recipe, run_dir: RunDir, sections: tuple[str, ...]) -> dict[str, str]:
    """Each key that differs from the run's own recipe.yaml, and how; none where nothing was recorded."""
    if not run_dir.recipe.is_file():
        return {}
    old, new = flat_sections(run_dir.recipe, sections), flat_sections(recipe, sections)
    for values in (old, new):
        _join_batch(values)
    absent = "unset"
    return {
        key: f"{key}: {old.get(key, absent)} then, {new.get(key, absent)} now ({recipe.where(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, absent) != new.get(key, absent)
    }


def flat_sections(recipe: Recipe | Path, sections: tuple[str, ...]) -> dict[str, Any]:
    """Dotted key → value of some sections of a recipe, or of a run's recipe.yaml."""
    loaded = load_recipe(recipe) if isinstance(recipe, Path) else recipe
    return _flat({name: loaded.section(name) for name in sections})


def _join_batch(values: dict[str, Any]) -> None:
    """Rows of a step are what was asked for; how they are cut into micro-batches follows the memory (`--fit`)."""
    keys = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
    if any(key in values for key in keys):
        device, accumulation = (values.pop(key, default) for key, default in zip(keys, (8, 1), strict=True))
        values[" x ".join(keys)] = device * accumulation


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)} or value
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
