"""One `SFTTrainer` out of the recipe's sections, and the steps and loss that suit a CPU."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, get_scheduler, set_seed
from trl import SFTConfig

from lora_recipes.data.find import place_of
from lora_recipes.data.load import LoadedData
from lora_recipes.data.masks import IGNORED
from lora_recipes.errors import RecipeError
from lora_recipes.model.attention import attending, takes_rows
from lora_recipes.model.build import refusals_of
from lora_recipes.model.fused import computing, fused
from lora_recipes.model.initialise import (
    EVA_BATCHES,
    begin,
    go_on,
    needs_whole_weights,
    require_float32,
    require_matrices,
    starting_config,
)
from lora_recipes.model.loss import ends_at_head, given_only, head_loss, token_loss
from lora_recipes.model.machine import Choice, Choices
from lora_recipes.model.pieces import (
    COMPILE_KEYS,
    most_together,
    pieces,
    takes_flat,
    takes_functions,
    takes_own_loss,
    takes_pieces,
)
from lora_recipes.model.precision import cast_frozen
from lora_recipes.plan.architecture import layers_of
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir
from lora_recipes.train.guards import GuardedTrainer
from lora_recipes.train.optimizers import (
    OPTIMIZER_KEYS,
    adapter_optimizer,
    freeze_what_never_moves,
    optimizer_refusals,
    require_optimizer,
)

# Read by lora_recipes.data and lora_recipes.model.build, which hand SFTTrainer finished tokens and labels.
CONSUMED = ("assistant_only_loss", "completion_only_loss", "dataset_text_field", "chat_template_path")
HALF = (torch.float16, torch.bfloat16)


class RecipeTrainer(GuardedTrainer):
    """SFTTrainer, with steps that on a CPU compute no padding and score no masked position, and PEFT's optimizers.

    Attributes:
        batch_shape: of what was computed last: a micro-batch, or a piece of one.
        optimizer_settings: the recipe's own keys for LoRA+ or LoRA-FA.
        recipe: that is trained.
        together: on a CPU: tokens of a piece of rows end to end, where the model takes that.
        ends_at_head: on a CPU: the model's logits are its head's, so that the head can compute the loss at once.
        fused: on a CPU: layers that functions of our own compute.
    """

    recipe: Recipe
    together: int = 0
    ends_at_head: bool = False
    fused: Mapping[torch.nn.Module, Callable[..., torch.Tensor]] = {}
    batch_shape: tuple[int, ...] | None = None
    optimizer_settings: Mapping[str, Any] = {}
    _pieces = 1  # of the micro-batch, that are still to come
    _seen: torch.Tensor | int = 0  # of its pieces so far: correct predictions, scored tokens, tokens

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """PEFT's optimizer where the recipe asks for LoRA+ or LoRA-FA, else the Trainer's."""
        with refusals_of(self.recipe, "training"), optimizer_refusals(self.args):
            if not self.optimizer_settings:
                return super().create_optimizer(model)
            self.optimizer: Optimizer = adapter_optimizer(
                self, self.accelerator.unwrap_model(self.model), self.optimizer_settings
            )
            return self.optimizer

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.batch_shape = tuple(inputs["input_ids"].shape)
        return super()._prepare_inputs(inputs)

    def largest_piece(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Of what `training_step` makes of a micro-batch, the piece that takes most memory: all of it, unless on a CPU."""
        if not self.cuts():
            return inputs
        return max(self._cut(inputs), key=lambda piece: piece["input_ids"].numel())

    def training_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The Trainer's step; on a CPU once for each piece of the micro-batch, whose gradients add up to the same."""
        if num_items_in_batch is None or not self.cuts():
            return super().training_step(model, inputs, num_items_in_batch)
        cut = self._cut(inputs)
        self._pieces, self._seen = len(cut), 0
        losses = []
        with self.computing():
            for number, piece in enumerate(cut, start=1):
                # Gradients of other ranks are waited for once a micro-batch.
                with nullcontext() if number == len(cut) else self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, piece, num_items_in_batch))
        return torch.stack(losses).sum()

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """TRL's evaluation of a micro-batch; on a CPU the same in pieces, where nothing but the loss is asked for."""
        if not prediction_loss_only or not self.cuts():
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self.heed_stop()
        cut = self._cut(self._prepare_inputs(inputs))
        divisor = max(1, sum(int(_scored(piece["labels"]).sum()) for piece in cut))
        self._pieces, self._seen = len(cut), 0
        losses = []
        with torch.no_grad(), self.compute_loss_context_manager(), self.computing():
            for piece in cut:
                self.batch_shape = tuple(piece["input_ids"].shape)
                losses.append(self._own_loss(model, piece, divisor))
        return torch.stack(losses).sum(), None, None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's loss value. On a CPU through the model's own head at the trained positions only.

        TRL's fused head scores every position where there is no Triton, masked or not, and computes it twice.
        """
        if return_outputs or not self.suits_cpu_loss():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        count = _scored(inputs["labels"]).sum() if num_items_in_batch is None else num_items_in_batch
        divisor = max(1.0, float(count))
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            divisor /= self.accelerator.num_processes  # it counts the tokens of all ranks; DDP averages over ranks
        return self._own_loss(model, inputs, divisor)

    def _own_loss(self, model: Any, inputs: dict[str, torch.Tensor], divisor: float) -> torch.Tensor:
        """The sum of all trained tokens' losses, over the divisor."""
        scored = _scored(inputs["labels"])
        targets = inputs["labels"][:, 1:][scored]
        # Rows are padded on the right, where no real token of a causal model looks: no attention mask is needed.
        forwarded: dict[str, Any] = {key: inputs[key] for key in ("input_ids", "position_ids") if key in inputs}
        if "rows" in inputs:  # whose memory goes with the graph: the piece itself is kept until the optimizer steps
            forwarded["rows"] = replace(inputs["rows"])
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        dft = self.args.loss_type == "dft"
        if self.ends_at_head:
            found: list[torch.Tensor] = []  # the loss; for each token whether it was predicted

            def loss_of(hidden: torch.Tensor) -> torch.Tensor:
                found.extend(head_loss(head, hidden[:, :-1][scored], targets, divisor, dft=dft))
                return found[0]

            with computing({head: loss_of}):
                loss = model(**forwarded, use_cache=False).logits
            correct = found[1]
        else:
            with given_only(head, lambda hidden: hidden[:, :-1][scored]):
                logits = model(**forwarded, use_cache=False).logits  # [trained tokens, vocabulary]
            loss, correct = token_loss(logits, targets, divisor, dft=dft)
        self._count(model.training, inputs, correct)
        return loss

    @contextmanager
    def computing(self) -> Iterator[None]:
        """In which pieces are computed, forward and backward."""
        flat = attending(self.accelerator.unwrap_model(self.model)) if self.together else nullcontext()
        with flat, computing(self.fused):
            yield

    def _cut(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        return pieces(inputs, self.together)

    def cuts(self) -> bool:
        """Whether micro-batches are computed in pieces."""
        return self.suits_cpu_loss() and takes_pieces(vars(self.args), self.model.config)

    def suits_cpu_loss(self) -> bool:
        """Whether the loss is that of `model.loss`."""
        return self.args.device.type == "cpu" and takes_own_loss(vars(self.args), self.model.config)

    def _count(self, training: bool, inputs: dict[str, torch.Tensor], correct: torch.Tensor) -> None:
        """The metrics that TRL logs, once a micro-batch, summed over its pieces and over ranks as TRL does."""
        mode = "train" if training else "eval"
        if "tokens" in inputs:  # of a piece
            tokens = inputs["tokens"]
        else:
            tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        self._seen = self._seen + torch.stack([correct.sum(), *map(torch.as_tensor, (correct.numel(), tokens))])
        self._pieces -= 1
        if self._pieces > 0:
            return
        sums = self.accelerator.reduce(self._seen)
        self._pieces, self._seen = 1, 0
        self._metrics[mode]["mean_token_accuracy"].append((sums[0] / sums[1].clamp(min=1)).item())
        if training:
            self._total_train_tokens += int(sums[2])
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card names a local base as `[None](https://huggingface.co/None)`; better no card than a wrong one."""


def build_trainer(
    recipe: Recipe,
    args: SFTConfig,
    choices: Choices,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: LoadedData,
    callbacks: list[TrainerCallback],
    last: Path | None = None,
) -> RecipeTrainer:
    """The trainer of a recipe. SFTTrainer seeds before it makes the adapter's weights, so a seed repeats a run.

    Args:
        last: the checkpoint that will be resumed from.

    Raises:
        RecipeError: SFTTrainer refuses a setting (a tracker that is not installed, a combination that it excludes), or
            the adapter's first weights cannot be computed.
    """
    section = recipe.section("lora")
    require_float32(recipe, model)
    with refusals_of(recipe, "training"):
        trainer = RecipeTrainer(
            model=model,
            args=args,
            train_dataset=data.train(),
            eval_dataset=data.heldout(),
            processing_class=tokenizer,
            peft_config=starting_config(section, last) if section else None,
            callbacks=callbacks,
        )
    trainer.recipe = recipe
    trainer.name_row = lambda ids: place_of(data, ids) or f"one that begins {tokenizer.decode(ids[:16])!r}"
    _keep_adapter_precision(trainer, recipe, choices)
    if needs_whole_weights(section):
        require_matrices(trainer.model, recipe)
        if last is None:
            looks = section["init_lora_weights"] == "eva"
            begin(trainer.model, recipe, choices, _training_batches(trainer, EVA_BATCHES) if looks else [])
        else:
            go_on(trainer.model, recipe, last)
        set_seed(args.seed)  # from here on a run that begins and one that goes on draw the same numbers
    if trainer.args.bf16 and trainer.args.device.type == "cpu" and cast_frozen(trainer.model):
        choices.made.append(Choice("frozen weights", "bf16", "autocast would cast them anew in every forward"))
    if trainer.args.device.type == "cpu" and any(choices.training.get(key) for key in COMPILE_KEYS):
        _compile_layers(trainer.model, choices)
    _suit_cpu(trainer, section, choices)
    trainer.optimizer_settings = {key: choices.training[key] for key in OPTIMIZER_KEYS if choices.training.get(key)}
    freeze_what_never_moves(trainer.model, recipe, trainer.optimizer_settings)
    return trainer


def _suit_cpu(trainer: RecipeTrainer, lora: Mapping[str, Any], choices: Choices) -> None:
    """Find out what this model lets a CPU compute otherwise than by the model's own code."""
    autocast = _computes_in(trainer.args)
    if trainer.suits_cpu_loss():
        trainer.ends_at_head = ends_at_head(trainer.model, autocast)
    if trainer.cuts() and takes_functions(choices.training):
        trainer.fused = fused(trainer.model)
    if trainer.cuts() and takes_flat(choices.training, lora):
        if takes_rows(trainer.model, autocast):
            trainer.together = most_together(autocast)
        else:
            choices.made.append(Choice("rows", "one after the other", "this model's layers take none end to end"))


def _computes_in(args: SFTConfig) -> torch.dtype | None:
    """The type of autocast; None where there is none."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else None


def _scored(labels: torch.Tensor) -> torch.Tensor:
    """[rows, tokens] -> [rows, tokens - 1]: which positions predict a trained token; position p predicts token p + 1."""
    return labels[:, 1:] != IGNORED


def _training_batches(trainer: RecipeTrainer, count: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of the recipe's own training rows, drawn by its seed; a stream's first ones, which it has shuffled."""
    rows, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    if hasattr(rows, "__len__"):
        drawn = numpy.random.default_rng(trainer.args.seed).permutation(len(rows))[: count * size]
        chosen = [rows[int(index)] for index in drawn]
    else:
        chosen = list(islice(iter(rows), count * size))
    return [trainer.data_collator(chosen[first : first + size]) for first in range(0, len(chosen), size)]


def training_arguments(section: dict[str, Any], run_dir: RunDir) -> SFTConfig:
    """The `training` section as trl.SFTConfig, without the few keys that others have read or will read."""
    taken = (*CONSUMED, *OPTIMIZER_KEYS, *(COMPILE_KEYS if section.get("use_cpu") else ()))
    values = {key: value for key, value in section.items() if key not in taken}
    values["logging_nan_inf_filter"] = False  # it would log an average in place of a loss that is not finite
    if not values.get("packing"):  # rows come tokenized, masked and cut: nothing is left for SFTTrainer to prepare
        values["dataset_kwargs"] = {"skip_prepare_dataset": True}
    args = SFTConfig(output_dir=str(run_dir.checkpoints), **values)
    if (
        args.n_gpu > 1
    ):  # one process that sees several cards would copy the model to all of them, which SFTTrainer refuses
        args._n_gpu = 1
    # What a schedule does not take would be found out only when the model is there.
    nothing = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    try:
        get_scheduler(args.lr_scheduler_type, nothing, 1, 10**6, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except TypeError as error:
        raise ValueError(f"lr_scheduler_kwargs: {error}") from error
    require_optimizer(args)
    _require_compiler(section)
    return args


def _require_compiler(section: dict[str, Any]) -> None:
    """Raises ValueError where torch knows no such backend or mode. Nothing is compiled before the first call."""
    if not any(section.get(key) for key in COMPILE_KEYS):
        return
    try:
        torch.compile(torch.nn.Identity(), **_compile_keywords(section))
    except RuntimeError as error:
        raise ValueError(f"torch_compile: {error}") from error


def _compile_keywords(section: Mapping[str, Any]) -> dict[str, str]:
    """What `torch_compile_backend` and `torch_compile_mode` say; the Trainer too takes a backend's name in any case."""
    backend, mode = section.get("torch_compile_backend"), section.get("torch_compile_mode")
    return ({"backend": backend.lower()} if backend else {}) | ({"mode": mode} if mode else {})


def _compile_layers(model: torch.nn.Module, choices: Choices) -> None:
    """Compile each decoder layer by itself, for rows of any length.

    The Trainer would compile the whole step: minutes on a CPU, and the head's hook of one step would be taken for that of
    all others, since compiled code does not look at hooks again.
    """
    for layer in layers_of(model):
        layer.compile(dynamic=True, **_compile_keywords(choices.training))
    why = "compiling a whole step takes minutes"
    if choices.device == "cpu":
        why += "; a CPU may be faster without torch_compile (docs/performance.md, Growth)"
    choices.made.append(Choice("torch_compile", "each decoder layer by itself", why))


def _keep_adapter_precision(trainer: RecipeTrainer, recipe: Recipe, choices: Choices) -> None:
    """Where training is not in bf16 an adapter is float32.

    SFTTrainer casts the adapters of a quantized base to bf16 whatever the training dtype, which only loses bits. And what
    PEFT copies out of a 16-bit base (`modules_to_save`), or trains in place (`bias`), has 16-bit gradients, which fp16's
    gradient scaler cannot unscale; DeepSpeed has a scaler of its own.

    Raises:
        RecipeError: fp16 of a whole model that is 16 bits on disk: it would take twice the memory that was asked for.
    """
    args, quantized = trainer.args, getattr(trainer.model, "is_quantized", False)
    scaled = args.fp16 and args.deepspeed_plugin is None
    if args.bf16 or not (quantized or scaled):
        return
    short = [one for one in trainer.model.parameters() if one.requires_grad and one.dtype in HALF]
    if not short:
        return
    found = str(short[0].dtype).removeprefix("torch.")
    if scaled and not recipe.get("lora"):
        raise RecipeError(
            f"{recipe.where('training.fp16')}: fp16's gradient scaler needs trained weights in float32, and those of this model "
            f"are {found}; set model.dtype=float32, or extend base/lora.yaml"
        )
    for parameter in short:
        parameter.data = parameter.data.float()
    choices.made.append(Choice("adapter dtype", f"float32 instead of {found}", "training is not in bf16"))
