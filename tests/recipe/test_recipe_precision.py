"""fp16 and the type of weights that are all trained."""

from pathlib import Path

import pytest

from lora_recipes.errors import EXIT_USER
from lora_recipes.recipe import load_recipe
from tests.recipe.refusals import refusal


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_full_fine_tuning_of_16_bit_weights_is_refused_in_fp16(tmp_path: Path, dtype: str) -> None:
    words = ["lora=null", "training.fp16=true", f"model.dtype={dtype}"]
    error = refusal(tmp_path, "", *words)
    [problem] = error.problems
    assert problem.key == "training.fp16" and error.exit_code == EXIT_USER
    assert dtype in problem.message and "float32" in problem.hint
    for fine in (words[1:], [words[0], words[2]], [*words[:2], "model.dtype=float32"], words[:2]):
        load_recipe(tmp_path / "r.yaml", fine)
