"""Exactly the assistant's tokens carry loss, and what cannot be trained on is named by file and line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_recipes.data import content
from lora_recipes.data.audit import audit, require_sound
from lora_recipes.data.check import check_data
from lora_recipes.data.load import LoadedData, load_data
from lora_recipes.data.masks import IGNORED
from lora_recipes.data.questions import questions
from lora_recipes.errors import DataError, RecipeError
from lora_recipes.model.build import end_token_ids, load_tokenizer
from lora_recipes.model.source import locate
from lora_recipes.recipe import Recipe, load_recipe
from tests.conftest import ROOT

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
LITERAL = {"chat_template_path": "human_assistant"}


def loaded(recipe: Recipe) -> LoadedData:
    """The recipe's data, of which a sound audit was seen."""
    source = locate(recipe)
    tokenizer = load_tokenizer(recipe, source)
    data = load_data(recipe, tokenizer, set(end_token_ids(recipe, source, tokenizer)))
    require_sound(audit(data, 1, 1))
    return data


def trained_text(recipe: Recipe, row: int = 0) -> str:
    data = loaded(recipe).train()[row]
    kept = [token for token, label in zip(data["input_ids"], data["labels"], strict=True) if label != IGNORED]
    return load_tokenizer(recipe, locate(recipe)).decode(kept)


def whole_text(recipe: Recipe, row: int = 0) -> str:
    return load_tokenizer(recipe, locate(recipe)).decode(loaded(recipe).train()[row]["input_ids"])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "`messages` is empty"),
        ({"messages": None}, "`messages` is null"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}, "is empty"),
        ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "y"}]}, "`content` is null"),
    ],
)
def test_a_bad_chat_row_is_named_by_file_and_line(recipe_on: Callable[..., Recipe], row: dict, said: str):
    with pytest.raises(DataError) as caught:
        check_data(recipe_on([GOOD, GOOD, row, GOOD]))
    assert str(caught.value).startswith("rows.jsonl:3: ")
    assert said in str(caught.value) and "1 of 4 rows" in str(caught.value)


def test_only_the_first_bad_rows_are_listed_and_all_are_counted(recipe_on: Callable[..., Recipe]):
    with pytest.raises(DataError) as caught:
        check_data(recipe_on([GOOD] + [{"messages": []}] * 30))
    assert len(str(caught.value).splitlines()) == 22
    assert "30 of 31 rows" in str(caught.value)


def test_broken_json_on_line_500_is_named(recipe_on: Callable[..., Recipe]):
    lines = [json.dumps(GOOD)] * 499 + [json.dumps(GOOD)[:30]] + [json.dumps(GOOD)] * 20
    with pytest.raises(DataError, match=r"^rows\.jsonl:500:\d+: broken JSON"):
        check_data(recipe_on(lines))


def test_blank_lines_do_not_shift_the_line_number(recipe_on: Callable[..., Recipe]):
    with pytest.raises(DataError, match=r"^rows\.jsonl:4: "):
        check_data(recipe_on([GOOD, "", GOOD, {"messages": []}]))


def test_text_that_is_not_utf8_is_named(write_recipe: Callable[..., Path], workdir: Path):
    (workdir / "latin.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    dataset = {"data_files": {"train": "latin.jsonl"}, "eval_split": None}
    with pytest.raises(DataError, match=r"latin\.jsonl:2: .*UTF-8"):
        check_data(load_recipe(write_recipe(dataset=dataset)))


def test_a_missing_file_is_named_with_the_recipes_line(write_recipe: Callable[..., Path]):
    recipe = load_recipe(write_recipe(dataset={"data_files": {"train": "nowhere.jsonl"}, "eval_split": None}))
    with pytest.raises(DataError, match=r"tiny\.yaml:\d+: no such data file: nowhere\.jsonl"):
        check_data(recipe)


def test_unknown_columns_are_named_with_the_formats_that_are_known(recipe_on: Callable[..., Recipe]):
    with pytest.raises(DataError, match=r"`ask`, `reply`.*`messages`"):
        check_data(recipe_on([{"ask": "a", "reply": "b"}]))


def test_an_empty_file_and_an_unknown_split_are_errors(
    recipe_on: Callable[..., Recipe], write_recipe: Callable[..., Path]
):
    with pytest.raises(DataError):
        check_data(recipe_on([]))
    with pytest.raises(DataError, match="split"):
        check_data(load_recipe(write_recipe(dataset={"split": "nope"})))


def test_only_the_assistants_turns_of_a_chat_carry_loss_each_with_its_end_token(recipe_on: Callable[..., Recipe]):
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second answer"},
    ]
    recipe = recipe_on([{"messages": chat}])
    assert trained_text(recipe) == "first answer<|im_end|>second answer<|im_end|>"
    assert whole_text(recipe).startswith("<|im_start|>system\nbe brief<|im_end|>\n")


