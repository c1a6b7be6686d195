"""Bad adapters: each ends with the right exit code and a message that names what is wrong."""

import math
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lora_recipes.errors import EXIT_REFUSED, EXIT_USER
from lora_recipes.model.adapted import attach_adapter, check_adapter, require_change
from lora_recipes.model.adapters import combine
from lora_recipes.model.build import meta_model, model_config
from lora_recipes.model.identity import base_of, require_base, write_provenance
from lora_recipes.model.source import locate
from lora_recipes.model.targets import find_targets
from lora_recipes.recipe import load_recipe
from tests.security.bad_inputs import Case, Run, changed, loaded, parametrized, require_outcome
from tests.security.hostile import KEY, Maker


def adapter(rank: int = 4, **values: Any) -> Run:
    return lambda maker: check_adapter(maker.adapter("a", rank, **values))


def _other_base(maker: Maker) -> None:
    """The same shape, another weight."""
    own, other = (
        load_recipe(maker.recipe("a", maker.model("own"))),
        load_recipe(
            maker.recipe("b", changed(lambda tensors: tensors["model.norm.weight"].fill_(2.0))(maker, "other"))
        ),
    )
    folder = maker.adapter("of-own")
    write_provenance(folder, base_of(own, locate(own)))
    assert require_base(folder, base_of(own, locate(own)), force=False) is None
    require_base(folder, base_of(other, locate(other)), force=False)


def _attached(change: Callable[[dict[str, torch.Tensor]], Any], **values: Any) -> Run:
    def run(maker: Maker) -> None:
        folder = maker.adapter("a", **values)
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        attach_adapter(loaded(maker.recipe("r", maker.model("m"))), folder)

    return run


def _attaching(**values: Any) -> Run:
    return lambda maker: attach_adapter(loaded(maker.recipe("r", maker.model("m"))), maker.adapter("a", **values))


def combining(change: Callable[[dict[str, torch.Tensor]], Any] | None = None, **values: Any) -> Run:
    """Another's adapter and one's own."""

    def run(maker: Maker) -> None:
        folder, read = maker.adapter("evil", **values), load_recipe(maker.recipe("r"))
        tensors = load_file(folder / "adapter_model.safetensors")
        if change is not None:
            change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        parts = {"evil": (folder, 0.5), "own": (maker.adapter("own", layers_to_transform=[0]), 0.5)}
        combine(meta_model(model_config(read, locate(read)), read), parts, "svd", maker.folder / "combined")

    return run


def _of(kind: torch.dtype) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({KEY.format("A"): torch.ones(4, 64).to(kind)})


def targeting(lora: dict[str, Any]) -> Run:
    def run(maker: Maker) -> None:
        read = load_recipe(maker.recipe("r", lora=lora))
        find_targets(read, model_config(read, locate(read)))

    return run


def _renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY.format("A").replace("q_proj", "x_proj")] = tensors.pop(KEY.format("A"))


def _untrained(maker: Maker) -> None:
    folder = maker.adapter("a")
    save_file(
        {KEY.format("A"): torch.ones(4, 64), KEY.format("B"): torch.zeros(64, 4)}, folder / "adapter_model.safetensors"
    )
    require_change(folder)


