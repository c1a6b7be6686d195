"""Hostile models, adapters, templates, data and recipes, made by code; each would write CANARY if any code of it ran."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.conftest import tiny_recipe

CANARY = "evil_was_here"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


class Evil:
    """Unpickled, it writes the canary."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


class Maker:
    """Makes fixtures in a folder, all on copies of one tiny model."""

    def __init__(self, folder: Path, model: Path, data: dict[str, str]) -> None:
        self.folder, self.tiny, self.data, self.canary = folder, model, data, str(folder / CANARY)
        self.code = f"open({self.canary!r}, 'w').close()\n"

    def model(self, name: str, config: dict[str, Any] | None = None, **files: str | bytes) -> Path:
        """A copy of the tiny model with other values in its config, and more files; `__` in a name is a dot."""
        folder = self.folder / f"model-{name}"
        shutil.copytree(self.tiny, folder)
        if config:
            values = json.loads((folder / "config.json").read_text()) | config
            (folder / "config.json").write_text(json.dumps(values))
        for file, content in files.items():
            raw = content.encode() if isinstance(content, str) else content
            (folder / file.replace("__", ".")).write_bytes(raw)
        return folder

    def recipe(self, name: str, base: Path | None = None, **changes: dict[str, Any]) -> Path:
        """A recipe on a model."""
        sections = tiny_recipe(str(base or self.tiny), self.data)
        for section, keys in changes.items():
            sections[section] = sections.get(section, {}) | keys
        return self.text(name, json.dumps(sections))

    def text(self, name: str, text: str) -> Path:
        """A recipe as it is written."""
        path = self.folder / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    def pickled(self) -> bytes:
        return pickle.dumps(Evil(self.canary))

    def adapter(self, name: str, rank: int = 4, **config: Any) -> Path:
        """An adapter of the tiny model's first layer, with other values in its config."""
        folder = self.folder / f"adapter-{name}"
        folder.mkdir()
        values = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
            "base_model_name_or_path": "evil/base",
            "peft_version": "0.21.2",
        }
        (folder / "adapter_config.json").write_text(json.dumps(values | config))
        tensors = {KEY.format("A"): torch.ones(rank, 64), KEY.format("B"): torch.ones(64, rank)}
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        return folder

    def template(self, name: str, template: str) -> Path:
        """A recipe with a chat template of its own."""
        (self.folder / f"{name}.jinja").write_text(template)
        return self.recipe(name, training={"chat_template_path": str(self.folder / f"{name}.jinja")})


# -- base models ------------------------------------------------------------------------------------------------------


def indexed(maker: Maker, name: str, shard: str) -> Path:
    folder = maker.model(name)
    (folder / "model.safetensors").rename(folder / "real.safetensors")
    from lora_recipes.model.weights import header_of

    names = header_of(folder / "real.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    return folder


def pickles(maker: Maker, name: str) -> Path:
    folder = maker.model(name, pytorch_model__bin=maker.pickled())
    (folder / "model.safetensors").unlink()
    return folder


def _pickle_shards(maker: Maker, name: str) -> Path:
    folder = maker.model(name, shard__bin=maker.pickled())
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "shard.bin"}}))
    return folder


def _linked(maker: Maker, name: str, file: str) -> Path:
    folder = maker.model(name)
    (folder / file).unlink()
    (folder / file).symlink_to(maker.tiny / file)
    return folder


def linked_shard(maker: Maker, name: str) -> Path:
    folder = indexed(maker, name, "shard.safetensors")
    (folder / "real.safetensors").rename(maker.folder / "elsewhere.safetensors")
    (folder / "shard.safetensors").symlink_to("../elsewhere.safetensors")
    return folder


def torn(maker: Maker, name: str) -> Path:
    folder = maker.model(name)
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    return folder


def _adapter_as_base(maker: Maker, name: str) -> Path:
    folder = maker.model(name)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/base", "peft_type": "LORA"}')
    return folder