def test_assistant_only_loss_false_trains_on_everything(recipe_on: Callable[..., Recipe]):
    recipe = recipe_on([GOOD], assistant_only_loss=False)
    assert trained_text(recipe) == whole_text(recipe)


@pytest.mark.parametrize("completion_only", [None, True])
def test_completion_rows_carry_loss_on_the_completion(recipe_on: Callable[..., Recipe], completion_only: bool | None):
    recipe = recipe_on([{"prompt": "2 + 2 =", "completion": " 4"}], completion_only_loss=completion_only)
    assert trained_text(recipe) == " 4<|im_end|>"


def test_completion_only_loss_false_trains_on_the_prompt_too(recipe_on: Callable[..., Recipe]):
    row = {"prompt": "2 + 2 =", "completion": " 4"}
    recipe = recipe_on([row], completion_only_loss=False, assistant_only_loss=False)
    assert trained_text(recipe) == whole_text(recipe)
    plain = recipe_on([row], completion_only_loss=False, assistant_only_loss=False, chat_template_path="plain")
    assert trained_text(plain) == "2 + 2 = 4<|im_end|>"
    with pytest.raises(DataError, match="which `assistant_only_loss: true` excludes"):
        check_data(recipe_on([row], completion_only_loss=False))


def test_completion_only_loss_on_rows_without_a_completion_is_refused_not_ignored(recipe_on: Callable[..., Recipe]):
    with pytest.raises(DataError, match=r"tiny\.yaml:\d+: `completion_only_loss` is for rows with"):
        check_data(recipe_on([GOOD], completion_only_loss=True))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [*GOOD["messages"], *GOOD["messages"]]}, r"rows\.jsonl:2: .*: only two messages"),
        ({"messages": GOOD["messages"], "tools": [{"name": "scale"}]}, r"rows\.jsonl:2: `tools` are left out"),
    ],
    ids=["the template raises", "the template knows no tools"],
)
def test_a_row_that_the_template_refuses_is_named_by_file_and_line(
    recipe_on: Callable[..., Recipe], workdir: Path, row: dict, said: str
):
    template = write_template(
        workdir,
        "{% if messages | length > 2 %}{{ raise_exception('only two messages') }}{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}",
    )
    with pytest.raises(DataError, match=said):
        loaded(recipe_on([GOOD, row], chat_template_path=template))


def test_white_space_inside_an_answer_carries_loss(recipe_on: Callable[..., Recipe]):
    text = "def f():\n        return 1\n    x"
    recipe = recipe_on([{"text": f"Human: code\nAssistant: {text}"}], **LITERAL)
    assert trained_text(recipe) == f" {text}<|im_end|>"
    assert trained_text(recipe_on([{"text": f"Human: code\nAssistant: {text}"}])) == f"{text}<|im_end|>"


def test_an_empty_prompt_is_refused(recipe_on: Callable[..., Recipe]):
    with pytest.raises(DataError, match="`prompt` is empty"):
        check_data(recipe_on([{"prompt": "", "completion": "x"}]))


def test_a_json_array_that_breaks_is_named_by_its_line(write_recipe: Callable[..., Path], workdir: Path):
    lines = json.dumps([GOOD] * 20, indent=1).splitlines()
    (workdir / "array.json").write_text("\n".join([*lines[:50], "!", *lines[50:]]), encoding="utf-8")
    recipe = load_recipe(write_recipe(dataset={"data_files": {"train": "array.json"}, "eval_split": None}))
    with pytest.raises(DataError, match=r"^array\.json:51:\d+: broken JSON"):
        check_data(recipe)


def test_the_cache_of_tokens_notices_a_change_of_the_masking_code(
    recipe_on: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
):
    recipe = recipe_on([GOOD])
    before = loaded(recipe).train().cache_files
    assert loaded(recipe).train().cache_files == before
    monkeypatch.setattr(content, "_code_version", lambda: "another")
    assert loaded(recipe).train().cache_files != before


def test_completions_of_messages_leave_earlier_answers_out(recipe_on: Callable[..., Recipe]):
    row = {
        "prompt": [*GOOD["messages"], {"role": "user", "content": "more"}],
        "completion": [{"role": "assistant", "content": "bye"}],
    }
    assert trained_text(recipe_on([row])) == "bye<|im_end|>"


