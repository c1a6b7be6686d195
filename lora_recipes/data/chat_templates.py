"""Which chat template a run uses: the model's own, a file, one that is shipped here, or one of TRL's by name."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lora_recipes.data.masks import RENDER_BYTES, RENDER_ERRORS, RENDER_SECONDS
from lora_recipes.errors import RecipeError
from lora_recipes.limits import TooMuch, bounded
from lora_recipes.recipe import Recipe

# What rows mean to a tokenizer that has no chat template. Any other format needs one that the recipe names.
WITHOUT_TEMPLATE = {"text": "human_assistant", "prompt_completion": "plain"}


def settle(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, forms: list[str]) -> str:
    """Give the tokenizer the one template that all rows will be rendered with, and say where it came from.

    The tokenizer is saved with it, so that the model is served with the template it was trained with.

    Args:
        forms: formats of the sources whose rows are conversations.

    Raises:
        RecipeError: no such template, or none where one is needed, or sources that need different ones, or one that is broken.
    """
    wanted = recipe.get("training.chat_template_path")
    if wanted:
        tokenizer.chat_template, origin = _named(wanted, recipe, tokenizer)
    if tokenizer.chat_template and forms:
        key = "training.chat_template_path" if wanted else "model.pretrained_model_name_or_path"
        _require_readable(tokenizer, recipe.where(key), origin if wanted else "the model's own")
    if wanted:
        return origin
    if tokenizer.chat_template or not forms:
        return "the model's own" if tokenizer.chat_template else "none"
    defaults = {WITHOUT_TEMPLATE.get(form) for form in forms}
    if None in defaults or len(defaults) > 1:
        raise RecipeError(
            f"{recipe.where('model.pretrained_model_name_or_path')}: this tokenizer has no chat template, so it must be said "
            f"how rows in the format {' and '.join(f'`{form}`' for form in dict.fromkeys(forms))} are rendered; set "
            "training.chat_template_path to a .jinja file or to a name: "
            f"{', '.join(shipped())}, or one of TRL's such as llama3"
        )
    default = str(defaults.pop())
    tokenizer.chat_template = _with_bos(_shipped(default), tokenizer)
    return f"`{default}`, for the tokenizer has none"


def _require_readable(tokenizer: PreTrainedTokenizerBase, where: str, origin: str) -> None:
    """A template that cannot be read is told once, and not of every row. What else it stumbles over depends on the row."""
    own = tokenizer.chat_template
    template = own if isinstance(own, str) else own.get("default") or next(iter(own.values()))
    try:
        with bounded(seconds=RENDER_SECONDS, memory=RENDER_BYTES):
            render_jinja_template([[]], chat_template=template)
    except TemplateSyntaxError as error:
        raise RecipeError(
            f"{where}: the chat template ({origin}) cannot be read, line {error.lineno}: {error.message}; mend it, or use another "
            "(training.chat_template_path)"
        ) from None
    except (TooMuch, MemoryError, RecursionError, *RENDER_ERRORS):
        return


def shipped() -> list[str]:
    """Names of the templates that come with this package."""
    folder = files("lora_recipes.data").joinpath("templates")
    return sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".jinja"))


def _named(wanted: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if Path(wanted).is_file():
        try:
            return Path(wanted).read_text(encoding="utf-8"), f"the file {wanted}"
        except UnicodeDecodeError:
            where = recipe.where("training.chat_template_path")
            raise RecipeError(f"{where}: {wanted} is not UTF-8; save it as UTF-8") from None
    if wanted in shipped():
        return _with_bos(_shipped(wanted), tokenizer), f"`{wanted}`"
    theirs = _of_trl()
    if wanted in theirs:
        return theirs[wanted].read_text(encoding="utf-8"), f"TRL's `{wanted}`"
    raise RecipeError(
        f"{recipe.where('training.chat_template_path')}: no such file or template: {wanted}; names: "
        f"{', '.join(shipped())}; TRL's: {', '.join(sorted(theirs))}"
    )


def _shipped(name: str) -> str:
    return files("lora_recipes.data").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")


def _of_trl() -> dict[str, Any]:
    folder = files("trl").joinpath("chat_templates")
    return {Path(item.name).stem: item for item in folder.iterdir() if item.name.endswith(".jinja")}


def _with_bos(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A rendered chat is tokenized without added tokens, so the template opens with BOS where the tokenizer would."""
    adds = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{- bos_token -}}" + template if adds else template