def _tokenizer_code(maker: Maker, name: str) -> Path:
    folder = maker.model(name, evil__py=maker.code)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


MODELS: dict[str, Callable[[Maker, str], Path]] = {
    "pickled weights": pickles,
    "pickled shards": _pickle_shards,
    "code for an unknown type": lambda maker, name: maker.model(
        name,
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}},
        evil__py=maker.code,
    ),
    "code for a known type": lambda maker, name: maker.model(
        name, {"auto_map": {"AutoModelForCausalLM": "evil.EvilForCausalLM"}}, evil__py=maker.code
    ),
    "code of another repository": lambda maker, name: maker.model(
        name, {"auto_map": {"AutoConfig": "evil/repo--evil.EvilConfig"}}
    ),
    "code for the tokenizer": _tokenizer_code,
    "kernel": lambda maker, name: maker.model(name, {"attn_implementation": "evil/kernel"}),
    "kernel, private name": lambda maker, name: maker.model(name, {"_attn_implementation": "evil/kernel"}),
    "kernel, internal name": lambda maker, name: maker.model(name, {"_attn_implementation_internal": "evil/kernel"}),
    "kernel in a part": lambda maker, name: maker.model(name, {"text_config": {"_attn_implementation": "evil/k@v1:f"}}),
    "kernel of a part": lambda maker, name: maker.model(name, {"attn_implementation": {"text_config": "evil/kernel"}}),
    "kernel of experts": lambda maker, name: maker.model(name, {"_experts_implementation": "evil/kernel"}),
    "kernels asked for": lambda maker, name: maker.model(name, {"use_kernels": True}),
    "index leads up": lambda maker, name: indexed(maker, name, f"../{maker.tiny.name}/model.safetensors"),
    "index leads up inside": lambda maker, name: indexed(maker, name, "sub/../../x.safetensors"),
    "index is absolute": lambda maker, name: indexed(maker, name, str(maker.tiny / "model.safetensors")),
    "index names a link": linked_shard,
    "index names nothing": lambda maker, name: indexed(maker, name, "gone.safetensors"),
    "weights are a link": lambda maker, name: _linked(maker, name, "model.safetensors"),
    "config is a link": lambda maker, name: _linked(maker, name, "config.json"),
    "weights are torn": torn,
    "header without end": lambda maker, name: maker.model(name, model__safetensors=b"\xff" * 8 + b"{}"),
    "header is no mapping": lambda maker, name: maker.model(name, model__safetensors=(2).to_bytes(8, "little") + b"[]"),
    "layers without end": lambda maker, name: maker.model(name, {"num_hidden_layers": 10**9}),
    "nesting without end": lambda maker, name: maker.model(name, config__json="[" * 200_000),
    "config is a list": lambda maker, name: maker.model(name, config__json="[]"),
    "adapter as a base": _adapter_as_base,
}

# -- adapters ---------------------------------------------------------------------------------------------------------


def _pickled_adapter(maker: Maker, name: str) -> Path:
    folder = maker.adapter(name)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(maker.pickled())
    return folder


def _linked_adapter(maker: Maker, name: str) -> Path:
    folder, other = maker.adapter(name), maker.adapter(f"{name}-other")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(other / "adapter_model.safetensors")
    return folder


def _broken(text: str) -> Callable[[Maker, str], Path]:
    def make(maker: Maker, name: str) -> Path:
        folder = maker.adapter(name)
        (folder / "adapter_config.json").write_text(text)
        return folder

    return make


def _config(**values: Any) -> Callable[[Maker, str], Path]:
    return lambda maker, name: maker.adapter(name, **values)


DEEP: Any = {}
for _ in range(8):
    DEEP = {"x": DEEP}

