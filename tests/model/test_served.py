"""A served model answers what `generate` answers; a server that dies says why."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_recipes.errors import MachineError
from lora_recipes.model import served
from lora_recipes.model.served import served_answers

CONVERSATIONS = [
    [{"role": "user", "content": "two pens please"}],
    [{"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": "three books for Ann"}],
]


def test_without_the_extra_the_install_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(served, "NEEDED", ("no_such_package_at_all",))
    with pytest.raises(MachineError, match=r"pip install 'lora-recipes\[serve\]'"):
        served_answers(tmp_path, CONVERSATIONS, 4)


@pytest.fixture
def extra() -> None:
    for name in served.NEEDED:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'lora-recipes[serve]'")


@pytest.fixture
def talkative(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with weights so large that different questions get different answers."""
    folder = tmp_path / "talkative"
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def test_served_answers_are_the_models_own(extra: None, talkative: Path):
    tokenizer = AutoTokenizer.from_pretrained(talkative)
    model = AutoModelForCausalLM.from_pretrained(talkative).eval()
    expected = []
    for messages in CONVERSATIONS:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = model.generate(ids, max_new_tokens=8, do_sample=False)
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert expected[0] != expected[1]
    assert served_answers(talkative, CONVERSATIONS, 8) == expected


def test_a_server_that_dies_shows_the_end_of_its_log(extra: None, tmp_path: Path):
    with pytest.raises(MachineError, match=r"ended with code 1 before it was ready:(.|\n)*ValueError"):
        served_answers(tmp_path, CONVERSATIONS, 8)
