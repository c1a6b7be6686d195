"""A case of a bad input: its row in the table of promises, what meets it, the exit code, what the message says; and models
that cases share."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_recipes.errors import EXIT_BUG, LoraRecipesError
from lora_recipes.model.build import load_base, load_tokenizer, model_config
from lora_recipes.model.machine import choose
from lora_recipes.model.sound import require_vocabulary
from lora_recipes.model.source import locate
from lora_recipes.model.targets import find_targets
from lora_recipes.recipe import load_recipe
from tests.security.hostile import Maker

Run = Callable[[Maker], Any]
Case = tuple[str, Run, int, str]


def parametrized(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """A test of each case; its id begins with the row, by which the table of promises finds it."""
    named = [pytest.param(*case[1:], id=f"{case[0]}-{number}") for number, case in enumerate(cases)]
    return pytest.mark.parametrize(("run", "code", "said"), named)


def require_outcome(run: Callable[[], Any], code: int, said: str) -> None:
    found, message = _outcome(run)
    assert (found, said in message) == (code, True), f"{found}: {message}"


def _outcome(run: Callable[[], Any]) -> tuple[int, str]:
    try:
        run()
    except LoraRecipesError as error:
        return error.exit_code, str(error)
    except Exception as error:
        return EXIT_BUG, repr(error)
    return 0, ""


def loaded(recipe: Path) -> Any:
    """As training does, up to the adapter."""
    read = load_recipe(recipe)
    source = locate(read)
    require_vocabulary(read, model_config(read, source), load_tokenizer(read, source))
    find_targets(read, model_config(read, source))
    return load_base(read, source, choose(read))


def changed(change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> Callable[[Maker, str], Path]:
    """A model whose tensors are changed."""

    def make(maker: Maker, name: str) -> Path:
        folder = maker.model(name, config)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make
