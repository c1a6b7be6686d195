"""Bad base models and tokenizers: each ends with the right exit code and a message that names what is wrong."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_recipes.audit import audited
from lora_recipes.data.audit import require_sound
from lora_recipes.errors import EXIT_REFUSED, EXIT_USER
from lora_recipes.model.build import end_token_ids, load_tokenizer, model_config
from lora_recipes.model.sound import require_positions
from lora_recipes.model.source import locate
from lora_recipes.model.weights import read_entries
from lora_recipes.recipe import load_recipe
from tests.security.bad_inputs import Case, Run, changed, loaded, parametrized, require_outcome
from tests.security.hostile import OPEN, SAID, Maker, indexed, linked_shard, pickles, torn


def model(make: Callable[[Maker, str], Path], **sections: dict[str, Any]) -> Run:
    return lambda maker: loaded(maker.recipe("r", make(maker, "m"), **sections))


def config(**values: Any) -> Run:
    return model(lambda maker, name: maker.model(name, values))


def _shard_gone(maker: Maker, name: str) -> Path:
    return indexed(maker, name, "gone.safetensors")


def _wrong_index(maker: Maker, name: str) -> Path:
    folder = indexed(maker, name, "real.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.extra"] = "real.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _tokenizer(**changes: Any) -> Callable[[Maker, str], Path]:
    def make(maker: Maker, name: str) -> Path:
        folder = maker.model(name)
        values = json.loads((folder / "tokenizer_config.json").read_text())
        values = {key: value for key, value in (values | changes).items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(values))
        if "chat_template" in changes:
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        return folder

    return make


def _vocabulary(change: Callable[[dict[str, Any]], Any]) -> Callable[[Maker, str], Path]:
    def make(maker: Maker, name: str) -> Path:
        file = maker.model(name) / "tokenizer.json"
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))
        return file.parent

    return make


def _replacing(pattern: str, content: str, times: int) -> dict[str, Any]:
    one = {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
    return {"type": "Sequence", "normalizers": [one] * times}


METASPACE = {  # as Llama 2 has it
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
IN_4_BIT, IN_8_BIT = ({"quant_method": "bitsandbytes", f"load_in_{bits}bit": True} for bits in (4, 8))
SPLIT = {"type": "Split", "pattern": {"Regex": "((("}, "behavior": "Isolated", "invert": False}


def templated(template: str) -> Run:
    """Rows of a model with this chat template."""

    def run(maker: Maker) -> None:
        read = load_recipe(maker.recipe("r", maker.model("m", chat_template__jinja=template)))
        require_sound(audited(read)[1])

    return run


def _on_disk(maker: Maker, name: str) -> Path:
    """A base that bitsandbytes has quantized, and saved."""
    folder = maker.model(name)
    AutoModelForCausalLM.from_pretrained(
        maker.tiny, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    ).save_pretrained(folder)
    return folder


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(torch.int8)


def _bare(tensors: dict[str, torch.Tensor]) -> None:
    """As a model without its head is saved."""
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def _dead_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if "layers.1." in name:
            tensor.zero_()


def _header(**changes: Any) -> Callable[[Maker, str], Path]:
    """Another entry of one weight in the header of the weight file, whose length is that of the true one."""

    def make(maker: Maker, name: str) -> Path:
        file = maker.model(name) / "model.safetensors"
        begin, entries = read_entries(file)
        values = file.read_bytes()[begin:]
        entries["model.norm.weight"] |= changes
        header = json.dumps(entries).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + values)
        return file.parent

    return make


def positions(most: Any) -> Run:
    def run(maker: Maker) -> None:
        read = load_recipe(maker.recipe("r", maker.model("m", {"max_position_embeddings": most})))
        require_positions(read, model_config(read, locate(read)), 100, None)

    return run


def ends(generation: dict[str, Any]) -> Run:
    def run(maker: Maker) -> None:
        read = load_recipe(maker.recipe("r", maker.model("m", generation_config__json=json.dumps(generation))))
        end_token_ids(read, locate(read), load_tokenizer(read, locate(read)))

    return run


MODELS: list[Case] = [
    ("M1", model(pickles), EXIT_REFUSED, "--allow-pickle"),
    ("M2", model(torn), EXIT_REFUSED, "bytes long, where its header says"),
    ("M2", model(_shard_gone), EXIT_REFUSED, "names gone.safetensors, which is not there"),
    ("M2", model(_wrong_index), EXIT_REFUSED, "model.layers.9.extra is not in real.safetensors"),
    ("M2", model(_header()), 0, ""),
    ("M2", model(_header(shape=[32])), EXIT_REFUSED, "model.safetensors: cannot be read"),
    ("M2", model(_header(shape=[-64])), EXIT_REFUSED, "model.norm.weight has the shape [-64]"),
    ("M2", model(_header(shape=[6.4])), EXIT_REFUSED, "model.norm.weight has the shape [6.4]"),
    ("M2", model(_header(dtype="F64")), EXIT_REFUSED, "where its shape and type (F64) would have it"),
    ("M2", model(_header(dtype="NOPE")), EXIT_REFUSED, "'NOPE'"),
    ("M2", model(_header(data_offsets=[0, 256])), EXIT_REFUSED, "model.safetensors: cannot be read"),
    ("M3", model(lambda maker, name: indexed(maker, name, "../x.safetensors")), EXIT_REFUSED, "outside of this folder"),
    ("M3", model(linked_shard), EXIT_REFUSED, "outside of this folder"),
    ("M4", config(auto_map={"AutoConfig": "evil.Evil"}), EXIT_REFUSED, "`auto_map` names 'evil.Evil'"),
    ("M4", config(_attn_implementation="evil/kernel"), EXIT_REFUSED, "`_attn_implementation: evil/kernel`"),
    ("M5", model(_tokenizer(eos_token=None)), EXIT_USER, "training.eos_token"),
    ("M6", model(lambda maker, name: maker.model(name), training={}), 0, ""),
    ("M6", config(vocab_size=300), EXIT_USER, "has 300 embeddings"),
    ("M7", model(changed(lambda t: t["model.norm.weight"].fill_(float("nan")))), EXIT_REFUSED, "model.norm.weight"),
    ("M7", model(changed(lambda t: t["model.norm.weight"].fill_(float("inf")))), EXIT_REFUSED, "model.norm.weight"),
    ("M2", config(vocab_size=600), EXIT_REFUSED, "other shapes than config.json says"),
    ("M2", config(num_hidden_layers=3), EXIT_REFUSED, "are in none of its files"),
    ("M2", config(num_hidden_layers=1), EXIT_REFUSED, "1 more layers than config.json says (model.layers.1)"),
    ("M2", model(changed(_bare, num_hidden_layers=1)), EXIT_REFUSED, "1 more layers than config.json says (layers.1)"),
    ("M2", model(changed(_bare)), 0, ""),
    ("M2", model(changed(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))), 0, ""),
    ("M2", model(changed(lambda t: t.update({"vision_tower.layers.9.fc.weight": torch.ones(8, 8)}))), 0, ""),
    ("M2", config(num_labels=10**9), EXIT_REFUSED, "`num_labels` is 1000000000, more than any model has"),
    ("M2", config(rms_norm_eps=math.inf), EXIT_REFUSED, "`rms_norm_eps` is inf, no finite number"),
    ("M2", config(rms_norm_eps={"__float__": "NaN"}), EXIT_REFUSED, "no finite number"),
    ("M2", config(time_step_limit=[0.0, math.inf]), 0, ""),
    ("M2", config(rope_theta=0), EXIT_REFUSED, "`rope_theta` is 0, and positions are turned by a number above 0"),
    ("M2", config(rope_theta="x"), EXIT_REFUSED, "`rope_theta` is x"),
    ("M2", config(rope_scaling={"type": "linear", "factor": -1}), EXIT_REFUSED, "`rope_scaling.factor` is -1"),
    ("M2", config(rope_parameters={"rope_type": "default", "factor": 1e308}), EXIT_REFUSED, "stretches its positions"),
    ("M2", config(hidden_size=-64), EXIT_REFUSED, "`hidden_size` is -64, and a size lies between 0 and 1,000,000"),
    ("M2", config(hidden_size=10**12), EXIT_REFUSED, "`hidden_size` is 1000000000000"),
    ("M2", config(attention_dropout=5), EXIT_REFUSED, "`attention_dropout` is 5, and a share lies between 0 and 1"),
    ("M2", config(return_dict=False), EXIT_REFUSED, "remove the entry"),
    ("M8", config(model_type="bert"), EXIT_USER, "bert is no causal language model of text alone"),
    ("M8", config(model_type="roberta"), EXIT_USER, "roberta is no causal language model"),
    ("M8", config(model_type="t5", architectures=["T5Model"]), EXIT_USER, "t5"),
    ("M8", config(model_type="whisper"), EXIT_USER, "Known to work: "),
    ("M8", config(model_type="llava"), EXIT_USER, "llava is no causal language model of text alone"),
    ("M8", config(model_type="qwen2_5_vl"), EXIT_USER, "qwen2_5_vl is no causal language model"),
    ("M8", config(model_type="gemma3"), EXIT_USER, "gemma3_text"),
    ("M8", config(model_type="mixtral"), EXIT_REFUSED, "mlp.experts"),  # experts can be trained; these are not there
    ("M8", config(model_type="clip", architectures=["CLIPModel"]), EXIT_USER, "no causal language model"),
    ("M8", config(model_type="nobody_knows"), EXIT_USER, "nobody_knows"),
    ("M8", config(hidden_size="64"), EXIT_USER, "hidden_size"),
    ("M8", config(num_attention_heads=0), EXIT_USER, "ZeroDivisionError"),
    ("M8", config(model_type=["llama"]), EXIT_USER, "`model` is refused"),
    ("M8", config(dtype="int8"), EXIT_USER, "no model can be made of it: ValueError: LlamaForCausalLM cannot be"),
    ("M8", config(dtype="complex64"), EXIT_USER, "no model can be made of it: ValueError"),
    ("M8", config(attn_implementation="nope"), EXIT_USER, '`attn_implementation="nope"` is not supported'),
    ("M8", config(quantization_config={"quant_method": "evil"}), EXIT_USER, "'evil', which transformers does not know"),
    (
        "M8",
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        EXIT_USER,
        "Loading a GPTQ quantized model",
    ),
    ("M8", model(_on_disk), 0, ""),
    ("M8", config(quantization_config=IN_4_BIT), EXIT_USER, "and they are not (model.layers.0."),
    ("M8", config(quantization_config=IN_8_BIT), EXIT_USER, "and they are not (model.layers.0."),
    ("M8", positions("x"), EXIT_USER, "max_position_embeddings"),
    ("M5", model(_tokenizer(eos_token=5)), EXIT_USER, "`model` is refused"),
    ("M5", model(_tokenizer(chat_template=5)), EXIT_USER, "chat template of this tokenizer is '5'"),
    (
        "M5",
        model(_tokenizer(chat_template=[{"name": "default", "template": 5}])),
        EXIT_USER,
        "chat template of this tok",
    ),
    ("M5", model(_tokenizer(model_max_length="x")), EXIT_USER, "`model_max_length` is 'x', no number"),
    ("M5", model(_vocabulary(lambda v: v["model"]["vocab"].update(zzz=-1))), EXIT_USER, "integer `-1`, expected u32"),
    ("M5", model(_vocabulary(lambda v: v["model"].update(merges=[["nope", "x"]]))), EXIT_USER, "Token `nope`"),
    ("M5", model(_vocabulary(lambda v: v["model"].update(type="Evil"))), EXIT_USER, "`model` is refused by"),
    ("M5", model(_vocabulary(lambda v: v.update(pre_tokenizer=SPLIT))), EXIT_USER, "Oniguruma error"),
    ("M5", model(_vocabulary(lambda v: v.update(normalizer=_replacing(".", "x" * 20, 6)))), EXIT_REFUSED, "64,000,000"),
    (
        "M5",
        model(_vocabulary(lambda v: v.update(pre_tokenizer=_replacing("", "x", 20)))),
        EXIT_REFUSED,
        "make a text up",
    ),
    ("M5", model(_vocabulary(lambda v: v.update(normalizer=METASPACE))), 0, ""),
    (
        "M5",
        templated("{% if %}"),
        EXIT_USER,
        "r.yaml:1: the chat template (the model's own) cannot be read, line 1: Expected",
    ),
    ("M5", templated("{{ 1/0 }}" + SAID + OPEN), EXIT_USER, "refuses the conversation: division by zero"),
    ("M5", templated("{% for i in range(10**12) %}{% endfor %}" + SAID), EXIT_USER, "refuses the conversation: "),
    ("M5", ends({"eos_token_id": "x"}), EXIT_USER, "`eos_token_id` holds 'x'"),
    ("M5", ends({"eos_token_id": [[2]]}), EXIT_USER, "`eos_token_id` holds '[2]'"),
    ("M7", model(changed(_integers)), EXIT_REFUSED, "every matrix of"),
    ("M7", model(changed(_dead_layer)), EXIT_REFUSED, "(model.layers.1)"),
    ("M9", model(lambda maker, name: maker.adapter(name)), EXIT_REFUSED, "is an adapter, not a model"),
]


@parametrized(MODELS)
def test_a_bad_model_ends_with_its_code_and_says_what_is_wrong(maker: Maker, run: Run, code: int, said: str):
    require_outcome(lambda: run(maker), code, said)
