"""What cannot be merged, or could be merged wrongly, is refused before a byte is written, with a reason."""

import hashlib
import json
import os
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_recipes.errors import EXIT_REFUSED, EXIT_USER, LoraRecipesError, MachineError, RefusedError
from lora_recipes.merge import layout
from lora_recipes.merge.checkpoint import DTYPES, INDEX, Files, checkpoint_of, read_checkpoint, read_header
from lora_recipes.merge.direct import read_back
from lora_recipes.merge.parity import in_fresh_process
from lora_recipes.merge.weights import write_weights
from lora_recipes.model.identity import base_of
from lora_recipes.model.source import Source
from tests.conftest import NF4
from tests.merge.toys import WHOLE, edit, make_adapter, make_base, plan, recipe_on, require_same, streamed

WEIGHTS = "adapter_model.safetensors"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base in shards, and its adapter."""
    base = make_base(tmp_path_factory.mktemp("base"), shard="60KB")
    return base, make_adapter(base, tmp_path_factory.mktemp("adapter"), **WHOLE)


@pytest.fixture
def base(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return copied(made[0], tmp_path / "base")


@pytest.fixture
def adapter(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return copied(made[1], tmp_path / "adapter")


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def refused(base: Path, adapter: Path, code: int = EXIT_REFUSED, **merge: Any) -> str:
    with pytest.raises(LoraRecipesError) as caught:
        plan(recipe_on(base, **merge), adapter)
    assert caught.value.exit_code == code
    return str(caught.value)


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def first_shard(base: Path) -> Path:
    return min(base.glob("*.safetensors"))


def test_the_pair_that_is_broken_here_can_be_merged(base: Path, adapter: Path, tmp_path: Path):
    require_same(recipe_on(base), adapter, tmp_path)


@pytest.mark.parametrize("by", [-1, -5000, 1])
def test_a_file_of_another_length_than_its_header_says(by: int, base: Path, adapter: Path):
    file = first_shard(base)
    content = file.read_bytes()
    file.write_bytes(content[:by] if by < 0 else content + b"\0" * by)
    assert str(file) in (message := refused(base, adapter)) and str(file.stat().st_size) in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        struct.pack("<Q", 2**60),
        struct.pack("<Q", 50) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"12",
        struct.pack("<Q", 4) + b'"ab"',
        struct.pack("<Q", 4) + b"\xff\xfe{}",
        struct.pack("<Q", 9) + b'{"a": {}}',
        struct.pack("<Q", 8) + b'{"a": 3}',
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_a_broken_header(content: bytes, base: Path, adapter: Path):
    first_shard(base).write_bytes(content)
    assert str(first_shard(base)) in refused(base, adapter)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a tensor longer than its shape": lambda entry: entry.update(shape=[*entry["shape"][:-1], entry["shape"][-1] - 1]),
    "a tensor that begins before the values": lambda entry: entry.update(data_offsets=[-8, entry["data_offsets"][1]]),
    "a shape that is no number": lambda entry: entry.update(shape=["64", 64]),
    "a type that does not exist": lambda entry: entry.update(dtype="F12"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_header_that_contradicts_itself(change: str, base: Path, adapter: Path):
    def changed(header: dict[str, Any]) -> None:
        CHANGES[change](header[max(name for name in header if name.endswith("weight"))])

    rewrite_header(first_shard(base), changed)
    assert str(first_shard(base)) in refused(base, adapter)


def test_tensors_that_overlap(base: Path, adapter: Path):
    def overlapping(header: dict[str, Any]) -> None:
        same_shape = [entry for name, entry in header.items() if name.endswith("norm.weight")]
        same_shape[0]["data_offsets"] = same_shape[1]["data_offsets"]

    rewrite_header(
        max(base.glob("*.safetensors"), key=lambda f: sum("norm" in s.name for s in read_header(f))), overlapping
    )
    assert "no safetensors file" in refused(base, adapter)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}']
)
def test_a_broken_index(content: str, base: Path, adapter: Path):
    (base / INDEX).write_text(content)
    assert INDEX in refused(base, adapter)


def test_an_index_that_names_a_missing_file(base: Path, adapter: Path):
    first_shard(base).unlink()
    assert "model-00001-of" in refused(base, adapter)


def test_an_index_that_names_a_missing_tensor(base: Path, adapter: Path):
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["model.layers.9.nothing"] = first_shard(base).name
    (base / INDEX).write_text(json.dumps(index))
    assert "model.layers.9.nothing" in refused(base, adapter)


def test_a_base_of_pickles_is_not_read(base: Path, adapter: Path):
    for file in [*base.glob("*.safetensors"), base / INDEX]:
        file.unlink()
    (base / "pytorch_model.bin").write_bytes(b"whatever")
    message = refused(base, adapter, EXIT_USER)
    assert "model.safetensors" in message and "save_pretrained" in message


def test_a_base_without_one_of_its_tensors(base: Path, adapter: Path):
    file = first_shard(base)
    lost = read_header(file)[0].name
    edit(file, lambda name, tensor: None if name == lost else tensor)
    index = json.loads((base / INDEX).read_text())
    del index["weight_map"][lost]
    (base / INDEX).write_text(json.dumps(index))
    assert f"no weights for {lost}" in refused(base, adapter)


def test_a_base_with_a_tensor_of_another_shape(base: Path, adapter: Path):
    file = first_shard(base)
    other = next(stored.name for stored in read_header(file) if len(stored.shape) == 2)
    edit(file, lambda name, tensor: tensor[:-1].contiguous() if name == other else tensor)
    assert other in (message := refused(base, adapter)) and "shape" in message


def without_one(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    return None if name == f"{QUERY}.lora_A.weight" else tensor


def of_another_rank(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:4].contiguous() if name == f"{QUERY}.lora_A.weight" else tensor


@pytest.mark.parametrize("change", [without_one, of_another_rank])
def test_an_adapter_that_lacks_a_tensor_or_has_another_shape(change: Any, base: Path, adapter: Path):
    edit(adapter / WEIGHTS, change)
    assert f"{QUERY}.lora_A" in refused(base, adapter)


@pytest.mark.parametrize(
    "name", [f"{QUERY}.lora_C.weight", "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "stray"]
)
def test_an_adapter_with_a_tensor_that_the_model_has_no_place_for(name: str, base: Path, adapter: Path):
    save_file(load_file(adapter / WEIGHTS) | {name: torch.ones(8, 64)}, adapter / WEIGHTS)
    assert name.rsplit(".", 1)[0] in refused(base, adapter)


def test_an_adapter_of_a_wider_base(base: Path, tmp_path: Path):
    wide = make_base(tmp_path / "wide", hidden_size=128)
    assert "not an adapter of this model" in refused(base, make_adapter(wide, tmp_path / "of wide", **WHOLE))


def test_a_bias_of_lora_where_the_base_has_none(base: Path, tmp_path: Path):
    """PEFT trains it, and cannot merge it."""
    lora = {"target_modules": ["q_proj"], "lora_bias": True, "r": 4}
    adapter = make_adapter(base, tmp_path / "biased", **lora)
    assert "lora_bias" in (message := refused(base, adapter)) and "q_proj" in message


def test_a_layer_that_the_plan_forgets(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch):
    """As a kind of layer that PEFT adds and the plan does not know: its tensors would change nothing."""
    found = layout.layers_by_parameter

    def forgetful(model: Any) -> dict[int, Any]:
        return dict(list(found(model).items())[1:])

    monkeypatch.setattr(layout, "layers_by_parameter", forgetful)
    assert "2 tensors of the adapter would not be merged" in (message := refused(base, adapter)) and QUERY in message


def configured(adapter: Path, **changes: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
        ({"monteclora_config": {"num_samples": 2}}, "monteclora_config"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
    ],
)
def test_what_no_plain_model_can_do_is_refused_by_name(changes: dict[str, Any], named: str, base: Path, adapter: Path):
    configured(adapter, **changes)
    assert named in refused(base, adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_after_merging(value: float, base: Path, adapter: Path, tmp_path: Path):
    """1e30 is finite, and infinity in float16."""
    edit(adapter / WEIGHTS, lambda name, tensor: tensor * 0 + value if name == f"{QUERY}.lora_B.weight" else tensor)
    with pytest.raises(RefusedError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight.*NaN or infinity") as caught:
        streamed(recipe_on(base, dtype="float16"), adapter, tmp_path / "merged")
    assert caught.value.exit_code == EXIT_REFUSED


def test_a_file_that_shrinks_while_it_is_read(base: Path, adapter: Path, tmp_path: Path):
    planned = plan(recipe_on(base), adapter)
    file = first_shard(base)
    os.truncate(file, file.stat().st_size - 2000)
    (tmp_path / "merged").mkdir()
    with pytest.raises(RefusedError, match="cut off while it was read"):
        write_weights(planned, tmp_path / "merged")


@pytest.mark.parametrize("cached", [False, True])
def test_a_merged_file_that_was_changed_or_is_gone(cached: bool, base: Path, adapter: Path, tmp_path: Path):
    _, result = streamed(recipe_on(base), adapter, tmp_path / "merged")
    file = first_shard(tmp_path / "merged")
    checksum = result.checksums[file.name]
    assert read_back(file, checksum, cached=cached) == hashlib.sha256(file.read_bytes()).hexdigest()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RefusedError, match=f"{file}.*not what was written"):
        read_back(file, checksum, cached=cached)
    file.unlink()
    with pytest.raises(RefusedError, match="is gone"):
        read_back(file, checksum, cached=cached)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_of_numbers_is_read_as_it_was_written(dtype: str, tmp_path: Path):
    """Tensors without numbers, without dimensions, and shorter than anything that is aligned."""
    written = {
        "scalar": torch.ones(()).to(DTYPES[dtype]),
        "one": torch.ones(1).to(DTYPES[dtype]),
        "three": torch.ones(3).to(DTYPES[dtype]),
        "empty": torch.zeros(0, 4).to(DTYPES[dtype]),
        "matrix": torch.ones(5, 3).to(DTYPES[dtype]),
    }
    save_file(written, tmp_path / "model.safetensors")
    with Files() as files:
        found = {name: files.read(stored) for name, stored in read_checkpoint(tmp_path).tensors.items()}
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())


def test_the_variant_and_the_subfolder_that_the_recipe_names(tmp_path: Path):
    folder = make_base(tmp_path / "base" / "inner", shard="60KB")
    for file in folder.glob("model-*"):
        file.rename(folder / file.name.replace(".safetensors", ".fp16.safetensors").replace("model-", "model.fp16-"))
    index = json.loads((folder / INDEX).read_text())
    renamed = {
        k: v.replace(".safetensors", ".fp16.safetensors").replace("model-", "model.fp16-")
        for k, v in index["weight_map"].items()
    }
    (folder / INDEX).unlink()
    (folder / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": renamed}))
    recipe = recipe_on(tmp_path / "base", model={"subfolder": "inner", "variant": "fp16"})
    found = checkpoint_of(recipe, Source("folder", str(tmp_path / "base"), str(tmp_path / "base")))
    assert found.tensors.keys() == renamed.keys()


def test_a_snapshot_of_the_hub_is_links_into_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the hub's cache lies on disk: blobs, and a snapshot that links to them. Beside the weights lies another form of them."""
    base = make_base(tmp_path / "base", shard="60KB")
    cache, commit = tmp_path / "cache", "0" * 40
    repository = cache / "models--someone--toy"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(base.iterdir())):
        (repository / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    recipe = recipe_on("someone/toy", model={"cache_dir": str(cache), "local_files_only": True})
    found = checkpoint_of(recipe, Source("hub", "someone/toy", "someone/toy"))
    assert found.folder == snapshot
    assert found.tensors.keys() == read_checkpoint(base).tensors.keys()
    named = base_of(recipe, Source("hub", "someone/toy", "someone/toy"))
    assert (named.name, named.revision) == ("someone/toy", commit)  # a branch moves, a commit does not


def test_a_proof_that_is_killed_is_told_from_one_that_ends_by_a_bug(base: Path, tmp_path: Path):
    recipe = recipe_on(base)
    with pytest.raises(MachineError, match="was killed"):
        in_fresh_process(signal.raise_signal, signal.SIGKILL, recipe, tmp_path)
    with pytest.raises(RuntimeError, match="ended before it answered"):
        in_fresh_process(os._exit, 7, recipe, tmp_path)
    with pytest.raises(ZeroDivisionError):
        in_fresh_process(divmod_by_zero, 1, recipe, tmp_path)


def test_a_proof_imports_bitsandbytes_only_where_the_recipe_needs_it(base: Path, tmp_path: Path):
    """Seconds of every merge: its process must know before PEFT is imported."""
    assert in_fresh_process(is_left_out, "bitsandbytes", recipe_on(base), tmp_path)
    assert not in_fresh_process(is_left_out, "bitsandbytes", recipe_on(base, quantization=NF4), tmp_path)


def is_left_out(name: str) -> bool:
    return sys.modules.get(name, sys) is None


def divmod_by_zero(number: int) -> float:
    return number / 0
