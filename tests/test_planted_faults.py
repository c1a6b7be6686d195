"""Faults planted between the steps: each is caught by a gate, with exit code 4 and nothing published."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_recipes.cli import main
from lora_recipes.errors import MachineError, RefusedError
from lora_recipes.merge import parity
from lora_recipes.model.folder import require_publishable
from lora_recipes.run_dir import RunDir, read_json
from lora_recipes.train import launch
from tests.conftest import ROOT, publish_anew, tiny_recipe

Told = Callable[[], str]


@pytest.fixture(scope="module")
def trained_once(tiny_model: Path, tiny_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a base of its own and a trained run on it."""
    folder = tmp_path_factory.mktemp("once")
    shutil.copytree(tiny_model, folder / "base")
    forgetting = {"max_kl": 100.0, "max_loss_increase": 100.0, "max_rows": 2}
    recipe = tiny_recipe("base", tiny_data) | {"generation": {"max_new_tokens": 4}}
    recipe["checks"] |= {"forgetting": forgetting}
    (folder / "r.yaml").write_text(json.dumps(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert launch("r.yaml", []) == 0
    return folder


@pytest.fixture
def run(trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_proof: None) -> RunDir:
    """A copy of the run, to plant a fault in."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    return RunDir.of("r")


@pytest.fixture
def told(capsys: pytest.CaptureFixture) -> Told:
    """What was said on stderr since the last call, on one line."""
    return lambda: " ".join(capsys.readouterr().err.split())


def change_adapter(run: RunDir, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Damage an adapter so that its checksums know nothing of it."""
    weights = run.adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, {"format": "pt"})
    publish_anew(run.adapter)


def test_without_a_fault_everything_passes(run: RunDir):
    assert main(["merge", "r.yaml"]) == 0
    assert main(["generate", "r.yaml"]) == 0
    assert main(["evaluate", "r.yaml"]) == 0


@pytest.mark.promise("A1")
@pytest.mark.parametrize("verb", ["merge", "generate", "evaluate", "chat"])
def test_an_adapter_of_another_base_of_equal_shape(run: RunDir, verb: str, told: Told):
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained("base")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained("base")
    told()
    assert main([verb, "r.yaml"]) == 4
    assert "was trained on base (weights" in told()
    assert not run.merged.exists()


def test_the_same_weights_in_another_form_beside_them_change_no_base(run: RunDir):
    """Repositories hold `consolidated.safetensors` or a .bin beside what is loaded."""
    shutil.copy("base/model.safetensors", "base/consolidated.safetensors")
    Path("base/pytorch_model.bin").write_bytes(b"never loaded")
    assert main(["merge", "r.yaml"]) == 0


def test_force_merges_into_another_base_and_says_so(run: RunDir, told: Told):
    test_an_adapter_of_another_base_of_equal_shape(run, "merge", told)
    assert main(["merge", "r.yaml", "--force"]) == 0
    assert "used all the same (--force)" in told()


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[0]]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 64)


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(tensors)[0]][0, 0] = float("nan")


def empty(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (drop, "1 keys are missing"),
        (add, "1 are not known"),
        (spoil, "holds NaN or infinity"),
        (empty, "every B is zero"),
    ],
    ids=["a tensor missing", "a tensor too many", "NaN", "zero B"],
)
def test_a_broken_adapter(run: RunDir, fault: Callable, said: str, told: Told):
    change_adapter(run, fault)
    told()
    assert main(["merge", "r.yaml"]) == 4
    assert said in told()
    assert not run.merged.exists()


@pytest.mark.parametrize("key", ["lora_alpha", "r"])
def test_a_wrong_scaling(run: RunDir, key: str, told: Told):
    config = run.adapter / "adapter_config.json"
    values = read_json(config)
    config.write_text(json.dumps(values | {key: 2 * values[key]}))
    publish_anew(run.adapter)
    told()
    assert main(["merge", "r.yaml"]) == 4
    assert f"{key} is {2 * values[key]}, the adapter was trained with {values[key]} (r.yaml:" in told()


def test_an_adapter_that_was_changed_after_training(run: RunDir, told: Told):
    weights = run.adapter / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    told()
    for verb in ("merge", "generate", "evaluate"):
        assert main([verb, "r.yaml"]) == 4
        assert "its sha256 is not that of" in told()


@pytest.mark.parametrize("verb", ["merge", "generate", "evaluate", "chat"])
def test_a_template_that_was_changed_after_training(run: RunDir, verb: str, told: Told):
    template = Path("base/chat_template.jinja")
    template.write_text(template.read_text().replace("assistant", "helper"))
    told()
    assert main([verb, "r.yaml"]) == 4
    assert "the chat template is not the one that was trained with" in told()


def test_a_template_that_is_lost_in_the_merged_folder(run: RunDir, monkeypatch: pytest.MonkeyPatch, told: Told):
    plant(monkeypatch, lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}"))
    told()
    assert main(["merge", "r.yaml"]) == 4
    assert "make other tokens of 24 of 24 training rows" in told()
    assert not run.merged.exists()


