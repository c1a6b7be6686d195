"""What `evaluate` measures: every token once, before and after in one model; what was forgotten, and what helps."""

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from lora_recipes.cli import main
from lora_recipes.data.audit import audit
from lora_recipes.data.load import load_data
from lora_recipes.evaluate import Pair
from lora_recipes.model.adapted import attach_adapter
from lora_recipes.model.build import end_token_ids, load_base, load_merged, load_tokenizer
from lora_recipes.model.compare import (
    Difference,
    Row,
    differences,
    logits_at,
    pieces,
    prompt_row,
    record,
    trained_row,
)
from lora_recipes.model.machine import choose
from lora_recipes.model.source import locate
from lora_recipes.recipe import load_recipe
from lora_recipes.run_dir import RunDir, read_json
from lora_recipes.train import launch
from tests.conftest import NF4, ROOT, publish_anew

CHAT = [
    {"messages": [{"role": "user", "content": f"what is {n}"}, {"role": "assistant", "content": f"the number {n}"}]}
    for n in range(8)
]
TEXT = [{"text": f"Rivers run to the sea, and number {n} of them is slow."} for n in range(4)]
LENIENT = {"max_loss_increase": 1000.0, "max_kl": 1000.0}


@pytest.fixture
def general(workdir: Path) -> list[str]:
    """A file of general chat and one of general text."""
    for name, rows in (("chat", CHAT), ("text", TEXT)):
        (workdir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["chat.jsonl", "text.jsonl"]


@pytest.fixture
def evaluated(write_recipe: Callable[..., Path], general: list[str], capsys: pytest.CaptureFixture) -> Callable:
    """Trains (once) and evaluates; returns (exit code, the JSON that is printed)."""

    def run(*words: str, forgetting: dict[str, Any] = LENIENT, **sections: Any) -> tuple[int, dict[str, Any]]:
        checks = {"min_stopped": 0, "forgetting": {"data_files": general} | forgetting}
        path = write_recipe(checks=checks, **sections)
        if not RunDir.of("tiny").status.exists():
            assert launch(str(path), []) == 0
        capsys.readouterr()
        code = main(["evaluate", str(path), "--json", *words])
        return code, json.loads(capsys.readouterr().out)

    return run


def rows_of(path: Path) -> list[Row]:
    recipe = load_recipe(path)
    tokenizer = load_tokenizer(recipe, locate(recipe))
    held = load_data(recipe, tokenizer, set(end_token_ids(recipe, locate(recipe), tokenizer))).heldout()
    return [row for item in held if (row := trained_row(item["input_ids"], item["labels"])) is not None]


def adapted(path: Path) -> Any:
    recipe = load_recipe(path)
    return attach_adapter(load_base(recipe, locate(recipe), choose(recipe, training=False)), RunDir.of("tiny").adapter)


def plain_loss(model: Any, rows: list[Row]) -> float:
    """The definition, over all tokens at once."""
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].float()
        losses.append(cross_entropy(logits[row.positions], torch.tensor(row.targets), reduction="none"))
    return torch.cat(losses).mean().item()


def test_the_loss_is_the_mean_over_tokens_of_adapter_and_base(evaluated: Callable):
    code, report = evaluated()
    assert code == 0 and report["improved"] and report["passed"]
    rows, model = rows_of(Path("tiny.yaml")), adapted(Path("tiny.yaml"))
    assert report["eval_rows"] == len(rows) == 6 and report["eval_tokens"] == sum(len(row.targets) for row in rows)
    assert len({len(row.targets) for row in rows}) > 1  # else the mean of means would be the same
    assert report["eval_loss"]["adapter"] == pytest.approx(plain_loss(model, rows), abs=1e-5)
    with model.disable_adapter():
        assert report["eval_loss"]["base"] == pytest.approx(plain_loss(model, rows), abs=1e-5)
    assert report["perplexity"]["base"] == pytest.approx(2.718281828 ** report["eval_loss"]["base"], rel=1e-6)
    assert report == {**report, **read_json(RunDir.of("tiny").evaluation)}


def test_general_text_counts_whole_and_general_chat_by_its_answers(evaluated: Callable):
    _, report = evaluated()
    files = report["forgetting"]["files"]
    assert files["chat.jsonl"]["rows"] == 8 and files["text.jsonl"]["rows"] == 4
    assert files["text.jsonl"]["tokens"] / 4 > files["chat.jsonl"]["tokens"] / 8
    whole = report["forgetting"]
    assert whole["tokens"] == sum(found["tokens"] for found in files.values())
    mean = sum(found["loss_after"] * found["tokens"] for found in files.values()) / whole["tokens"]
    assert whole["loss_after"] == pytest.approx(mean, rel=1e-9)
    assert whole["kl"] > 0


