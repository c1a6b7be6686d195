"""Answers of every model side by side, and the gates over them: each planted fault is refused, the good model passes."""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_recipes.cli import main
from lora_recipes.data.load import load_data
from lora_recipes.data.questions import DialogueForm, dialogue_form
from lora_recipes.errors import EXIT_REFUSED, EXIT_USER, MachineError, RunError
from lora_recipes.generate import generate
from lora_recipes.merge import merge
from lora_recipes.model.answer import answer, generation_config
from lora_recipes.model.build import end_token_ids, load_tokenizer
from lora_recipes.model.source import locate
from lora_recipes.recipe import load_recipe
from lora_recipes.run_dir import RunDir, file_sha256, read_jsonl
from lora_recipes.train import launch
from tests.conftest import publish_anew

# Three short answers, which a tiny model knows by heart after some seconds.
LEARNT = {"two pens": '{"size":2}', "red or blue": "blue", "who is there": "only me"}
END = 2  # <|im_end|> of the tiny model
OPENING = 1  # <|im_start|>


def trained(path: Path) -> RunDir:
    assert launch(str(path), []) == 0
    return RunDir.of(path.stem)


def write_rows(file: Path, pairs: dict[str, str]) -> str:
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in pairs.items()
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def known_by_heart(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a run that was trained and merged until it answers LEARNT, and stops; read only."""
    folder = tmp_path_factory.mktemp("known")
    rows = write_rows(folder / "rows.jsonl", LEARNT)
    sections = {
        "model": {"pretrained_model_name_or_path": str(tiny_model)},
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "dataset": {
            "path": "json",
            "data_files": {"train": rows, "heldout": rows},
            "split": "train",
            "eval_split": "heldout",
            "overlap": "allow",
        },
        "training": {
            "max_length": 64,
            "max_steps": 200,
            "per_device_train_batch_size": 3,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "linear",
            "activation_checkpointing": False,
            "assistant_only_loss": True,
            "bf16": True,
            "save_strategy": "no",
            "disable_tqdm": True,
        },
        "generation": {"max_new_tokens": 24},
        "merge": {"dtype": "float32"},
    }
    (folder / "known.yaml").write_text(json.dumps(sections), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trained(Path("known.yaml"))
        merge(load_recipe("known.yaml"))
    return folder


@pytest.fixture
def known(known_by_heart: Path, workdir: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs `generate --json` on a copy of that run with `checks` of one's own: exit code and what it printed."""
    shutil.copytree(known_by_heart, workdir, dirs_exist_ok=True)

    def run(*words: str, prompts: list[dict[str, Any]] | None = None) -> tuple[int, dict[str, Any]]:
        checks = [f"checks.prompts={json.dumps(prompts)}"] if prompts is not None else []
        return asked("known.yaml", *words, *checks)

    return run


def asked(*words: str) -> tuple[int, dict[str, Any]]:
    """`generate --json` with these words: its exit code, and what it printed."""
    printed = StringIO()
    with redirect_stdout(printed):
        code = main(["generate", *words, "--json"])
    return code, json.loads(printed.getvalue())


GOOD = [
    {"prompt": "two pens", "json": {"type": "object", "required": ["size"]}, "differs_from_base": True},
    {"prompt": "red or blue", "equals": "blue", "regex": "^b"},
    {"prompt": "who is there", "contains": ["only", "me"]},
]
ALL_SCORES = "checks.scores={exact_match: {min: 1}, field_match: {min: 1}, token_f1: {min: 1}}"


def test_a_model_that_learnt_its_rows_meets_every_kind_of_check(known: Callable):
    code, found = known(ALL_SCORES, "checks.min_stopped=1", prompts=GOOD)
    assert (code, found["failed"]) == (0, [])
    for who in ("adapter", "merged"):
        assert found["scores"][who]["exact_match"] == found["scores"][who]["stops"] == found["stopped"][who] == 1.0
    assert found["scores"]["base"]["exact_match"] == 0.0
    rows = read_jsonl(RunDir.of("known").generations)
    assert [row["prompt"] for row in rows] == [entry["prompt"] for entry in GOOD] + list(LEARNT)
    assert [row["expectation"] for row in rows[:3]] == [{"stops": True} | entry for entry in GOOD]
    assert rows[0]["adapter"] == {"text": '{"size":2}', "stopped": "eos", "failed": []}
    assert {failed["check"] for failed in rows[1]["base"]["failed"]} == {"equals", "regex", "stops"}
    assert all("expectation" not in row and "failed" not in row["adapter"] for row in rows[3:])


@pytest.mark.parametrize(
    "expectation",
    [
        {"contains": ["only", "you"]},
        {"equals": "only"},
        {"regex": "^me"},
        {"json": True},
        {"max_new_tokens": 1},
    ],
)
def test_an_answer_that_fails_an_expectation_is_refused_by_name(
    known: Callable, capsys: pytest.CaptureFixture, expectation: dict[str, Any]
):
    good = {"prompt": "red or blue", "equals": "blue"}
    code, found = known("checks.min_stopped=0", prompts=[good, {"prompt": "who is there"} | expectation])
    assert code == 4
    check = "stops" if "max_new_tokens" in expectation else next(iter(expectation))
    assert [(failed["model"], failed["prompt"], failed["check"]) for failed in found["failed"]] == [
        ("adapter", "who is there", check),
        ("merged", "who is there", check),
    ]
    assert all("only me".startswith(failed["answer"]) for failed in found["failed"])
    told = " ".join(capsys.readouterr().err.split())
    line = found["failed"][0]["line"]
    assert f"failed: adapter, prompt 'who is there' (generations.jsonl:{line}): {check}" in told


def test_json_of_another_schema_is_refused_with_the_field(known: Callable):
    schema = {"properties": {"size": {"type": "string"}}}
    code, found = known(prompts=[{"prompt": "two pens", "json": schema}])
    assert code == 4 and "$.size" in found["failed"][0]["found"]


def test_a_model_that_answers_as_the_base_does_is_refused(known: Callable):
    """The adapter is switched off by a zero B: it answers what the base answers."""
    weights = RunDir.of("known").adapter / "adapter_model.safetensors"
    tensors = {name: value * ("lora_B" not in name) for name, value in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    publish_anew(weights.parent)
    shutil.rmtree(RunDir.of("known").merged)
    prompts = [{"prompt": "two pens", "differs_from_base": True, "stops": False}]
    code, found = known("checks.min_stopped=0", prompts=prompts)
    assert code == 4
    assert [(failed["model"], failed["check"]) for failed in found["failed"]] == [("adapter", "differs_from_base")]


@pytest.mark.parametrize("score", ["exact_match", "field_match", "token_f1"])
def test_a_score_under_its_least_value_is_refused(known: Callable, workdir: Path, score: str):
    write_rows(workdir / "heldout.jsonl", {"two pens": '{"size":3}'})
    heldout = ["dataset.data_files.heldout=heldout.jsonl"]
    change_recorded_recipe(heldout)
    code, found = known(*heldout, f"checks.scores={{{score}: {{min: 0.9}}}}")
    assert code == 4
    assert {(failed["model"], failed["check"]) for failed in found["failed"]} == {("adapter", score), ("merged", score)}


def change_recorded_recipe(overrides: list[str]) -> None:
    """The run is asked about other held-out rows than it was trained beside; what is recorded of them goes."""
    recipe = load_recipe("known.yaml", overrides)
    Path("known.yaml").write_text(json.dumps(recipe.plain()), encoding="utf-8")


def test_a_score_that_nothing_measures_is_refused(known: Callable, workdir: Path):
    write_rows(workdir / "heldout.jsonl", {"red or blue": "blue"})  # no JSON, so it has no fields
    heldout = ["dataset.data_files.heldout=heldout.jsonl"]
    change_recorded_recipe(heldout)
    code, found = known(*heldout, "checks.scores={exact_match: {min: 1}, field_match: {min: 0}}")
    assert code == 4
    assert {(failed["check"], failed["found"]) for failed in found["failed"]} == {("field_match", None)}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Damage a merged model: its head is untied first, so that what it reads stays as it was."""
    tensors = load_file(folder / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    publish_anew(folder)  # as if it had been published so: what is changed later is refused for that alone


def test_untying_the_head_alone_changes_no_answer(known: Callable):
    """The control of the two tests below: what they plant is the fault, and not the way it is planted."""
    rewrite(RunDir.of("known").merged, lambda tensors: None)
    assert known(prompts=GOOD)[0] == 0


def test_a_model_that_never_stops_is_refused(known: Callable, capsys: pytest.CaptureFixture):
    def never(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][END] = 0.0  # the logit of the end token is 0, and that of what follows higher

    rewrite(RunDir.of("known").merged, never)
    code, found = known()
    assert code == 4 and found["stopped"] == {"base": found["stopped"]["base"], "adapter": 1.0, "merged": 0.0}
    [failure] = found["failed"]
    assert (failure["check"], failure["model"], failure["expected"], failure["found"]) == (
        "min_stopped",
        "merged",
        0.95,
        0.0,
    )
    assert failure["examples"][0]["prompt"] in LEARNT
    assert "merged: min_stopped must be at least 0.95" in " ".join(capsys.readouterr().err.split())


def test_a_model_that_leaks_a_control_token_is_refused(known: Callable):
    def leaks(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors["lm_head.weight"]
        head[[END, OPENING]] = head[[OPENING, END]]  # where it would stop it opens a turn

    rewrite(RunDir.of("known").merged, leaks)
    code, found = known(prompts=[{"prompt": "two pens"}])
    assert code == 4
    assert [(failed["model"], failed["check"], failed["found"]) for failed in found["failed"]] == [
        ("merged", "stops", "leaks '<|im_start|>'"),
        ("merged", "min_stopped", 0.0),
    ]


def test_a_model_trained_without_its_end_token_is_refused(
    known: Callable, write_recipe: Callable[..., Path], workdir: Path
):
    """Rows that were tokenized before, cut just before the end token: the usual way to a model that never stops."""
    recipe = load_recipe("known.yaml")
    tokenizer = AutoTokenizer.from_pretrained(recipe.get("model.pretrained_model_name_or_path"))
    with (workdir / "cut.jsonl").open("w") as stream:
        for question, said in LEARNT.items():
            prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            head, tail = tokenizer(prompt)["input_ids"], tokenizer(said + "\n" + said)["input_ids"]
            labels = [-100] * len(head) + tail
            stream.write(json.dumps({"input_ids": head + tail, "labels": labels}) + "\n")
    path = write_recipe(
        lora={"r": 16, "lora_alpha": 32},
        dataset={"data_files": {"train": "cut.jsonl"}, "eval_split": None},
        training={"max_steps": 40, "learning_rate": 2e-2, "assistant_only_loss": False},
        generation={"prompts": list(LEARNT), "max_new_tokens": 24},
        checks=None,
    )
    assert launch(str(path), []) == 0
    code, found = asked(str(path))
    assert code == 4 and [failed["check"] for failed in found["failed"]] == ["min_stopped"]


def test_every_row_says_which_adapter_answered(known: Callable):
    known()
    run_dir = RunDir.of("known")
    expected = file_sha256(run_dir.adapter / "adapter_model.safetensors")
    assert {row["adapter_sha256"] for row in read_jsonl(run_dir.generations)} == {expected}


def test_a_prompt_has_a_limit_of_its_own(known: Callable):
    prompts = [
        {"prompt": "who is there", "max_new_tokens": 1, "stops": False, "regex": "^."},
        {"prompt": "who is there"},
        {"prompt": "two pens", "max_new_tokens": 1, "stops": False, "regex": "^."},
    ]
    code, found = known(prompts=prompts)
    assert code == 0  # what need not stop does not count against min_stopped
    rows = read_jsonl(RunDir.of("known").generations)
    assert [row["adapter"]["stopped"] for row in rows[:3]] == ["length", "eos", "length"]
    assert rows[1]["adapter"]["text"] == "only me" and rows[0]["adapter"]["text"] != "only me"
    assert found["scores"]["adapter"]["stopped_by_eos"] == round(4 / 6, 4)


@pytest.mark.promise("G1")
def test_answers_have_a_limit_of_time(known: Callable, capsys: pytest.CaptureFixture):
    """So short that one token is made; the failure says which prompt, and where its transcript is."""
    code, found = known("generation.max_time=1e-6", prompts=[{"prompt": "who is there"}])
    rows = read_jsonl(RunDir.of("known").generations)
    assert code == EXIT_REFUSED and {row["adapter"]["stopped"] for row in rows} == {"time"}
    failed = next(one for one in found["failed"] if one["check"] == "stops")
    assert failed["found"] == "ran into the limit of time" and rows[failed["line"] - 1]["prompt"] == "who is there"
    assert f"(generations.jsonl:{failed['line']})" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "prompts", "said"),
    [
        (["generation.max_new_tokens=600"], [], "600 new ones are more than the 512 positions"),
        ([], [{"prompt": "who is there", "max_new_tokens": 505}], "505 new ones are more than the 512 positions"),
        ([], [{"prompt": "who is there " * 200}], "ask less, or ask no held-out rows (generation.max_rows=0)"),
        (["generation.bad_words_ids=[]"], [], "`bad_words_ids` has to be a non-empty list"),
    ],
)
def test_what_no_answer_can_be_made_with_is_told_before_weights_are_loaded(
    known: Callable, monkeypatch: pytest.MonkeyPatch, words: list[str], prompts: list[dict[str, Any]], said: str
):
    monkeypatch.setattr("lora_recipes.generate.load_base", lambda *args: pytest.fail("the weights were loaded"))
    code, found = known(*words, prompts=prompts)
    assert code == EXIT_USER and said in str(found)


def test_an_answer_may_fill_the_positions_of_the_model(known: Callable):
    prompts = [{"prompt": "who is there", "max_new_tokens": 480}]
    assert known("checks.min_stopped=0", "generation.max_rows=0", prompts=prompts)[0] == 0


def test_limits_change_nothing_but_the_length(tiny_model: Path):
    model, tokenizer = (loader.from_pretrained(tiny_model) for loader in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.pad_token = tokenizer.eos_token
    prompts = [list(range(5, 5 + length)) for length in (9, 3, 7, 3, 5)]
    config = generation_config({"max_new_tokens": 6}, [END], tokenizer)
    whole = answer(model, tokenizer, prompts, config, 2, seed=0)
    limited = answer(model, tokenizer, prompts, config, 2, seed=0, limits=[None, 2, 4, None, 2])
    assert [one == other for one, other in zip(whole, limited, strict=True)] == [True, False, False, True, False]
    assert all(one.text.startswith(other.text) for one, other in zip(whole, limited, strict=True))
    assert config.max_new_tokens == 6


def form_of(path: Path) -> DialogueForm:
    recipe = load_recipe(path)
    tokenizer = load_tokenizer(recipe, locate(recipe))
    return dialogue_form(load_data(recipe, tokenizer, set(end_token_ids(recipe, locate(recipe), tokenizer))))


HARMONY = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant<|endoftext|>"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "inside", "turns"),
    [
        (None, set(), set()),
        ("human_assistant", set(), {"Human:", "Assistant:"}),
        ("alpaca", set(), {"### Instruction:", "### Response:"}),
        ("harmony.jinja", {"<|endoftext|>"}, set()),  # the answer itself begins with a control token
    ],
)
def test_the_form_of_a_dialogue_is_read_off_its_template(
    write_recipe: Callable[..., Path], workdir: Path, template: str | None, inside: set[str], turns: set[str]
):
    (workdir / "harmony.jinja").write_text(HARMONY)
    path = write_recipe(training={"chat_template_path": template} if template else {})
    form = form_of(path)
    assert form.controls == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert (form.inside, form.turns) == (inside, turns)


def test_generate_asks_all_three_models_the_same_questions(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    path = write_recipe(generation={"max_new_tokens": 6, "prompts": ["two pens please"], "batch_size": 2})
    run_dir = trained(path)
    merge(load_recipe(path))
    capsys.readouterr()
    assert main(["generate", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = read_jsonl(run_dir.generations)
    assert len(rows) == 7 and rows[0]["expected"] is None and rows[1]["expected"].startswith('{"customer"')
    assert all(
        set(row) == {"prompt", "expected", "adapter_sha256", "merged_sha256", "base", "adapter", "merged"}
        for row in rows
    )
    assert {row["base"]["stopped"] for row in rows} <= {"eos", "length"}
    assert result["merged_equals_adapter"] == 1.0
    assert result["scores"]["base"]["asked"] == 7 and result["scores"]["base"]["expected"] == 6


def test_batched_answers_are_the_answers_asked_one_by_one(write_recipe: Callable[..., Path]):
    path = write_recipe()
    run_dir = trained(path)
    answers = []
    for size in (1, 4):
        generate(load_recipe(path, [f"generation.batch_size={size}"]))
        answers.append([row["adapter"]["text"] for row in read_jsonl(run_dir.generations)])
    assert answers[0] == answers[1]


def test_generate_writes_nowhere_before_it_knows_that_it_can(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    path = write_recipe()
    trained(path)
    monkeypatch.setattr(RunDir, "require_writable", lambda self: (_ for _ in ()).throw(MachineError("read-only")))
    assert main(["generate", str(path)]) == 3


def test_a_stop_string_ends_an_answer(write_recipe: Callable[..., Path]):
    path = write_recipe(training={"max_steps": 60}, generation={"max_new_tokens": 8})  # enough to write something
    run_dir = trained(path)
    generate(load_recipe(path))
    before = [row["adapter"] for row in read_jsonl(run_dir.generations)]
    assert {given["stopped"] for given in before} == {"length"}
    first = before[0]["text"][0]
    generate(load_recipe(path, [f"generation.stop_strings={json.dumps(first)}"]))
    after = [row["adapter"] for row in read_jsonl(run_dir.generations)]
    for long, short in zip(before, after, strict=True):  # the token that holds the stop string is kept
        assert short["stopped"] == "eos" and first in short["text"]
        assert long["text"].startswith(short["text"]) and len(short["text"]) < len(long["text"])


def test_the_served_model_is_one_more_column_and_is_held_against_the_checks(
    known: Callable, monkeypatch: pytest.MonkeyPatch
):
    """The server itself is proved in its own tests; here it is a function that answers."""
    calls: list[tuple[list[dict[str, Any]], int]] = []

    def answers(folder: Path, conversations: list[list[dict[str, Any]]], max_new_tokens: int) -> list[str]:
        assert folder == RunDir.of("known").merged
        calls.extend((messages, max_new_tokens) for messages in conversations)
        said = {"red or blue": "green\n", "who is there": "only me " * 30}
        return [said.get(asked := messages[-1]["content"], LEARNT[asked]) for messages in conversations]

    monkeypatch.setitem(sys.modules, "lora_recipes.model.served", SimpleNamespace(served_answers=answers))
    prompts = [{"prompt": "red or blue", "equals": "blue", "max_new_tokens": 9}]
    code, found = known("--served", prompts=prompts)
    assert sorted(limit for _, limit in calls) == [9, 24, 24, 24]
    assert all(messages == [{"role": "user", "content": messages[0]["content"]}] for messages, _ in calls)
    assert code == 4
    told = [(one["model"], one["check"], one["answer"], one["found"]) for one in found["failed"]]
    assert told == [("served", "equals", "green", "is something else"), ("served", "min_stopped", None, 0.75)]
    assert found["scores"]["served"]["asked"] == 4 and found["scores"]["served"]["exact_match"] == 0.3333
    rows = read_jsonl(RunDir.of("known").generations)
    assert [row["served"]["stopped"] for row in rows] == ["eos", "eos", "eos", "length"]
    assert rows[1]["served"] == rows[1]["merged"] == {"text": '{"size":2}', "stopped": "eos"}


def test_nothing_is_served_before_it_is_merged(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    path = write_recipe()
    trained(path)
    assert main(["generate", str(path), "--served"]) == 2
    assert f"lora-recipes merge {path}" in capsys.readouterr().err


def test_a_share_that_was_trained_on_is_not_scored(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    path = write_recipe(dataset={"eval_split": 0.2})
    assert launch(str(path), []) == 0
    assert main(["generate", str(path), "training.seed=7"]) == 2
    assert "rows that were trained on would be asked" in capsys.readouterr().err


def test_generate_needs_a_trained_adapter(write_recipe: Callable[..., Path]):
    with pytest.raises(RunError, match=r"accelerate launch run\.py"):
        RunDir.of("tiny").require_adapter(write_recipe())
