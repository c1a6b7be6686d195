"""Optimizers that PEFT makes for adapters: LoRA+ and LoRA-FA, with the recipe's own rates, betas and decay."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora.layer import Embedding, ParamWrapper
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from lora_recipes.errors import RecipeError
from lora_recipes.model.build import freeze_first_matrices
from lora_recipes.recipe import Recipe

# Keys of `training` that no config class owns: arguments of PEFT's two functions, and the name of the second.
OPTIMIZER_KEYS = ("loraplus_lr_ratio", "loraplus_lr_embedding", "lorafa")


@contextmanager
def optimizer_refusals(args: TrainingArguments) -> Iterator[None]:
    """Whatever an optimizer stumbles over while it is made becomes a ValueError that names the keys it is made of."""
    try:
        yield
    except (ValueError, ImportError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
        how = f"`optim: {getattr(args.optim, 'value', args.optim)}`"
        if args.optim_args:
            how += f" and `optim_args: {args.optim_args}`"
        raise ValueError(f"no optimizer can be made of {how}: {error}") from error


def require_optimizer(args: TrainingArguments) -> None:
    """Raises ValueError where an optimizer's package is not installed, or its arguments cannot be read: before the model is."""
    with optimizer_refusals(args):
        Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Sequential(torch.nn.Linear(1, 1)))


def adapter_optimizer(trainer: Trainer, model: PeftModel, settings: Mapping[str, Any]) -> Optimizer:
    """The optimizer that the recipe's own keys ask for."""
    args = trainer.args
    if settings.get("lorafa"):
        config = model.peft_config["default"]
        optimizer = create_lorafa_optimizer(
            model, config.r, config.lora_alpha, lr=args.learning_rate, weight_decay=args.weight_decay
        )
        for group in optimizer.param_groups:  # PEFT takes no betas
            group |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        return optimizer
    optimizer_class, keywords = trainer.get_optimizer_cls_and_kwargs(args, model)
    embedding = settings.get("loraplus_lr_embedding")
    optimizer = create_loraplus_optimizer(
        model,
        optimizer_class,
        loraplus_lr_ratio=settings["loraplus_lr_ratio"],
        loraplus_weight_decay=args.weight_decay,
        **({} if embedding is None else {"loraplus_lr_embedding": embedding}),
        **keywords,
    )
    # torch cannot load the state of more than one empty group where weights are sharded (_optimizer_state of FSDP 2).
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def freeze_what_never_moves(model: PeftModel, recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """LoRA-FA trains B alone. Done before the first count of what is trained; PEFT does it when training begins.

    Raises:
        RecipeError: an adapter that LoRA-FA cannot train: on an embedding (its A starts at zero) or on experts (one A
            of all experts would be projected on as one).
    """
    if not settings.get("lorafa"):
        return
    for name, module in model.named_modules():
        if isinstance(module, (Embedding, ParamWrapper)):
            raise RecipeError(
                f"{recipe.where('training.lorafa')}: LoRA-FA cannot train the adapter of {name}, which is no linear "
                "layer; set lora.target_modules without it, or drop `lorafa`"
            )
    freeze_first_matrices(model)