def test_an_adapter_that_changes_nothing_has_learnt_and_forgotten_nothing(evaluated: Callable):
    evaluated()
    adapter = RunDir.of("tiny").adapter
    weights = adapter / "adapter_model.safetensors"
    tensors = {name: value * ("lora_B" not in name) for name, value in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    publish_anew(adapter)
    code, report = evaluated(forgetting={"max_loss_increase": 0.0, "max_kl": 1e-9})
    assert code == 4 and report["improved"] is False  # equal is not better
    assert report["forgetting"]["kl"] == 0 and report["forgetting"]["passed"]


def test_forgetting_beyond_the_threshold_is_refused_with_advice(evaluated: Callable):
    _, before = evaluated()
    rise = before["forgetting"]["loss_after"] - before["forgetting"]["loss_before"]
    just_enough = {"max_loss_increase": max(rise, 0) + 1e-6, "max_kl": before["forgetting"]["kl"] + 1e-6}
    assert evaluated(forgetting=just_enough)[0] == 0
    code, report = evaluated(forgetting=just_enough | {"max_kl": before["forgetting"]["kl"] - 1e-6})
    assert code == 4 and not report["forgetting"]["passed"] and report["verdict"] == "do not ship"
    advice = "\n".join(report["advice"])
    assert "training.learning_rate=3.3e-03" in advice and "lora.r=2" not in advice and "--mix tiny-mixed" in advice


def test_the_mixed_recipe_holds_a_tenth_of_general_rows_that_are_not_measured_then(
    evaluated: Callable, general: list[str], capsys: pytest.CaptureFixture
):
    _, report = evaluated("--mix", "blend")
    assert Path(report["mixed"]).name == "blend.yaml"
    recipe = load_recipe(report["mixed"])
    tokenizer = load_tokenizer(recipe, locate(recipe))
    data = load_data(recipe, tokenizer, set(end_token_ids(recipe, locate(recipe), tokenizer)))
    own, mixed = (len(rows.train.indices[data.again(rows)]) for rows in data.sources)
    assert own == 24 and mixed == 3  # 24 + 2.67: a tenth of the whole
    assert not audit(data, 4, 4)["problems"]
    assert launch(report["mixed"], []) == 0
    capsys.readouterr()
    main(["evaluate", report["mixed"], "--json"])
    after = json.loads(capsys.readouterr().out)["forgetting"]["files"]["chat.jsonl"]
    assert (after["rows"], after["trained_on"]) == (4, 4)


def test_without_held_out_rows_nothing_is_said_to_be_learnt(write_recipe: Callable, evaluated: Callable):
    data = {"path": "json", "data_files": {"train": "chat.jsonl"}, "split": "train", "eval_split": None}
    code, report = evaluated(dataset=data, forgetting=LENIENT | {"data_files": "text.jsonl"})
    assert code == 4 and report["improved"] is None and report["eval_loss"] == {}
    assert report["gates"]["improved"] is None and report["verdict"] == "do not ship"


def test_rows_that_were_all_trained_on_measure_nothing(evaluated: Callable):
    data = {"path": "json", "data_files": {"train": "chat.jsonl"}, "split": "train", "eval_split": None}
    code, report = evaluated(dataset=data, forgetting=LENIENT | {"data_files": "chat.jsonl"})
    assert code == 2 and "holds a row that the run did not train on" in report["error"]["message"]


def test_general_rows_that_are_not_there_are_asked_for(evaluated: Callable):
    code, report = evaluated(forgetting={"data_files": "nowhere.jsonl"})
    assert code == 2 and "no file nowhere.jsonl" in report["error"]["message"]


def test_a_file_without_a_row_that_can_be_read_is_named_with_its_first(evaluated: Callable):
    Path("broken.jsonl").write_text('{"text": 5}\n[]\n')
    code, report = evaluated(forgetting={"data_files": ["chat.jsonl", "broken.jsonl"]})
    message = report["error"]["message"]
    assert code == 2 and "no row of broken.jsonl can be read" in message and "broken.jsonl:1: `text`" in message


def test_general_rows_may_lie_in_any_file_that_data_may(evaluated: Callable, workdir: Path):
    pandas.DataFrame(CHAT).to_parquet("chat.parquet")
    Path("text.txt").write_text("".join(f"{row['text']}\n" for row in TEXT))
    Path("chat.jsonl.gz").write_bytes(gzip.compress(Path("chat.jsonl").read_bytes()))
    kinds = ["chat.parquet", "text.txt", "chat.jsonl.gz"]
    code, report = evaluated("--mix", "blend", forgetting=LENIENT | {"data_files": kinds})
    assert code == 0
    assert [found["rows"] for found in report["forgetting"]["files"].values()] == [8, 4, 8]
    assert load_recipe(report["mixed"]).get("dataset.1.path") == "parquet"


def test_a_file_of_no_known_kind_never_becomes_the_name_of_a_data_set(evaluated: Callable):
    Path("general.rows").write_text(Path("chat.jsonl").read_text())
    code, report = evaluated(forgetting={"data_files": "general.rows"})
    assert code == 2 and "general.rows is of no known kind; known endings: .jsonl" in report["error"]["message"]


def test_words_of_the_command_line_are_in_the_mixed_recipe_and_in_the_advice(evaluated: Callable):
    _, report = evaluated("--mix", "blend", "generation.max_new_tokens=7", "checks.forgetting.max_kl=1e-9")
    mixed = load_recipe(report["mixed"])
    assert mixed.get("generation.max_new_tokens") == 7 and mixed.get("checks.forgetting.max_kl") == 1e-9
    assert all("generation.max_new_tokens=7" in line for line in report["advice"]) and report["advice"]


def test_a_text_recipe_on_a_model_without_a_template_mixes_in_text(
    write_recipe: Callable[..., Path], general: list[str], workdir: Path, capsys: pytest.CaptureFixture
):
    model = untemplated(load_recipe(write_recipe()).get("model.pretrained_model_name_or_path"), workdir / "plain")
    rows = [{"text": f"A field of barley, and in it {n} hares that nobody counts."} for n in range(20)]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": "json", "data_files": {"train": "own.jsonl"}, "split": "train", "eval_split": 0.2}
    checks = {"min_stopped": 0, "forgetting": LENIENT | {"data_files": general}}
    named, whole = {"pretrained_model_name_or_path": str(model)}, {"assistant_only_loss": False}
    path = write_recipe(model=named, dataset=data, checks=checks, training=whole)
    assert launch(str(path), []) == 0
    capsys.readouterr()
    main(["evaluate", str(path), "--json", "--mix", "blend"])
    report = json.loads(capsys.readouterr().out)
    assert load_recipe(report["mixed"]).get("dataset.1.data_files.train") == "text.jsonl"
    assert launch(report["mixed"], []) == 0


def untemplated(model: str, to: Path) -> Path:
    shutil.copytree(model, to)
    (to / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((to / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (to / "tokenizer_config.json").write_text(json.dumps(config))
    return to


def test_the_shipped_general_rows_can_all_be_read(evaluated: Callable, workdir: Path):
    (workdir / "data").symlink_to(ROOT / "data")
    words = [f"checks.forgetting.data_files={json.dumps([str(f) for f in general_files()])}"]
    words.append("checks.forgetting.max_rows=1000")
    _, report = evaluated(*words)
    files = report["forgetting"]["files"]
    assert sum(found["rows"] for found in files.values()) >= 200
    assert all(found["unusable"] == 0 for found in files.values())


def general_files() -> list[Path]:
    return [Path("data/general/chat.jsonl"), Path("data/general/text.jsonl")]


def test_a_quantized_run_is_measured_as_it_was_trained(evaluated: Callable):
    code, report = evaluated(quantization=NF4)
    assert code == 0
    assert report["eval_loss"]["adapter"] == pytest.approx(
        plain_loss(adapted(Path("tiny.yaml")), rows_of(Path("tiny.yaml"))), abs=1e-4
    )


def test_full_fine_tuning_is_measured_against_the_base(evaluated: Callable):
    code, report = evaluated(lora=None, training={"learning_rate": 1e-3})
    assert code == 0 and report["improved"] and report["forgetting"]["kl"] > 0
    recipe = load_recipe("tiny.yaml")
    merged = load_merged(RunDir.of("tiny").merged, recipe, choose(recipe, training=False))
    assert report["eval_loss"]["adapter"] == pytest.approx(plain_loss(merged, rows_of(Path("tiny.yaml"))), abs=1e-4)


def test_tasks_need_the_extra_and_say_how_to_get_it(evaluated: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, report = evaluated("--tasks", "piqa")
    assert code == 3 and "pip install 'lora-recipes[eval]'" in report["error"]["message"]


def test_a_local_task_is_run_before_and_after(evaluated: Callable, workdir: Path):
    pytest.importorskip("lm_eval")
    folder = workdir / "tasks"
    folder.mkdir()
    rows = [{"question": f"{n} pens", "choices": ["a", "b"], "answer": n % 2} for n in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "pens",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "pens.yaml").write_text(json.dumps(task))
    _, report = evaluated("--tasks", "pens", "--include_path", "tasks")
    assert set(report["tasks"]["pens"]) == {"base", "adapter"}
    assert all(0 <= report["tasks"]["pens"][who]["acc,none"] <= 1 for who in ("base", "adapter"))
    code, refused = evaluated("--tasks", "pns", "--include_path", "tasks")
    assert code == 2 and "knows no such task" in refused["error"]["message"]


def test_an_unknown_folder_of_tasks_is_refused(evaluated: Callable, monkeypatch: pytest.MonkeyPatch):
    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks"):
        module = ModuleType(name)
        module.simple_evaluate = module.HFLM = module.TaskManager = None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    code, report = evaluated("--tasks", "pens", "--include_path", "nowhere")
    assert code == 2 and "no such folder" in report["error"]["message"]


# -- the arithmetic -----------------------------------------------------------------------------------------------------


def test_differences_are_zero_to_itself_and_sums_over_tokens(tiny_model: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    rows = [prompt_row(list(range(3, 23)), 8), Row(list(range(5, 15)), [2, 5], [9, 1])]
    record(model, rows, tmp_path)
    same = differences(model, rows, tmp_path)
    assert same["max_abs_logit_difference"] == same["mean_kl"] == 0 and same["top1_agreement"] == 1
    assert same["tokens"] == 10 and same["loss"] == same["reference_loss"]
    model.model.layers[0].mlp.down_proj.weight.data += 0.05
    other = differences(model, rows, tmp_path)
    assert other["mean_kl"] > 0 and other["reference_loss"] == pytest.approx(same["loss"])
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([rows[0].input_ids])).logits[0, -8:]
    torch.testing.assert_close(logits_at(model, rows[0]), whole)


def test_a_row_of_many_logits_is_compared_in_pieces_with_the_same_sums(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    other = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    other.model.layers[0].mlp.down_proj.weight.data += 0.05
    ids = [int(token) for token in torch.randint(3, 100, (40,), generator=torch.Generator().manual_seed(0))]
    row = trained_row(ids, [-100] * 10 + ids[10:])
    whole = Pair(other, model).difference([row])
    monkeypatch.setattr("lora_recipes.model.compare.TOGETHER", 7 * model.config.vocab_size)
    monkeypatch.setattr("lora_recipes.model.compare.BLOCK", 3)
    parts = pieces(row, model.config.vocab_size)
    assert [len(part.targets) for part in parts] == [7, 7, 7, 7, 2] and len(parts[0].input_ids) == 16
    pieced = Pair(other, model).difference([row])
    assert pieced.tokens == whole.tokens == 30 and pieced.same_top == whole.same_top
    assert pieced.as_json() == pytest.approx(whole.as_json(), rel=1e-4)


def test_nan_shows_in_every_measure():
    found = Difference()
    clean = torch.zeros(2, 4)
    broken = clean.clone()
    broken[1, 2] = float("nan")
    found.add(clean, broken, [1, 1])
    found.add(clean, clean, [1, 1])
    told = found.as_json()
    assert all(told[name] != told[name] for name in ("max_abs_logit_difference", "mean_kl", "loss"))


def test_a_row_is_looked_at_where_the_next_token_is_trained():
    row = trained_row([5, 6, 7, 8], [-100, -100, 7, 8])
    assert row == Row([5, 6, 7, 8], [1, 2], [7, 8])
    assert trained_row([5, 6], [5, -100]) is None  # nothing comes before the first token
    assert trained_row([5, 6, 7, 8], [-100, -100, 7, 8], last=1) == Row([5, 6, 7, 8], [2], [8])


def test_trained_biases_are_no_part_of_the_base(
    write_recipe: Callable[..., Path], general: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    """PEFT leaves them in when an adapter is switched off; the base's loss must be that of the base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    recipe = load_recipe(write_recipe())
    tiny = recipe.get("model.pretrained_model_name_or_path")
    values = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**values)).save_pretrained(tmp_path / "biased")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "biased")
    checks = {"min_stopped": 0, "forgetting": LENIENT | {"data_files": general}}
    path = write_recipe(
        model={"pretrained_model_name_or_path": str(tmp_path / "biased")}, lora={"bias": "all"}, checks=checks
    )
    assert launch(str(path), []) == 0
    capsys.readouterr()
    assert main(["evaluate", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "biased")
    assert report["eval_loss"]["base"] == pytest.approx(plain_loss(base, rows_of(path)), abs=1e-5)
    model = adapted(path)
    with model.disable_adapter():  # the control: this is what must not be taken for the base
        assert abs(plain_loss(model, rows_of(path)) - report["eval_loss"]["base"]) > 1e-3


def test_what_was_measured_is_kept_when_the_mixed_recipe_cannot_be_written(evaluated: Callable):
    code, report = evaluated("--mix", "tiny")  # exists
    assert code == 2 and "exists and is left as it is" in report["error"]["message"]
    assert read_json(RunDir.of("tiny").evaluation)["improved"] is True
