"""Python runs this file when it starts with this folder on PYTHONPATH: it notes when a training run gets where, and ends it
after its first optimizer step. It imports no library by itself, so that it changes nothing of what it measures.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

MARKS: dict[str, dict[str, float]] = {}


def mark(name: str) -> None:
    """Note the CPU seconds of this process and the time, the first time that it gets here."""
    MARKS.setdefault(name, {"cpu": time.process_time(), "time": time.time()})


def on_trainer(module: ModuleType) -> None:
    """TRL's trainer is imported, and torch, transformers and PEFT before it."""
    mark("libraries")


def on_optimizer(module: ModuleType) -> None:
    """The optimizer that steps is made when model and data are ready; one that only tries settings may come before. The first
    step ends the run."""
    made = module.Optimizer.__init__

    def init(self: Any, *args: Any, **named: Any) -> None:
        made(self, *args, **named)
        MARKS.pop("prepared", None)
        mark("prepared")

    def stepped(*_: Any) -> None:
        mark("first step")
        with Path(os.environ["FIRST_STEP"]).open("w", encoding="utf-8") as stream:
            json.dump(MARKS, stream)
        os._exit(0)

    module.Optimizer.__init__ = init
    module.register_optimizer_step_post_hook(stepped)


WATCHED: dict[str, Callable[[ModuleType], None]] = {
    "trl.trainer.sft_trainer": on_trainer,
    "torch.optim.optimizer": on_optimizer,
}


class Watcher(importlib.abc.MetaPathFinder):
    """Calls back after a watched module was imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in WATCHED:
            return None
        after = WATCHED.pop(name)  # the search below comes by here again
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            after(module)

        loader.exec_module = exec_module
        return spec


if "FIRST_STEP" in os.environ:
    sys.meta_path.insert(0, Watcher())
