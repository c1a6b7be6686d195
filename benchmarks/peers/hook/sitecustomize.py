"""Counts every optimizer step of any torch program that starts with this folder on PYTHONPATH and BENCH_TRACE set.

One JSON line a step, appended to the file that BENCH_TRACE names; a process that never steps writes nothing. Counted are:

- computed tokens, where ids enter the embedding, with padding;
- real tokens: those of the rows, each row's own, that are not padding at either end. Where a `Trainer` is handed its batches they
  are counted there, before anybody cuts or joins them, else at the embedding: a program that runs row by row, or batches
  flattened into one row, or what rows share once, is counted by the same rule;
- supervised tokens and their loss, where targets enter `cross_entropy`;
- where neither was seen since the last step (a fused loss, a compiled model): the batch and the loss of `Trainer`.

The clock of a step is read when the optimizer has stepped.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRACE = os.environ.get("BENCH_TRACE", "")
UNKNOWN, END, NEWLINE = (
    0,
    2,
    198,
)  # SmolLM2's ids: <|endoftext|>, <|im_end|> (tools pad with one of the two), a line's end
SMALLEST_VOCABULARY = 10_000
IGNORED = -100


class Counts:
    """What was seen since the last optimizer step."""

    def __init__(self) -> None:
        self.step = 0
        self.dtype = ""
        self.clear()

    def clear(self) -> None:
        self.computed = self.real = self.supervised = 0
        self.handed = 0  # real tokens of the batches that `Trainer` was handed
        self.loss = 0.0  # summed over supervised tokens
        self.batch: dict[str, float] = {}  # the same, as Trainer has it


seen = Counts()


def real_tokens(row: list[int]) -> int:
    """How many ids of a row are not padding. One `<|im_end|>` after a row's text is the row's own, unless it has one."""
    start, stop = 0, len(row)
    while start < stop and row[start] in (UNKNOWN, END):
        start += 1
    while stop > start and row[stop - 1] in (UNKNOWN, END):
        stop -= 1
    closed = row[max(start, stop - 2) : stop] == [END, NEWLINE]
    if stop < len(row) and row[stop] == END and not closed:
        stop += 1
    return stop - start


def real_in(ids: Any) -> int:
    """Of a batch of any shape whose last dimension is a row."""
    return sum(real_tokens(row) for row in ids.reshape(-1, ids.shape[-1]).tolist())


def session_cpu() -> float:
    """CPU seconds of all processes of this session, with those that they waited for."""
    ticks, session = 0, str(os.getsid(0))
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if fields[3] == session:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def stepped(optimizer: Any, args: Any, kwargs: Any) -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # the clock counts what was computed, not what was asked for
    batch = seen.batch
    seen.step += 1
    supervised = seen.supervised or batch.get("supervised", 0)
    loss = seen.loss if seen.supervised else batch.get("loss", 0.0)
    line = {
        "pid": os.getpid(),
        "step": seen.step,
        "time": time.time(),
        "cpu": time.process_time(),
        "session_cpu": session_cpu() if seen.step == 1 else None,
        "peak_mb": peak_mb(),
        "gpu_mb": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_initialized() else None,
        "computed": seen.computed or batch.get("computed", 0),
        "real": seen.handed or seen.real or batch.get("real", 0),
        "supervised": supervised,
        "loss": loss / supervised if supervised else None,
        "dtype": seen.dtype,
        "threads": torch.get_num_threads(),
        "learning_rate": float(optimizer.param_groups[0]["lr"]),
        "trainable": sum(
            weight.numel() for group in optimizer.param_groups for weight in group["params"] if weight.requires_grad
        ),
    }
    with Path(TRACE).open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    if seen.step == 1 and torch.cuda.is_initialized():  # before it ours tries the longest rows of the file
        torch.cuda.reset_peak_memory_stats()
    seen.clear()


def watch_optimizers(module: Any) -> None:
    module.register_optimizer_step_post_hook(stepped)


def watch_embeddings(module: Any) -> None:
    forward = module.Embedding.forward

    def counting(self: Any, ids: Any) -> Any:
        import torch

        out = forward(self, ids)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or self.num_embeddings < SMALLEST_VOCABULARY:
            return out
        kind = out.device.type
        computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else out.dtype
        seen.dtype = str(computed).removeprefix("torch.")
        seen.computed += ids.numel()
        seen.real += real_in(ids)
        return out

    module.Embedding.forward = counting


def watch_losses(module: Any) -> None:
    cross_entropy = module.cross_entropy

    def counting(
        input: Any,
        target: Any,
        weight: Any = None,
        size_average: Any = None,
        ignore_index: int = IGNORED,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Any:
        import torch

        loss = cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or target.is_floating_point():
            return loss
        count = int((target != ignore_index).sum())
        if count:
            seen.supervised += count
            seen.loss += float(loss.detach().float().sum()) * (count if reduction == "mean" else 1)
        return loss

    module.cross_entropy = counting


def watch_trainer(module: Any) -> None:
    training_step = module.Trainer.training_step

    def counting(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        batch = {}
        if "labels" in inputs and "input_ids" in inputs:
            ids = inputs["input_ids"]
            supervised = int((inputs["labels"][..., 1:] != IGNORED).sum())
            batch = {"computed": ids.numel(), "real": real_in(ids), "supervised": supervised}
        loss = training_step(self, model, inputs, num_items_in_batch)
        if batch:  # its tokens' loss over those of the whole step, of which this may be a piece; else their mean
            batch["loss"] = float(loss.detach()) * float(num_items_in_batch or batch["supervised"])
        seen.batch = {key: seen.batch.get(key, 0) + value for key, value in batch.items()}
        return loss

    get_batch_samples = module.Trainer.get_batch_samples

    def handed(self: Any, *given: Any, **named: Any) -> Any:
        found = get_batch_samples(self, *given, **named)
        seen.handed += sum(real_in(batch["input_ids"]) for batch in found[0] if "input_ids" in batch)
        return found

    module.Trainer.training_step = counting
    module.Trainer.get_batch_samples = handed


WATCHED: dict[str, Callable[[Any], None]] = {
    "torch.optim.optimizer": watch_optimizers,
    "torch.nn.modules.sparse": watch_embeddings,
    "torch.nn.functional": watch_losses,
    "transformers.trainer": watch_trainer,
}


class Watcher(importlib.abc.MetaPathFinder):
    """Lets a watched module be found as ever, and changes it once it was executed."""

    looking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in WATCHED or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def executed(module: Any) -> None:
            execute(module)
            WATCHED[name](module)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


if TRACE:
    sys.meta_path.insert(0, Watcher())
