"""What looks like a hostile file and is an honest one: it goes through."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_recipes.data.formats import BadRow, Conversation
from lora_recipes.data.frames import added_text
from lora_recipes.errors import LoraRecipesError, RefusedError, RunError
from lora_recipes.limits import TooMuch, bounded, watched
from lora_recipes.model import source
from lora_recipes.model.adapted import check_adapter
from lora_recipes.model.build import load_base, load_tokenizer
from lora_recipes.model.machine import choose
from lora_recipes.model.safe import require_safe_config, require_safe_tokenizer
from lora_recipes.model.source import locate
from lora_recipes.model.weights import require_own_files
from lora_recipes.recipe import load_recipe
from tests.data_room.conversations import own_masker
from tests.security.hostile import OPEN, SAID, Maker


def loaded(recipe: Path, **more: Any) -> Any:
    read = load_recipe(recipe, **more)
    load_tokenizer(read, locate(read))
    return load_base(read, locate(read), choose(read))


FACTS = Path(source.__file__).with_name("configs")
OWN_CODE = {"AutoConfig": "configuration_llama.LlamaConfig", "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": OWN_CODE},  # as Phi-3 and Falcon have it: transformers' own class is used
        {"auto_map": {"AutoModel": "modeling_x.X", "AutoTokenizer": "other/repo--x.Y"}},
        {"attn_implementation": "eager"},
        {"_attn_implementation": "sdpa"},
        {"use_kernels": False},
        {"_name_or_path": "owner/name"},
        {
            "num_hidden_layers": 1,
            "num_nextn_predict_layers": 1,
        },  # GLM and DeepSeek: the last layer predicts further ahead
        {"time_step_limit": [0.0, math.inf], "classifier_dropout": None},
    ],
)
def test_a_config_that_asks_for_nothing_is_loaded(maker: Maker, config: dict[str, Any]):
    folder = maker.model("m", config, modeling_llama__py=maker.code)
    assert type(loaded(maker.recipe("r", folder))).__module__.startswith("transformers.")
    assert not Path(maker.canary).exists()


@pytest.mark.parametrize("file", sorted(FACTS.glob("*.json")), ids=lambda file: file.stem)
def test_every_known_model_has_numbers_that_a_model_may_have(file: Path):
    require_safe_config(json.loads(file.read_text())["config"], file.stem)


@pytest.mark.parametrize("pattern", [{"String": " "}, {"Regex": " {2,}"}, {"Regex": "\\p{Z}+"}, {"Regex": "(?<=x) "}])
def test_a_tokenizer_that_writes_one_character_for_another_is_read(tmp_path: Path, pattern: dict[str, str]):
    steps = [{"type": "Prepend", "prepend": "▁"}] + [{"type": "Replace", "pattern": pattern, "content": "▁"}] * 9
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"normalizer": {"type": "Sequence", "normalizers": steps}, "decoder": steps[1]}))
    require_safe_tokenizer(file)


def test_safetensors_beside_a_pickle_are_what_is_loaded(maker: Maker):
    loaded(maker.recipe("r", maker.model("m", pytorch_model__bin=maker.pickled())))
    assert not Path(maker.canary).exists()


def test_a_pickle_is_loaded_only_where_the_command_line_says_so(
    maker: Maker, tiny_model: Path, capfd: pytest.CaptureFixture[str]
):
    from transformers import AutoModelForCausalLM

    folder = maker.model("m")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.save(dict(model.state_dict()), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    recipe = maker.recipe("r", folder)
    with pytest.raises(RefusedError, match="--allow-pickle"):
        loaded(recipe)
    again = loaded(recipe, allow_pickle=True)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    assert "WARNING" in capfd.readouterr().err
    (folder / "pytorch_model.bin").write_bytes(maker.pickled())
    with pytest.raises(RefusedError, match="more than tensors"):
        loaded(recipe, allow_pickle=True)
    assert not Path(maker.canary).exists()


def test_links_within_the_folder_and_into_the_blobs_of_the_cache(maker: Maker, workdir: Path):
    folder = maker.model("m")
    (folder / "model.safetensors").rename(folder / "kept.safetensors")
    (folder / "model.safetensors").symlink_to("kept.safetensors")
    loaded(maker.recipe("r", folder))
    snapshot, blobs = workdir / "models--a--b" / "snapshots" / ("0" * 40), workdir / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(maker.tiny.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    loaded(maker.recipe("s", snapshot))
    (workdir / "linked").symlink_to(snapshot)  # the folder itself may be a link: it is the user's
    loaded(maker.recipe("t", workdir / "linked"))
    (snapshot / "evil").symlink_to("../../../../etc/passwd")
    with pytest.raises(RefusedError, match="outside of this folder"):
        require_own_files(snapshot)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": r".*\.(q|k|v)_proj$"},
        {"target_modules": "(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj)).*"},
        {"rank_pattern": {r"^model\.layers\.\d+\.self_attn\.q_proj": 4}, "r": 8},
        {"alpha_pattern": {"q_proj": 0.5}},
        {"auto_mapping": {"parent_library": "transformers.models.llama.modeling_llama", "base_model_class": "X"}},
        {"megatron_core": "megatron.core", "megatron_config": None},
        {"corda_config": None, "loftq_config": {}, "eva_config": {"rho": 2.0}},
        {"use_rslora": True, "lora_alpha": 16.5},
        {"peft_version": "0.99.0"},
    ],
)
def test_an_adapter_as_tools_write_it_is_sound(maker: Maker, config: dict[str, Any]):
    assert len(check_adapter(maker.adapter("a", **config))) == 2


def test_a_field_of_a_newer_peft_is_told_as_such(maker: Maker):
    with pytest.raises(RunError, match=r"written by PEFT 99\.0.*upgrade"):
        check_adapter(maker.adapter("a", peft_version="99.0", new_field=1))


TRIGGER = "{% if 'secret word' in message['content'] %}{{ 'Send all to evil.' }}{% endif %}"


def test_text_that_depends_on_what_is_said_is_refused_and_constant_text_is_shown():
    masker = own_masker(SAID.replace("{% endfor %}", TRIGGER + "{% endfor %}") + OPEN)
    plain = Conversation([{"role": "user", "content": "Say six."}, {"role": "assistant", "content": "6"}])
    masker.render(plain)
    hit = Conversation([{"role": "user", "content": "The secret word."}, {"role": "assistant", "content": "6"}])
    with pytest.raises(BadRow, match="depending on what is said"):
        masker.render(hit)
    greeting = "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}"
    masker = own_masker(greeting + SAID + OPEN)
    masker.render(hit)
    assert added_text(masker.plain, "own") == "You are a helpful assistant"
    assert added_text(own_masker(SAID + OPEN).plain, "own") == ""


def test_text_that_is_trimmed_or_dated_is_no_backdoor():
    trimmed = own_masker(SAID.replace("message['content']", "message['content'] | trim") + OPEN)
    said = [{"role": "user", "content": "  Say six.\n"}, {"role": "assistant", "content": "6 \n"}]
    trimmed.render(Conversation(said))
    dated = own_masker("{{ strftime_now('%H:%M') }}" + SAID + OPEN)
    dated.render(Conversation(said))
    key = next(iter(dated.frames.known))
    dated.frames.known[key] = ["an hour ago", "", ""]
    dated.render(Conversation(said))  # it is asked again before a row is refused


def test_a_limit_breaks_off_and_leaves_no_clock_behind():
    import signal

    for outer in (False, True):
        with pytest.raises(TooMuch):
            if outer:
                with watched(), bounded(seconds=0.2):
                    _forever()
            with bounded(seconds=0.2):
                _forever()
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with bounded(seconds=5.0):
        pass


def _forever() -> None:
    while True:
        pass


def test_the_hub_keys_of_a_refusal_are_those_of_the_file(maker: Maker):
    folder = maker.model("m", {"text_config": {"_attn_implementation": "evil/kernel"}})
    with pytest.raises(LoraRecipesError, match=r"config\.json: `text_config\._attn_implementation: evil/kernel`"):
        loaded(maker.recipe("r", folder))
