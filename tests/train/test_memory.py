"""Memory that runs out: found at the beginning, said with the batch and the plan, answered by `--fit`."""

import json
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_recipes.cli import main
from lora_recipes.plan import target_of
from lora_recipes.recipe import load_recipe
from lora_recipes.run_dir import RunDir, read_json, read_jsonl
from lora_recipes.train import launch, probe
from lora_recipes.train.memory import _let_go, smaller_batch
from lora_recipes.train.probe import LongestFirst
from lora_recipes.train.trainer import RecipeTrainer
from tests.train.runs import make_trainer


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, int]]]:
    """A device that holds so many tokens of a micro-batch, from a step on; returns the shapes that it was given."""

    def build(tokens: int, from_step: int = 0) -> list[tuple[int, int]]:
        real = RecipeTrainer.compute_loss
        shapes: list[tuple[int, int]] = []

        def compute_loss(
            self: RecipeTrainer, model: Any, inputs: dict[str, torch.Tensor], *more: Any, **named: Any
        ) -> Any:
            shapes.append(tuple(inputs["input_ids"].shape))
            if inputs["input_ids"].numel() > tokens and self.state.global_step >= from_step:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(self, model, inputs, *more, **named)

        monkeypatch.setattr(RecipeTrainer, "compute_loss", compute_loss)
        return shapes

    return build