ADAPTERS: dict[str, Callable[[Maker, str], Path]] = {
    "pickled adapter": _pickled_adapter,
    "linked adapter": _linked_adapter,
    "adapter imports a module": _config(auto_mapping={"parent_library": "evil", "base_model_class": "X"}),
    "adapter imports megatron": _config(megatron_config={"a": 1}, megatron_core="evil"),
    "adapter reads a pickle": _config(corda_config={"cache_file": "evil.pt"}),
    "adapter reads a matrix": _config(corda_config={"covariance_file": "evil.pt"}),
    "rank of a billion": _config(r=10**9),
    "rank is text": _config(r="8"),
    "rank is not that of the weights": lambda maker, name: maker.adapter(name, rank=8),
    "rank pattern of a billion": _config(rank_pattern={"q_proj": 10**9}),
    "alpha without end": _config(lora_alpha=float("inf")),
    "layers replicated without end": _config(layer_replication=[[0, 10**9]]),
    "pattern without end": _config(target_modules=r"(.+)+!"),
    "pattern key without end": _config(rank_pattern={r"(.+)+!": 4}),
    "pattern too long": _config(target_modules="a" * 10_000),
    "pattern is broken": _config(exclude_modules="(("),
    "unknown field": _config(on_load="evil.run"),
    "nested without need": _config(loftq_config=DEEP),
    "config nested without end": _broken("[" * 200_000),
    "config is no mapping": _broken("[]"),
}

# -- chat templates ---------------------------------------------------------------------------------------------------

SAID = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "template runs for ever": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    + SAID
    + OPEN,
    "template takes all memory": "{% set x = 'a' * 99999999999 %}" + SAID + OPEN + "{{ x }}",
    "template leaves its sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}" + SAID + OPEN,
    "template reads its globals": "{{ messages.__init__.__globals__ }}{{ cycler.__init__.__globals__.os.system('touch evil') }}"
    + SAID,
    "template drops the user": SAID.replace("messages %}", "messages if message['role'] != 'user' %}") + OPEN,
    "template turns it around": SAID.replace("in messages", "in messages | reverse") + OPEN,
    "template says it twice": SAID + SAID + OPEN,
}

# -- recipes ----------------------------------------------------------------------------------------------------------

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
RECIPES: dict[str, str | dict[str, Any]] = {
    "a tag": "model: !!python/object/apply:os.system ['touch evil_was_here']\n",
    "a tag of its own": "model: !evil {a: 1}\n",
    "aliases without end": BOMB,
    "a recipe of 2 MB": "# " + "x" * 2_000_000,
    "brackets without end": "model: " + "[" * 5_000,
    "a token": {"generation": {"prompts": ["hf_" + "a" * 34]}},
    "a private key": {
        "generation": {"prompts": ["-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----"]}
    },
    "a password in an address": {"model": {"revision": "https://me:letmein@host/repo.git"}},
    "code that is not pinned": {"model": {"trust_remote_code": True, "revision": "main"}},
    "a kernel that is not pinned": {"model": {"attn_implementation": "evil/kernel"}},
    "pickles asked for": {"model": {"use_safetensors": False}},
    "data as a pickle": {"dataset": {"data_files": {"train": "rows.pkl"}}},
    "data from an address": {"dataset": {"data_files": {"train": "https://evil.example/rows.jsonl"}}},
    "data as a script": {"dataset": {"path": "evil/rows.py"}},
}


def cases(maker: Maker) -> list[dict[str, str]]:
    """All fixtures: {"name", "verb", "target"}."""
    found = []
    for name, make in MODELS.items():
        plain = name.replace(" ", "-").replace(",", "")
        found.append((name, "train", maker.recipe(plain, make(maker, plain))))
    for name, make in ADAPTERS.items():
        found.append((name, "adapter", make(maker, name.replace(" ", "-"))))
    for name, template in TEMPLATES.items():
        found.append((name, "audit", maker.template(name.replace(" ", "-"), template)))
    for name, recipe in RECIPES.items():
        plain = name.replace(" ", "-")
        path = maker.text(plain, recipe) if isinstance(recipe, str) else maker.recipe(plain, **recipe)
        found.append((name, "check", path))
    return [{"name": name, "verb": verb, "target": str(target)} for name, verb, target in found]