ADAPTERS: list[Case] = [
    ("A1", _other_base, EXIT_REFUSED, "--force"),
    ("A2", adapter(rank=8), EXIT_REFUSED, "rank 8, its config says r = 4"),
    (
        "A2",
        _attached(lambda t: t.update({KEY.format("A"): torch.ones(4, 63)})),
        EXIT_REFUSED,
        "not an adapter of this model",
    ),
    ("A3", _attached(lambda t: t.pop(KEY.format("B"))), EXIT_REFUSED, "keys are missing"),
    ("A3", _attached(_renamed), EXIT_REFUSED, "x_proj"),
    ("A4", adapter(peft_version="99.0", new=1), EXIT_USER, "upgrade PEFT"),
    ("A4", adapter(peft_type="EVIL"), EXIT_USER, "`peft_type` is 'EVIL'"),
    ("A4", adapter(unknown=1), EXIT_REFUSED, "is no field of peft.LoraConfig"),
    ("A5", lambda maker: loaded(maker.recipe("r", lora={"target_modules": ["nothing"]})), EXIT_USER, "q_proj"),
    ("A5", targeting({"target_modules": "((("}), EXIT_USER, "is no pattern"),
    ("A5", targeting({"target_modules": "(.+)+!"}), EXIT_USER, "takes more than"),
    ("A5", targeting({"rank_pattern": {"(.+)+!": 4}}), EXIT_USER, "takes more than"),
    ("A5", targeting({"trainable_token_indices": [10**11]}), EXIT_USER, "the model has embeddings of 0 to"),
    ("A4", adapter(peft_version="9" * 5000, new=1), EXIT_USER, "upgrade PEFT"),
    ("A4", adapter(task_type="EVIL"), EXIT_REFUSED, "`task_type` is 'EVIL'"),
    ("A4", adapter(task_type="SEQ_CLS"), EXIT_REFUSED, "recipes train CAUSAL_LM"),
    ("A4", adapter(layer_replication=[[0, math.nan]]), EXIT_REFUSED, "`layer_replication`"),
    ("A4", adapter(layer_replication=[[5, 0]]), EXIT_REFUSED, "`layer_replication`"),
    ("A4", adapter(modules_to_save=5), EXIT_REFUSED, "`modules_to_save` is 5"),
    ("A4", adapter(target_modules=5), EXIT_REFUSED, "`target_modules` is 5"),
    ("A4", adapter(exclude_modules=5), EXIT_REFUSED, "`exclude_modules` is 5"),
    ("A4", adapter(init_lora_weights="evil"), EXIT_REFUSED, "`init_lora_weights` is 'evil'"),
    ("A4", adapter(layers_to_transform="x"), EXIT_REFUSED, "`layers_to_transform` is 'x'"),
    ("A3", _attaching(modules_to_save=["lm_head"]), EXIT_REFUSED, "not an adapter of this model"),
    ("A2", _attaching(rank_pattern={"q_proj": 8}), EXIT_REFUSED, "size mismatch"),
    ("A4", _attaching(trainable_token_indices=[10**12]), EXIT_REFUSED, "not an adapter of this model"),
    ("A4", _attaching(layers_pattern=["((("]), EXIT_REFUSED, "not an adapter of this model"),
    ("A4", _attaching(arrow_config={"x": 1}), EXIT_REFUSED, "adapter"),
    ("A4", adapter(lora_alpha=10**400), EXIT_REFUSED, "`'lora_alpha'` is 1000"),
    ("A4", adapter(alpha_pattern=5), EXIT_REFUSED, "`alpha_pattern` is 5"),
    ("A4", adapter(rank_pattern=[4]), EXIT_REFUSED, "`rank_pattern` is [4]"),
    ("A4", adapter(rank_pattern={}, alpha_pattern=None), 0, ""),
    ("A2", _attached(_of(torch.int8)), EXIT_REFUSED, "is of type I8, and an adapter holds floats"),
    ("A2", _attached(_of(torch.bool)), EXIT_REFUSED, "is of type BOOL"),
    ("A2", _attached(_of(torch.complex64)), EXIT_REFUSED, "is of type C64"),
    ("A2", _attached(_of(torch.float8_e4m3fn)), EXIT_REFUSED, "is of type F8_E4M3"),
    ("A2", _attached(_of(torch.bfloat16), layers_to_transform=[0]), 0, ""),
    ("A2", _attached(_of(torch.float64), layers_to_transform=[0]), 0, ""),
    ("A2", combining(lambda t: t.update({KEY.format("A"): torch.ones(())})), EXIT_REFUSED, "the shape [], no matrix"),
    ("A2", combining(lambda t: t.update({KEY.format("B"): torch.ones(64, 5)})), EXIT_REFUSED, "not an adapter of"),
    ("A4", combining(layers_to_transform=[0]), 0, ""),
    ("A4", combining(target_modules=[]), EXIT_REFUSED, "not an adapter of this model"),
    ("A4", combining(target_modules=""), EXIT_REFUSED, "not an adapter of this model"),
    ("A4", combining(target_modules=[""]), EXIT_REFUSED, "not an adapter of this model"),
    ("A4", combining(target_modules=["nope"]), EXIT_REFUSED, "not an adapter of this model"),
    ("A4", combining(exclude_modules=".*"), EXIT_REFUSED, "not an adapter of this model"),
    ("A4", combining(rank_pattern=[]), EXIT_REFUSED, "`rank_pattern` is []"),
    ("A4", combining(init_lora_weights="loftq"), EXIT_REFUSED, "adapter"),
    ("A6", _attached(lambda t: t[KEY.format("A")].fill_(float("nan"))), EXIT_REFUSED, "NaN"),
    ("A6", _untrained, EXIT_REFUSED, "changes nothing"),
]


@parametrized(ADAPTERS)
def test_a_bad_adapter_ends_with_its_code_and_says_what_is_wrong(maker: Maker, run: Run, code: int, said: str):
    require_outcome(lambda: run(maker), code, said)