def test_text_rows_carry_loss_on_what_the_assistant_says_in_each_turn(recipe_on: Callable[..., Recipe]):
    recipe = recipe_on([{"text": "Human: 你好\nAssistant: 你好！\nHuman: bye\nAssistant: See you."}], **LITERAL)
    assert trained_text(recipe) == " 你好！<|im_end|> See you.<|im_end|>"
    assert whole_text(recipe) == "Human: 你好\nAssistant: 你好！<|im_end|>\nHuman: bye\nAssistant: See you.<|im_end|>"


def test_the_text_column_may_have_another_name(recipe_on: Callable[..., Recipe]):
    recipe = recipe_on([{"body": "Human: a\nAssistant: b"}], dataset_text_field="body")
    assert trained_text(recipe) == "b<|im_end|>"


def test_text_without_an_assistant_is_an_error_unless_all_of_it_is_to_be_learnt(recipe_on: Callable[..., Recipe]):
    with pytest.raises(DataError, match="no line that begins with `Assistant:`"):
        check_data(recipe_on([{"text": "plain prose"}]))
    assert trained_text(recipe_on([{"text": "plain prose"}], assistant_only_loss=False)) == "plain prose<|im_end|>"


def test_every_row_of_the_tutorial_file_learns_only_answers(write_recipe: Callable[..., Path]):
    files = {"train": str(ROOT / "data" / "tutorial.jsonl")}
    training = {"max_length": 512}
    recipe = load_recipe(write_recipe(dataset={"data_files": files, "eval_split": None}, training=training))
    rows = [json.loads(line)["text"] for line in Path(files["train"]).read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 30
    tokenizer, data = load_tokenizer(recipe, locate(recipe)), loaded(recipe).train()
    for row, text in zip(data, rows, strict=True):
        said = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
        assert said.count("<|im_end|>") == text.count("Assistant:") and "Human:" not in said
        assert said.replace("<|im_end|>", "")[:5] in text


def write_template(workdir: Path, text: str) -> str:
    (workdir / "t.jinja").write_text(text)
    return "t.jinja"


def test_a_template_that_rewrites_earlier_turns_is_refused(recipe_on: Callable[..., Recipe], workdir: Path):
    template = write_template(
        workdir, "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:1: message 2 the chat template renders the conversation"):
        loaded(recipe_on([GOOD], chat_template_path=template))


def test_a_template_whose_answers_never_end_is_refused(recipe_on: Callable[..., Recipe], workdir: Path):
    template = write_template(
        workdir,
        "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}",
    )
    with pytest.raises(DataError, match="never learn to stop"):
        loaded(recipe_on([GOOD], chat_template_path=template))


def test_a_missing_template_file_and_an_unknown_end_token_name_the_line(recipe_on: Callable[..., Recipe]):
    for key, value in (("chat_template_path", "nowhere.jinja"), ("eos_token", "<|nope|>")):
        with pytest.raises(RecipeError, match=r"tiny\.yaml:\d+"):
            loaded(recipe_on([GOOD], **{key: value}))


def test_questions_are_the_rows_without_their_last_answer(write_recipe: Callable[..., Path]):
    recipe = load_recipe(write_recipe(generation={"max_rows": 2, "prompts": ["three cups"]}))
    tokenizer = load_tokenizer(recipe, locate(recipe))
    prompt, first, _ = questions(loaded(recipe))
    assert prompt.expected is None and first.expected.startswith("{")
    system = "<|im_start|>system\nOrder to JSON.<|im_end|>\n"
    assert (
        tokenizer.decode(prompt.input_ids) == f"{system}<|im_start|>user\nthree cups<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(first.input_ids).endswith(f"{first.text}<|im_end|>\n<|im_start|>assistant\n")


def test_a_text_question_ends_where_the_assistant_begins(
    recipe_on: Callable[..., Recipe], write_recipe: Callable[..., Path], workdir: Path
):
    recipe_on([{"text": "Human: a\nAssistant: b\nHuman: c\nAssistant: d"}])
    dataset = {"data_files": {"train": "rows.jsonl", "heldout": "rows.jsonl"}}
    dataset["overlap"] = "allow"
    generation = {"prompts": ["你好", "Human: x\nAssistant:"]}
    recipe = load_recipe(write_recipe(dataset=dataset, generation=generation, training=LITERAL))
    tokenizer = load_tokenizer(recipe, locate(recipe))
    texts = [tokenizer.decode(question.input_ids) for question in questions(loaded(recipe))]
    assert texts == [
        "Human: 你好\nAssistant:",
        "Human: x\nAssistant:",
        "Human: a\nAssistant: b<|im_end|>\nHuman: c\nAssistant:",
    ]
