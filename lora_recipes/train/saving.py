"""The Trainer's checkpoints, each whole or not there."""

import shutil
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINING_ARGS_NAME
from trl import SFTTrainer

from lora_recipes.run_dir import RunDir, read_json
from lora_recipes.train.checkpoints import STAGING, publish_checkpoint, retain


class SavingTrainer(SFTTrainer):
    """SFTTrainer that writes a checkpoint aside, on all ranks, and lets rank 0 show it when it is whole.

    Attributes:
        limit: checkpoints that are kept. The Trainer deletes by name and age, whatever lies in the folder, so it is told
            of no limit.
    """

    _aside = False  # while a checkpoint is written

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.limit: int | None = self.args.save_total_limit
        self.args.save_total_limit = None

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return str(Path(folder, STAGING)) if self._aside else folder

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights and tokenizer, without the pickle of all arguments, which nobody could load safely."""
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, main = Path(self.args.output_dir), self.is_world_process_zero()
        if main:
            shutil.rmtree(folder / STAGING, ignore_errors=True)  # of a save that was cut off
        self.accelerator.wait_for_everyone()
        self._aside = True
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(folder / STAGING, ignore_errors=True)
            raise
        finally:
            self._aside = False
        self._name_best(folder)
        self.accelerator.wait_for_everyone()
        if main:
            staging = folder / STAGING / f"checkpoint-{self.state.global_step}"
            self.state.save_to_json(str(staging / "trainer_state.json"))
            manifest = read_json(RunDir(folder.parent).manifest)
            publish_checkpoint(staging, self.state.global_step, manifest, self.args.world_size)
            retain(folder, manifest.get("run"), self.limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _name_best(self, folder: Path) -> None:
        """The best checkpoint by its own place: the Trainer looks for it where this one is being written."""
        step = self.state.best_global_step
        best = folder / f"checkpoint-{step}"
        if step and (step == self.state.global_step or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