def adapter(name: str) -> bytes:
    return (RunDir.of(name).adapter / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def late_long_row(workdir: Path) -> dict[str, Any]:
    """A `dataset` whose one long row comes last."""
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    long = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes no " * 18}]}
    (workdir / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [row] * 60 + [long]))
    return {"data_files": {"train": "rows.jsonl"}, "eval_split": None}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole micro-batches, of which the longest is tried before the first step."""
    monkeypatch.setattr(LongestFirst, "_measures", lambda self: False)
    monkeypatch.setattr(RecipeTrainer, "suits_cpu_loss", lambda self: False)
    monkeypatch.setattr("lora_recipes.train.memory.target_for", lambda recipe: target_of("24GiB", None, None))


@pytest.mark.promise("F10")
def test_what_does_not_fit_fails_before_the_first_step_with_one_message(
    as_on_a_gpu: None,
    write_recipe: Callable[..., Path],
    late_long_row: dict,
    limit: Callable,
    capsys: pytest.CaptureFixture,
):
    limit(200)
    assert launch(str(write_recipe(dataset=late_long_row, training={"max_steps": 1})), []) == 3
    said = capsys.readouterr().err
    assert "out of memory in step 1, on a batch of 4 rows x" in said and "Traceback" not in said
    for way_out in ("per_device_train_batch_size=2", "gradient_accumulation_steps=2", "--fit"):
        assert way_out in said
    status = read_json(RunDir.of("tiny").status)
    assert status["state"] == "failed" and status["exit_code"] == 3


def test_the_probe_changes_nothing_of_the_run(
    as_on_a_gpu: None, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    keys: dict[str, Any] = {"lora": {"lora_dropout": 0.1}}
    assert launch(str(write_recipe("probed", **keys)), []) == 0
    monkeypatch.setattr(LongestFirst, "on_step_begin", lambda *_, **__: None)
    assert launch(str(write_recipe("bare", **keys)), []) == 0
    assert adapter("probed") == adapter("bare")
    assert first_line("probed") == first_line("bare")


def first_line(name: str) -> dict[str, Any]:
    """The metrics of the first step, without times."""
    line = read_jsonl(RunDir.of(name).metrics)[0]
    return {
        key: value
        for key, value in line.items()
        if key != "seconds" and "runtime" not in key and "per_second" not in key
    }


def test_the_probe_takes_the_longest_rows(
    as_on_a_gpu: None, write_recipe: Callable[..., Path], late_long_row: dict, limit: Callable
):
    shapes = limit(10**9)
    assert launch(str(write_recipe(dataset=late_long_row)), []) == 0
    assert shapes[0] == max(shapes, key=lambda shape: shape[1])


@pytest.mark.parametrize(("left", "probed"), [(0, 1), (1 << 50, 0)], ids=["may not fit", "fits"])
def test_on_a_cpu_the_first_step_tells_whether_a_probe_is_needed(
    left: int,
    probed: int,
    write_recipe: Callable[..., Path],
    late_long_row: dict,
    limit: Callable,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(probe, "memory_available", lambda: left)
    shapes = limit(10**9)
    assert launch(str(write_recipe(dataset=late_long_row)), []) == 0
    assert len(shapes) == 3 + probed
    assert (shapes[1][1] > 2 * shapes[0][1]) == bool(probed)


@pytest.mark.promise("F10")
def test_on_a_cpu_what_does_not_fit_fails_before_the_second_step(
    write_recipe: Callable[..., Path],
    late_long_row: dict,
    limit: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.setattr(probe, "memory_available", lambda: 0)
    limit(100)
    assert launch(str(write_recipe(dataset=late_long_row)), []) == 3
    assert "out of memory in step 2, on a batch of 1 row x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch", "trained", "left", "surely"),
    [
        ((8, 100), (8, 100), 0, True),
        ((8, 80), (8, 100), 0, True),
        ((4, 100), (8, 100), 0, True),
        ((8, 200), (8, 100), 300, True),  # 4 x the peak of 100: 300 more
        ((8, 200), (8, 100), 299, False),
        ((8, 100), (4, 100), 99, False),
        ((8, 60), (4, 100), 19, False),  # twice the rows, each shorter
    ],
)
def test_what_surely_fits(
    batch: tuple[int, int], trained: tuple[int, int], left: int, surely: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(probe, "memory_available", lambda: left)
    monkeypatch.setattr(probe, "peak_rss_bytes", lambda: 100)
    assert probe.fits(batch, trained) == surely


@pytest.mark.promise("F10")
@pytest.mark.parametrize("from_step", [0, 3], ids=["at the first step", "after a checkpoint"])
def test_fit_halves_the_micro_batch_and_keeps_the_rows_of_a_step(
    as_on_a_gpu: None, write_recipe: Callable[..., Path], limit: Callable, from_step: int, capsys: pytest.CaptureFixture
):
    keys = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    small = write_recipe("small", training=keys | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    assert launch(str(small), []) == 0
    limit(350, from_step)
    path = write_recipe("fitted", training=keys)
    assert launch(str(path), [], fit=True) == 0
    said = capsys.readouterr().err
    assert "--fit: 2 rows at a time x 2 accumulation, 4 rows a step as before" in said
    assert ("from the last checkpoint" in said) == bool(from_step)
    status = read_json(RunDir.of("fitted").status)
    assert status["state"] == "complete" and status["step"] == 5
    assert status["fitted"] == {"training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 2}
    if not from_step:
        assert adapter("fitted") == adapter("small")
    assert launch(str(path), []) == 0  # complete, under the recipe as it is written


def test_fit_gives_up_at_one_row(
    as_on_a_gpu: None, write_recipe: Callable[..., Path], limit: Callable, capsys: pytest.CaptureFixture
):
    limit(10)
    assert launch(str(write_recipe()), [], fit=True) == 3
    assert capsys.readouterr().err.count("--fit: ") == 2  # 4 rows, 2 rows, 1 row


def test_fit_is_for_one_process(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch(str(write_recipe()), [], fit=True) == 2
    assert "--fit works in one process only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "accumulation", "smaller"),
    [(4, 4, (2, 8)), (8, 1, (4, 2)), (6, 1, (3, 2)), (5, 1, (1, 5)), (1, 16, None)],
)
def test_the_rows_of_a_step_stay_exactly_the_same(
    write_recipe: Callable[..., Path], device: int, accumulation: int, smaller: tuple[int, int] | None
):
    keys = {"per_device_train_batch_size": device, "gradient_accumulation_steps": accumulation}
    assert smaller_batch(load_recipe(write_recipe(training=keys))) == smaller


def test_fit_belongs_to_train(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    assert main(["check", str(write_recipe()), "--fit"]) == 2
    assert "`--fit` belongs to `train`" in capsys.readouterr().err


def test_the_probe_is_computed_within_what_a_step_is_computed_in(
    as_on_a_gpu: None, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    """TRL moves activations to the CPU within a context; that there is one is enough here."""
    trainer = make_trainer(write_recipe())
    batch = next(iter(trainer.get_train_dataloader()))
    entered: list[bool] = [False]
    computed: list[tuple[str, bool]] = []

    @contextmanager
    def offloading() -> Iterator[None]:
        entered[0] = True
        yield
        entered[0] = False

    def watched(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*more: Any, **named: Any) -> Any:
            computed.append((name, entered[0]))
            return real(*more, **named)

        monkeypatch.setattr(owner, name, call)

    watched(trainer, "compute_loss")
    watched(trainer.accelerator, "backward")
    trainer.maybe_activation_offload_context = offloading()
    LongestFirst(trainer, None)._run(dict(batch))
    of_probe = computed[:]
    computed.clear()
    trainer.maybe_activation_offload_context = offloading()
    trainer.training_step(trainer.model, dict(batch), torch.tensor(1))
    assert of_probe == computed == [("compute_loss", True), ("backward", True)]


def test_paged_optimizer_states_of_a_failed_try_are_let_go_of(monkeypatch: pytest.MonkeyPatch):
    from bitsandbytes.functional import GlobalPageManager

    state = torch.zeros(4)
    GlobalPageManager.get_instance().paged_tensors.append(state)  # as `get_state_buffer` does on a GPU
    there = weakref.ref(state)
    del state
    _let_go()
    assert there() is None
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # a run that goes without it
    _let_go()