def plant(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path], object]) -> None:
    """Plant a fault in the merged folder after it was written, and before it is proved."""
    honest = parity.prove

    def prove(proof: parity.Proof) -> dict:
        fault(proof.folder)
        return honest(proof)

    monkeypatch.setattr(parity, "prove", prove)


def drop_eos(folder: Path) -> None:
    config = folder / "generation_config.json"
    config.write_text(json.dumps(read_json(config) | {"eos_token_id": [0]}))


def flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.promise("F17")
@pytest.mark.parametrize(
    ("fault", "said"),
    [(drop_eos, "eos_token_id lacks <|im_end|>"), (flip, "its content is not what was written")],
    ids=["eos dropped", "a bit flipped"],
)
def test_a_merged_folder_that_is_not_what_was_meant(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, fault: Callable, said: str, told: Told
):
    plant(monkeypatch, fault)
    told()
    assert main(["merge", "r.yaml"]) == 4
    assert said in told()
    assert not run.merged.exists() and not read_json(run.parity)["passed"]


@pytest.mark.promise("F17")
@pytest.mark.parametrize("fault", [drop_eos, flip])
@pytest.mark.parametrize("verb", ["generate", "export"])
def test_a_published_model_that_was_changed(run: RunDir, verb: str, fault: Callable, told: Told):
    assert main(["merge", "r.yaml"]) == 0
    fault(run.merged)
    told()
    assert main([verb, "r.yaml"]) == 4
    assert "its sha256 is not that of" in told()
    assert not run.exports.exists()


@pytest.fixture
def in_merged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Adds a file to what `merge` writes."""
    from transformers import PreTrainedTokenizerBase

    def add_file(name: str, text: str) -> None:
        honest = PreTrainedTokenizerBase.save_pretrained

        def save(self: PreTrainedTokenizerBase, folder: Path, **keywords: object) -> object:
            (Path(folder) / name).write_text(text)
            return honest(self, folder, **keywords)

        monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", save)

    return add_file


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("training_args.bin", "x", "a pickle"),
        ("adapter_config.json", "{}", "applied twice"),
        ("notes.json", '{"token": "hf_' + "a" * 34 + '"}', "what looks like a secret"),
        ("notes.json", '{"path": "HERE/base"}', "a path of this machine"),
    ],
    ids=["pickle", "adapter config", "secret", "path"],
)
def test_what_must_not_be_published(run: RunDir, in_merged: Callable, name: str, text: str, said: str, told: Told):
    in_merged(name, text.replace("HERE", str(Path.cwd())))
    told()
    assert main(["merge", "r.yaml"]) == 4
    assert said in told()
    assert not run.merged.exists()


@pytest.mark.promise("F17")
def test_a_killed_proof_costs_no_second_merge(run: RunDir, monkeypatch: pytest.MonkeyPatch, told: Told):
    def killed(proof: parity.Proof) -> dict:
        raise MachineError("the process that reloaded the merged model was killed")

    with monkeypatch.context() as patch:
        patch.setattr(parity, "prove", killed)
        assert main(["merge", "r.yaml"]) == 3
    kept = (run.root / ".merged.staging" / "model.safetensors").stat().st_mtime_ns
    assert not run.merged.exists() and not read_json(run.parity)["passed"]
    assert main(["merge", "r.yaml"]) == 0
    assert (run.merged / "model.safetensors").stat().st_mtime_ns == kept
    assert not list(run.merged.glob(".*"))


def test_every_published_file_is_listed_and_readable(run: RunDir):
    assert main(["merge", "r.yaml"]) == 0
    for folder in (run.adapter, run.merged):
        listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
        files = {file.name for file in folder.iterdir()}
        assert listed == files - {"SHA256SUMS"}
        assert all(file.stat().st_mode & 0o777 == 0o644 for file in folder.iterdir())
    assert not {file.suffix for file in run.merged.iterdir()} & {".bin", ".pt", ".pkl"}


def test_a_vocabulary_may_hold_what_looks_like_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Qwen's has "/root" as a token: no reason to throw a training away."""
    monkeypatch.setenv("HOME", "/root")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"/root": 5}}}')
    require_publishable(folder)
    (folder / "config.json").write_text('{"path": "/root"}')
    with pytest.raises(RefusedError, match="a path of this machine"):
        require_publishable(folder)


def test_the_merged_model_keeps_how_the_base_answers(run: RunDir):
    config = Path("base/generation_config.json")
    config.write_text(
        json.dumps(read_json(config) | {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1})
    )
    assert main(["merge", "r.yaml"]) == 0
    kept = read_json(run.merged / "generation_config.json")
    assert (kept["do_sample"], kept["temperature"], kept["repetition_penalty"]) == (True, 0.6, 1.1)
    assert kept["use_cache"] is True and 2 in kept["eos_token_id"]
