"""A GGUF file is the model it was made from: logits read back, bits of the tensors, numbers of the config."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lora_recipes.errors import RefusedError
from lora_recipes.export import gguf as room
from lora_recipes.export.architecture import NotBuiltIn, architecture_of
from tests.export.models import ARCHITECTURES, make_model, write

IDS = torch.arange(3, 90)[None]
# Largest RMS of the difference of logits, as a share of theirs: float32's own, then what rounding the weights does.
TOLERANCE = {"f32": 1e-5, "f16": 4e-3, "bf16": 3e-2, "q8_0": 8e-2}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def read(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).std() / expected.std())


def fields(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("outtype", list(TOLERANCE))
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_transformers_reads_back_the_same_model(tmp_path: Path, name: str, outtype: str):
    expected = logits(make_model(tmp_path / "model", name))
    got = logits(read(write(tmp_path / "model", outtype)))
    assert expected.std() > 1
    assert difference(got, expected) <= TOLERANCE[outtype]
    assert outtype == "f32" or not torch.equal(got, expected)  # the type is really that


@pytest.mark.parametrize(("dtype", "outtype"), [("bfloat16", "bf16"), ("float16", "f16")])
def test_weights_of_the_same_type_keep_every_bit(tmp_path: Path, dtype: str, outtype: str):
    model = make_model(tmp_path / "model", "llama", dtype=dtype, shard="40KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    back = read(write(tmp_path / "model", outtype)).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor.float()), name


def test_norms_and_biases_stay_in_32_bits_and_matrices_are_what_was_asked(tmp_path: Path):
    make_model(tmp_path / "model", "qwen2")
    kinds = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(write(tmp_path / "model", "q8_0")).tensors
    }
    assert {kind for name, kind in kinds.items() if "norm" in name or "bias" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name and "bias" not in name} == {"Q8_0"}
    assert sum(name.endswith(("attn_q.bias", "attn_k.bias", "attn_v.bias")) for name in kinds) == 6


def test_rows_that_do_not_divide_into_blocks_are_kept_in_16_bits(tmp_path: Path):
    model = make_model(tmp_path / "model", "llama", intermediate_size=72)
    path = write(tmp_path / "model", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert difference(logits(read(path)), logits(model)) <= TOLERANCE["q8_0"]


def test_an_output_layer_that_is_the_embedding_is_written_once(tmp_path: Path):
    for name, count in (("llama", 1), ("llama-tied", 0)):
        make_model(tmp_path / name, name)
        names = [tensor.name for tensor in gguf.GGUFReader(write(tmp_path / name, "f16")).tensors]
        assert names.count("output.weight") == count and names.count("token_embd.weight") == 1


def test_a_tied_output_layer_that_differs_on_disk_is_not_dropped(tmp_path: Path):
    make_model(tmp_path / "model", "llama-tied")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, weights, {"format": "pt"})
    same = [tensor.name for tensor in gguf.GGUFReader(write(tmp_path / "model", "f16")).tensors]
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, weights, {"format": "pt"})
    other = [tensor.name for tensor in gguf.GGUFReader(write(tmp_path / "model", "f16")).tensors]
    assert ("output.weight" in same, "output.weight" in other) == (False, True)


def test_the_numbers_of_the_architecture_are_the_configs(tmp_path: Path):
    make_model(
        tmp_path / "model",
        "llama-wide-heads",
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    )
    found = fields(write(tmp_path / "model", "bf16"))
    expected = {
        "general.architecture": "llama",
        "general.file_type": 32,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 1e4,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "llama.vocab_size": 512,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-3)


def test_llama_3_scaling_becomes_the_factors_that_give_transformers_frequencies(tmp_path: Path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    model = make_model(tmp_path / "model", "llama", rope_parameters=rope, head_dim=32)
    tensor = next(t for t in gguf.GGUFReader(write(tmp_path / "model", "f16")).tensors if t.name == "rope_freqs.weight")
    assert tensor.tensor_type.name == "F32" and tensor.data.shape == (16,)
    plain = 1.0 / 5e5 ** (np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(plain / tensor.data, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert tensor.data.min() == pytest.approx(1.0) and tensor.data.max() == pytest.approx(8.0)


def test_mistrals_window_bounds_the_context(tmp_path: Path):
    make_model(tmp_path / "model", "mistral", sliding_window=64)
    assert fields(write(tmp_path / "model", "f16"))["llama.context_length"] == 64


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("gemma3_text", {}, "gemma3_text.*not among those that are built in"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial",
        ),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 16.0}},
            "yarn with beta_fast",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_not_built_in(kind: str, changes: dict, why: str):
    with pytest.raises(NotBuiltIn, match=why):
        architecture_of(AutoConfig.for_model(kind, **changes))


def test_a_weight_too_large_for_16_bits_is_refused_and_fits_bf16(tmp_path: Path):
    make_model(tmp_path / "model", "llama")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(RefusedError, match=r"up_proj.*holds numbers that F16 cannot \(up to 1e\+06\).*bf16"):
        write(tmp_path / "model", "f16")
    assert write(tmp_path / "model", "bf16").is_file()


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_every_tensor_is_accounted_for(tmp_path: Path, change: str):
    make_model(tmp_path / "model", "llama")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    if change == "missing":
        del tensors["model.layers.0.self_attn.o_proj.weight"]
    else:
        tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 2)
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(
        RefusedError, match="o_proj.weight is missing" if change == "missing" else "lora_A.*no tensor of"
    ):
        write(tmp_path / "model", "f16")


def test_a_file_that_is_not_the_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The positive control of the proof: rows in the wrong order must not pass it."""
    make_model(tmp_path / "model", "llama")
    encoded = room._encoded

    def upside_down(weight: room.Weight, shards: room.Shards) -> np.ndarray:
        data = encoded(weight, shards)
        turned = weight.name == "blk.1.attn_k.weight"
        return np.ascontiguousarray(data.reshape(weight.shape[0], -1)[::-1]).reshape(-1) if turned else data

    monkeypatch.setattr(room, "_encoded", upside_down)
    with pytest.raises(RefusedError, match=r"blk.1.attn_k.weight is not model.layers.1.self_attn.k_proj.weight"):
        write(tmp_path / "model", "f16")


def test_large_tensors_are_converted_in_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_model(tmp_path / "model", "llama")
    whole = write(tmp_path / "model", "q8_0").read_bytes()
    monkeypatch.setattr(room, "BLOCK", 500)  # 7 rows of 64
    assert write(tmp_path / "model", "q8_0").read_bytes() == whole


def test_q8_0_is_within_half_a_step_of_each_block_and_the_rounding_of_its_scale(tmp_path: Path):
    model = make_model(tmp_path / "model", "qwen2")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(write(tmp_path / "model", "q8_0")).tensors}
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    tensor = tensors["blk.0.ffn_up.weight"]
    got = dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
    step = np.abs(weight).reshape(-1, 32).max(-1) / 127
    assert (np.abs(got - weight).reshape(-1, 32).max(-1) <= 0.57 * step).all()


def test_the_file_does_not_depend_on_the_run(tmp_path: Path):
    make_model(tmp_path / "model", "llama")
    assert write(tmp_path / "model", "f16").read_bytes() == write(tmp_path / "model", "f16").read_bytes()
    assert str(tmp_path) not in json.dumps(
        {key: str(value) for key, value in fields(write(tmp_path / "model", "f16")).items()}
    )
