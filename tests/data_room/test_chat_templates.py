"""Every chat template that TRL has, and those shipped here: the assistant's words and the end token carry loss, no more."""

import copy
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_recipes.data import chat_templates
from lora_recipes.data.formats import BadRow, Conversation, RowSettings, convert
from lora_recipes.data.masks import IGNORED, Masker, Tokenized
from lora_recipes.errors import DataError, RecipeError
from lora_recipes.recipe import Recipe
from tests.data_room.chat_tokenizers import TRL, tokenizer_of, trl_tokenizer

NAMES = sorted(path.stem for path in TRL.glob("*.jinja"))
MARKS, KNOWN, DIFFERENCE = "the template's own", "TRL's training template", "the difference of renders"

# -- the three conversations ------------------------------------------------------------------------------------------

SIX, LIU = "It is six.", "二乘三等于六。"
ASKED, ASKED_AGAIN = (
    {"role": "user", "content": "What is 2 times 3?"},
    {"role": "user", "content": "In Chinese, please?"},
)
NUMBER = {"type": "integer", "description": "A number."}
TOOL = {
    "name": "multiply",
    "description": "Multiplies two numbers.",
    "parameters": {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]},
}
CALL = {"id": "call1", "type": "function", "function": {"name": "multiply", "arguments": {"a": 2, "b": None}}}
ROWS: dict[str, dict[str, Any]] = {
    "plain": {
        "messages": [
            {"role": "system", "content": "Be very brief."},
            ASKED,
            {"role": "assistant", "content": SIX},
            ASKED_AGAIN,
            {"role": "assistant", "content": LIU},
        ]
    },
    "tools": {
        "messages": [
            ASKED,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "multiply", "tool_call_id": "call1", "content": "The product: 6"},
            {"role": "assistant", "content": SIX},
            ASKED_AGAIN,
            {"role": "assistant", "content": LIU},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    },
    "thinking": {
        "messages": [
            ASKED,
            {"role": "assistant", "reasoning_content": "Twice three.", "content": SIX},
            ASKED_AGAIN,
            {"role": "assistant", "reasoning_content": "Translate six.", "content": LIU},
        ]
    },
}

# -- what each template must train, by hand ---------------------------------------------------------------------------


def both(form: str) -> list[str]:
    """The two answers in a template's form."""
    return [form.replace("…", SIX), form.replace("…", LIU)]


ALTERNATE, NO_SYSTEM = "must alternate", "System role not supported"
NO_TOOLS, NO_CALL, TWO_ROLES = "tools are left out", "leaves out the call of tool `multiply`", "Only user and assistant"
JSON_CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": 2, "b": null}}\n</tool_call>'
# Where the row has null, some templates write Python's None: their own form, not ours to change.
XML_CALL_NONE = (
    "<tool_call>\n<function=multiply>\n<parameter=a>\n2\n</parameter>\n<parameter=b>\nNone\n</parameter>\n"
    "</function>\n</tool_call>"
)
XML_CALL = XML_CALL_NONE.replace("None", "null")
LFM_CALL = "<|tool_call_start|>[multiply(a=2, b=None)]<|tool_call_end|>"
GEMMA_CALL_NONE = "<|tool_call>call:multiply{a:2,b:None}<tool_call|>"
GEMMA_CALL = "<|tool_call>call:multiply{a:2,b:null}<tool_call|>"
DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>multiply\n"
    '```json\n{"a": 2, "b": null}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
GLM_CALL = (
    "<tool_call>multiply\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n"
    "<arg_key>b</arg_key>\n<arg_value>null</arg_value>\n</tool_call>"
)
GPT_CALL = ' to=functions.multiply<|channel|>commentary json<|message|>{"a": 2, "b": null}'
LLAMA_CALL = '{"name": "multiply", "parameters": {"a": 2, "b": null}}'
MUSE_CALL = (
    ' to=multiply<|message|><atem:function_calls>\n<atem:invoke name="multiply">\n<atem:parameter name="a">2'
    '</atem:parameter>\n<atem:parameter name="b">null</atem:parameter>\n</atem:invoke>\n</atem:function_calls>'
)
CHATML, EOT = both("…<|im_end|>"), both("…<|eot_id|>")
COHERE, COHERE2 = both("…<|END_OF_TURN_TOKEN|>"), both("…<|END_RESPONSE|><|END_OF_TURN_TOKEN|>")
DEEPSEEK, GEMMA, TURN = both("…<｜end▁of▁sentence｜>"), both("…<end_of_turn>"), both("…<turn|>")
GLM, PHI, LLAVA = both("\n<think></think>\n…<|user|>"), both("…<|end|>"), both(" …</s>")
UTTERANCE, MUSE = both(" …<end_of_utterance>"), both(" to=user<|message|>…<|eot|>")
GPT = [
    f"<|channel|>final<|message|>{SIX}<|end|>",
    f"<|channel|>final<|message|>{LIU}<|return|>",
]  # earlier turns: <|end|>
QWEN3 = both("<think>\n\n</think>\n\n…<|im_end|>")
# The generation prompt opens the thinking; the model closes it.
OPENED = both("\n</think>\n\n…<|im_end|>")
OPENED_THOUGHTS = [f"Twice three.\n</think>\n\n{SIX}<|im_end|>", f"Translate six.\n</think>\n\n{LIU}<|im_end|>"]
QWEN_THOUGHTS = ["<think>\n" + said for said in OPENED_THOUGHTS]
NEMOTRON = both(
    "<think></think>…<|im_end|>"
)  # the prompt's "<think>\n" is not how these begin an answer without thinking
NEMOTRON_CALL = f"<think></think>\n{XML_CALL_NONE}\n<|im_end|>"

Expected = list[str] | str  # the trained text of each answer, or a part of the reason for which the row is refused
# Names of templates → expected for plain, tools and thinking. Where a template shows no thinking, only the words are left.
TABLE: dict[str, tuple[Expected, Expected, Expected]] = {
    "cohere cohere_training": (COHERE, ALTERNATE, COHERE),
    "cohere2 cohere2_training": (COHERE2, ALTERNATE, COHERE2),
    "deepseek_r1_distill deepseek_r1_distill_training": (DEEPSEEK, NO_TOOLS, DEEPSEEK),
    "deepseekv3 deepseekv3_training": (
        DEEPSEEK,
        [f"{DEEPSEEK_CALL}<｜end▁of▁sentence｜>", *DEEPSEEK],
        DEEPSEEK,
    ),
    "gemma gemma_training": (NO_SYSTEM, ALTERNATE, GEMMA),
    "gemma3 gemma3_training": (GEMMA, ALTERNATE, GEMMA),
    "gemma4 gemma4_v3 gemma4_v4": (TURN, [f"{GEMMA_CALL_NONE}<|tool_response>", *TURN], TURN),
    "gemma4_v2": (TURN, [f"{GEMMA_CALL_NONE}<turn|>", *TURN], TURN),
    "gemma4_v5 diffusion_gemma diffusion_gemma_training": (
        TURN,
        [f"{GEMMA_CALL}<|tool_response>", *TURN],
        [f"{SIX}<turn|>", f"<|channel>thought\nTranslate six.\n<channel|>{LIU}<turn|>"],
    ),
    "glm4moe glm4moe_training": (
        GLM,
        [f"\n<think></think>\n{GLM_CALL}<|observation|>", *GLM],
        [f"\n<think></think>\n{SIX}<|user|>", f"\n<think>Translate six.</think>\n{LIU}<|user|>"],
    ),
    "gptoss gptoss_training": (
        GPT,
        [f"{GPT_CALL}<|call|>", *GPT],
        [GPT[0], f"<|channel|>analysis<|message|>Translate six.<|end|><|start|>assistant{GPT[1]}"],
    ),
    "idefics3 idefics3_training smolvlm smolvlm_training": (UTTERANCE, NO_TOOLS, UTTERANCE),
    "lfm2 lfm2_training": (CHATML, NO_CALL, CHATML),
    "lfm2_v2 lfm2_v2_training": (CHATML, [f"{LFM_CALL}<|im_end|>", *CHATML], CHATML),
    "lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl": (
        CHATML,
        [f"{LFM_CALL}<|im_end|>", *CHATML],
        [CHATML[0], f"<think>Translate six.</think>{LIU}<|im_end|>"],
    ),
    "llama3 llama3_training": (EOT, NO_TOOLS, EOT),
    "llama3_1 llama3_2": (EOT, [f"{LLAMA_CALL}<|eot_id|>", *EOT], EOT),
    "llava_next llava_next_training": (LLAVA, TWO_ROLES, LLAVA),
    "muse_glimmer muse_glimmer_training": (
        MUSE,
        [f"{MUSE_CALL}<|eot|>", *MUSE],
        [
            f" to=self<|message|>Twice three.<|eom|><|start|>assistant{MUSE[0]}",
            f" to=self<|message|>Translate six.<|eom|><|start|>assistant{MUSE[1]}",
        ],
    ),
    "nemotron_3_nano nemotron_3_nano_training nemotron_3_super nemotron_3_super_training": (
        NEMOTRON,
        [NEMOTRON_CALL, *NEMOTRON],
        [f"<think></think>\n{SIX}<|im_end|>", f"Translate six.\n</think>\n{LIU}<|im_end|>"],
    ),
    "nemotron_3_5_lightning nemotron_3_5_lightning_training nemotron_3_ultra nemotron_3_ultra_training": (
        NEMOTRON,
        [NEMOTRON_CALL, *NEMOTRON],
        [NEMOTRON[0], f"Translate six.</think>{LIU}<|im_end|>"],
    ),
    "phi3 phi3_training phi3_5 phi3_5_training": (PHI, NO_TOOLS, PHI),
    "qwen2_5 qwen2_5_training qwen3_instruct_2507 qwen3_instruct_2507_training qwen3_vl qwen3_vl_training": (
        CHATML,
        [f"{JSON_CALL}<|im_end|>", *CHATML],
        CHATML,
    ),
    "qwen2_5_vl qwen2_5_vl_training": (CHATML, NO_TOOLS, CHATML),
    "qwen3 qwen3_training": (QWEN3, [f"<think>\n\n</think>\n\n{JSON_CALL}<|im_end|>", *QWEN3], QWEN_THOUGHTS),
    "qwen3_5_nothink qwen3_5_nothink_training": (CHATML, [f"{XML_CALL_NONE}<|im_end|>", *CHATML], QWEN_THOUGHTS),
    "qwen3_5_think qwen3_5_think_training": (
        OPENED,
        [f"\n</think>\n\n{XML_CALL_NONE}<|im_end|>", *OPENED],
        OPENED_THOUGHTS,
    ),
    "qwen3_6 qwen3_6_training qwen3_8 qwen3_8_training": (
        OPENED,
        [f"\n</think>\n\n{XML_CALL}<|im_end|>", *OPENED],
        OPENED_THOUGHTS,
    ),
}
EXPECTED = {
    (name, fixture): expected
    for names, row in TABLE.items()
    for name in names.split()
    for fixture, expected in zip(ROWS, row, strict=True)
}
UNKNOWN_TO_TRL = {"gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "llama3_1", "llama3_2"}
WITH_MARKS = {"lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"}  # beside TRL's training templates

# -- helpers ----------------------------------------------------------------------------------------------------------


@cache
def masker_of(name: str, control_tokens: str = "error") -> Masker:
    return Masker(*trl_tokenizer(name), control_tokens)


def own_masker(template: str, control_tokens: str = "error", **tokenizer: Any) -> Masker:
    """For a template of a test's own, which ends its turns with <|im_end|>."""
    made = tokenizer_of(template, "<|startoftext|>", ("<|im_end|>", "<|endoftext|>"), **tokenizer)
    return Masker(made, set(made.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])), control_tokens)


def conversation(row: dict[str, Any]) -> Conversation:
    return convert(copy.deepcopy(row), RowSettings("messages", {}))


def chat(*said: str, **more: Any) -> Conversation:
    """The user's and the assistant's words in turn."""
    roles = ["user", "assistant"] * len(said)
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    return conversation({"messages": messages, **more})


def tokenized(masker: Masker, row: Conversation) -> Tokenized:
    (made,) = masker.tokenize([masker.render(row)])
    if isinstance(made, BadRow):
        raise made
    return made


def runs(row: Tokenized) -> list[list[int]]:
    """The tokens that carry loss, one list for each answer."""
    found: list[list[int]] = [[]]
    for token, label in zip(row.input_ids.tolist(), row.labels.tolist(), strict=True):
        if label == IGNORED:
            found.append([])
        else:
            assert label == token
            found[-1].append(token)
    return [run for run in found if run]


def trained(masker: Masker, row: Conversation) -> list[str]:
    return [masker.tokenizer.decode(run) for run in runs(tokenized(masker, row))]


def refused(masker: Masker, row: Conversation) -> BadRow:
    with pytest.raises(BadRow) as caught:
        tokenized(masker, row)
    return caught.value


def rendered_ids(masker: Masker, row: Conversation) -> list[int]:
    """What transformers itself makes of the conversation with the template that the masker uses."""
    return masker.tokenizer.apply_chat_template(
        masker._in_parts(row.messages),
        tools=row.tools,
        chat_template=masker.template,
        return_dict=False,
        **row.template_kwargs,
    )


# -- every template of TRL --------------------------------------------------------------------------------------------


def test_the_table_knows_every_template_that_trl_has():
    assert {name for name, _ in EXPECTED} == set(NAMES)


@pytest.mark.parametrize(("name", "fixture"), [(name, fixture) for name in NAMES for fixture in ROWS])
def test_exactly_the_answers_carry_loss(name: str, fixture: str):
    masker, row, expected = masker_of(name), conversation(ROWS[fixture]), EXPECTED[name, fixture]
    if isinstance(expected, str):
        bad = refused(masker, row)
        assert bad.kind == "template" and expected in f"{bad.field} {bad.message}"
        return
    assert trained(masker, row) == expected
    ids, whole = tokenized(masker, row).input_ids.tolist(), rendered_ids(masker, row)
    if expected[-1] == OPENED[-1]:  # the prompt's "<think>\n" and the model's "\n</think>" are two tokens, not "\n\n"
        ids, whole = masker.tokenizer.decode(ids), masker.tokenizer.decode(whole)
    assert ids == whole
    thoughts = [message["reasoning_content"] for message in row.messages if "reasoning_content" in message]
    shown = [thought in said for thought, said in zip(thoughts, expected, strict=False)]
    assert masker.render(row).thinking_left_out is not all(shown)


@pytest.mark.parametrize("name", NAMES)
def test_the_source_of_the_mask(name: str):
    marked = name.endswith("_training") or name in WITH_MARKS
    assert masker_of(name).origin.startswith(MARKS if marked else DIFFERENCE if name in UNKNOWN_TO_TRL else KNOWN)


@pytest.mark.parametrize("name", NAMES)
def test_a_developers_words_are_rendered_or_the_row_is_refused(name: str):
    masker = masker_of(name)
    row = chat("What is 2 times 3?", SIX)
    row.messages.insert(0, {"role": "developer", "content": "Be very brief."})
    try:
        text = masker.tokenizer.decode(tokenized(masker, row).input_ids)
    except BadRow as bad:
        assert bad.kind == "template"
    else:
        assert "Be very brief." in text


# Their generation prompt opens thinking, and an answer without any is written another way.
NOT_A_PREFIX = {name for name in NAMES if name.startswith(("nemotron", "deepseek"))}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_at_inference_begins_the_row(name: str):
    masker = masker_of(name)
    row = chat("What is 2 times 3?", SIX)
    ids, spans = tokenized(masker, row).input_ids.tolist(), runs(tokenized(masker, row))
    row.messages.pop()
    asked = masker.prompt_ids(row)
    if name in NOT_A_PREFIX:
        assert ids[: len(asked)] != asked
    else:
        assert ids[: len(asked)] == asked
        assert ids[len(asked) :][: len(spans[0])] == spans[0]


# With these a turn is asked about after a history that is written otherwise than it was trained: the model's own template
# takes thinking out of earlier turns (TRL's training template keeps it), or joins the line ends that the prompt parts.
OTHER_HISTORY = NOT_A_PREFIX | {name for name in NAMES if name.startswith("qwen3_") and name[6].isdigit()} | {"qwen3"}


@pytest.mark.parametrize("name", sorted(set(NAMES) - OTHER_HISTORY))
def test_every_turn_is_asked_as_it_is_trained(name: str):
    masker = masker_of(name)
    for fixture in ROWS:
        if isinstance(EXPECTED[name, fixture], str):
            continue
        row = conversation(ROWS[fixture])
        ids = tokenized(masker, row).input_ids.tolist()
        for number, message in enumerate(row.messages):
            if message["role"] == "assistant":
                asked = masker.prompt_ids(Conversation(row.messages[:number], row.tools))
                assert ids[: len(asked)] == asked


def test_a_question_that_the_models_own_template_refuses_is_an_error_of_the_data():
    row = conversation(ROWS["plain"])
    with pytest.raises(DataError, match="refuses a question: System role not supported"):
        masker_of("gemma").prompt_ids(Conversation(row.messages[:2]))


# -- laws, on templates of the tests' own -----------------------------------------------------------------------------

# SmolLM2's, which TRL does not know.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COLONS = (  # the prompt ends with a space, which a tokenizer takes into the answer's first word
    "{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{{ '<|im_end|>\n' if message.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def marked_template(words: str, after: str) -> str:
    return (
        "{% for message in messages %}{% if message.role == 'assistant' %}{{ 'assistant\n' }}"
        "{% generation %}{{ " + words + " }}{% endgeneration %}{{ " + after + " }}"
        "{% else %}{{ message.role + '\n' + message.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}{# <|im_end|> <|im_start|> #}"
    )


def test_smollm2s_own_template_gives_its_default_system_turn_and_trains_the_answers():
    masker = own_masker(SMOLLM2)
    row = chat("What is 2 times 3?", SIX, "In Chinese, please?", LIU)
    assert masker.origin.startswith(DIFFERENCE)
    assert trained(masker, row) == CHATML
    ids = tokenized(masker, row).input_ids.tolist()
    assert ids == rendered_ids(masker, row)
    for messages in (1, 3):
        asked = masker.prompt_ids(Conversation(row.messages[:messages]))
        assert ids[: len(asked)] == asked
    assert masker.tokenizer.decode(ids).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


@pytest.mark.parametrize("turns", [1, 3])
def test_a_mask_by_difference_costs_the_whole_and_two_renders_a_turn_at_most(
    turns: int, monkeypatch: pytest.MonkeyPatch
):
    masker, row = own_masker(SMOLLM2), chat(*("What is 2 times 3?", SIX) * turns)
    rendered: list[int] = []
    render = masker._render

    def counted(messages: list[Any], *rest: Any, **more: Any) -> Any:
        rendered.append(len(messages))
        return render(messages, *rest, **more)

    monkeypatch.setattr(masker, "_render", counted)
    masker.render(row)
    assert len(rendered) == 2 * turns + 1  # the last answer ends where the whole does; one more for a form of dialogue
    masker.render(row)
    assert len(rendered) == 4 * turns + 1


@pytest.mark.parametrize(
    "content",
    ["message.content[:9]", "(message.content if loop.last else message.content | upper)"],
)
def test_an_unknown_template_that_rewrites_an_answer_is_refused(content: str):
    masker = own_masker(SMOLLM2.replace("message['content']", content))
    bad = refused(masker, chat("Say six.", SIX, "Chinese.", LIU))
    assert bad.kind == "template" and bad.field.startswith("message")
    assert "drops or rewrites its text" in bad.message


@pytest.mark.promise("M5")
def test_an_unknown_template_that_rewrites_the_turns_before_is_refused():
    """It takes the thinking out of earlier turns, and closes them in another way."""
    template = SMOLLM2.replace(
        "message['content']", "(message.content if loop.last else message.content.split('</think>')[-1])"
    )
    bad = refused(own_masker(template), chat("Say six.", f"<think>Twice three.</think>{SIX}", "Chinese.", LIU))
    assert bad.kind == "template" and "differently alone than in the whole" in bad.message
    assert "training.chat_template_path" in bad.message and "training.assistant_only_loss=false" in bad.message


@pytest.mark.promise("M5")
def test_an_end_token_is_trained_where_it_is_the_padding_too():
    """What is masked is decided by place: masking every padding token would take away what the model stops by."""
    masker = own_masker(SMOLLM2)
    assert masker.tokenizer.pad_token_id == masker.tokenizer.eos_token_id
    rows = [tokenized(masker, chat(*turns)) for turns in (("Say six.", SIX, "Chinese.", LIU), ("Say six.", SIX))]
    collate = DataCollatorForLanguageModeling(masker.tokenizer.pad_token_id)
    batch = collate([{"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in rows])
    ends = (batch["labels"] == masker.tokenizer.eos_token_id).sum(-1).tolist()
    assert ends == [2, 1] and batch["labels"][1, -1] == IGNORED  # the shorter row is padded


def test_an_end_token_that_follows_the_marks_is_trained():
    masker = own_masker(marked_template("message.content", "'<|im_end|>\n'"))
    assert masker.origin.startswith(MARKS)
    assert trained(masker, chat("Say six.", SIX, "Chinese.", LIU)) == CHATML


@pytest.mark.parametrize(
    ("words", "after"),
    [
        ("message.content", "'\n'"),
        ("message.content", "'\n<|im_end|>'"),
        ("message.content + '<|im_start|>'", "'\n'"),
        ("message.content + ('\n' if loop.last else '<|im_end|>')", "''"),
        ("('<|im_end|>' if loop.last else '<|im_start|>') + message.content", "'<|im_end|>' if loop.last else '\n'"),
    ],
)
def test_an_answer_that_no_end_token_closes_is_refused(words: str, after: str):
    bad = refused(own_masker(marked_template(words, after)), chat("Say six.", SIX, "Chinese.", LIU))
    assert bad.kind == "end_token" and "training.eos_token" in bad.message and "<|im_end|>" in bad.message


def test_marks_that_are_missing_or_cut_an_answer_in_two_are_refused():
    some = marked_template("message.content", "'<|im_end|>'").replace(
        "== 'assistant' %}", "== 'assistant' and false %}"
    )
    parted = marked_template("message.content", "'-'").replace(
        "{% else %}", "{% generation %}!{% endgeneration %}{% else %}"
    )
    for template, found in ((some, 0), (parted, 2)):
        bad = refused(own_masker(template), chat("Say six.", SIX))
        assert bad.kind == "template" and f"marks {found} answers where the conversation has 1" in bad.message


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("template", [SMOLLM2, COLONS, marked_template("message.content + '<|im_end|>'", "'\n'")])
@pytest.mark.parametrize(
    "answer", [SIX, f" {SIX}", f"  {SIX}", f"\n{SIX}", f"\n\n{SIX}", f"\n \n{LIU}", LIU, f"{SIX} \n"]
)
def test_an_answer_may_begin_and_end_with_white_space(answer: str, template: str, trims: bool):
    masker, row = own_masker(template, trims=trims), chat("Say six.", answer, "In Chinese, please?", answer)
    assert trained(masker, row) == [f"{answer}<|im_end|>"] * 2
    ids = tokenized(masker, row).input_ids.tolist()
    assert masker.tokenizer.decode(ids) == masker.tokenizer.decode(rendered_ids(masker, row))
    asked = masker.prompt_ids(Conversation(row.messages[:1]))
    assert ids[: len(asked)] == asked  # as at inference


# -- control tokens in the row ----------------------------------------------------------------------------------------


def with_words(fixture: str, words: str) -> Conversation:
    """A fixture whose every free text, tool arguments and tool descriptions included, ends with the given words."""
    row = copy.deepcopy(ROWS[fixture])
    for message in row["messages"]:
        for key in ("content", "reasoning_content"):
            if message.get(key):
                message[key] += f" {words} so"
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = {"a": 2, "b": f"the {words} so"}
    for tool in row.get("tools", []):
        tool["function"]["description"] += f" {words} so"
    return conversation(row)


def special_count(masker: Masker, ids: list[int]) -> int:
    return sum(token in masker.special_ids for token in ids)


CONTROLS = {
    "qwen3": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "glm4moe": "<|user|>",
    "gptoss": "<|channel|>",
    "gemma4": "<turn|>",
    "muse_glimmer": "<|start|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "llava_next": "</s>",
    "phi3": "<|end|>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "qwen2_5": "<|im_start|>",
}
CONTROLLED = [
    (name, fixture, control)
    for name, control in CONTROLS.items()
    for fixture in ROWS
    if isinstance(EXPECTED[name, fixture], list)
]


@pytest.mark.parametrize(("name", "fixture", "control"), CONTROLLED)
def test_control_tokens_in_a_row_stay_plain_text(name: str, fixture: str, control: str):
    assert (bad := refused(masker_of(name), with_words(fixture, control))).kind == "control_token"
    assert control in bad.message and "dataset.control_tokens: escape" in bad.message
    masker = masker_of(name, "escape")
    decode = masker.tokenizer.decode
    harmless = tokenized(masker, with_words(fixture, "WORD"))
    escaped = tokenized(masker, with_words(fixture, control))
    assert special_count(masker, escaped.input_ids.tolist()) == special_count(masker, harmless.input_ids.tolist())
    assert decode(escaped.input_ids) == decode(harmless.input_ids).replace("WORD", control)
    assert [decode(run) for run in runs(escaped)] == [decode(run).replace("WORD", control) for run in runs(harmless)]
    assert any(control in decode(run[:-1]) for run in runs(escaped))


def test_a_question_with_a_control_token_is_asked_as_it_is_trained():
    masker = own_masker(SMOLLM2, "escape")
    row = chat("What is <|im_end|> here?", SIX)
    ids = tokenized(masker, row).input_ids.tolist()
    assert ids == tokenized(masker, row).input_ids.tolist()  # the row itself is left as it was
    asked = masker.prompt_ids(Conversation(row.messages[:1]))
    assert ids[: len(asked)] == asked and special_count(masker, asked) == 5


def test_control_tokens_in_the_names_of_arguments_are_found_as_well():
    call = {"function": {"name": "multiply", "arguments": {"a <|im_end|>": 2, "role": "<|im_start|>"}}}
    row = copy.deepcopy(ROWS["tools"])
    row["messages"][1]["tool_calls"] = [call]
    assert refused(masker_of("qwen3"), conversation(row)).kind == "control_token"
    masker = masker_of("qwen3", "escape")
    kept = tokenized(masker, conversation(row)).input_ids.tolist()
    plain = tokenized(masker, conversation(ROWS["tools"])).input_ids.tolist()
    assert special_count(masker, kept) == special_count(masker, plain)
    assert '{"a <|im_end|>": 2, "role": "<|im_start|>"}' in masker.tokenizer.decode(kept)


def test_literal_text_keeps_or_escapes_its_control_tokens():
    said = "one<|im_end|> two"
    for setting, special in (("keep", 2), ("escape", 1)):
        masker = own_masker(SMOLLM2, setting)
        row = tokenized(masker, Conversation(text=said, answers_only=False))
        assert special_count(masker, row.input_ids.tolist()) == special
        assert masker.tokenizer.decode(row.input_ids) == f"{said}<|im_end|>"
        assert row.labels.tolist() == row.input_ids.tolist()


# -- keywords of a row ------------------------------------------------------------------------------------------------


def test_a_rows_chat_template_kwargs_reach_the_template():
    masker = masker_of("qwen3")
    row = chat("What is 2 times 3?", SIX, chat_template_kwargs={"enable_thinking": False})
    assert trained(masker, row) == [f"{SIX}<|im_end|>"]  # the prompt has the empty thinking
    assert trained(masker, chat("What is 2 times 3?", SIX)) == [f"<think>\n\n</think>\n\n{SIX}<|im_end|>"]
    assert tokenized(masker, row).input_ids.tolist() == rendered_ids(masker, row)
    row.messages.pop()
    assert masker.tokenizer.decode(masker.prompt_ids(row)).endswith("assistant\n<think>\n\n</think>\n\n")


# -- which template a run uses ----------------------------------------------------------------------------------------

SHIPPED = {
    "alpaca": (
        "Be brief.\n\n### Instruction:\nSay six.\n\n### Response:\nIt is six.<|im_end|>\n\n"
        "### Instruction:\nChinese.\n\n### Response:\n二乘三等于六。<|im_end|>",
        both("…<|im_end|>"),
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay six.<|im_end|>\n<|im_start|>assistant\n"
        "It is six.<|im_end|>\n<|im_start|>user\nChinese.<|im_end|>\n<|im_start|>assistant\n二乘三等于六。<|im_end|>\n",
        both("…<|im_end|>"),
    ),
    "human_assistant": (
        "Be brief.\nHuman: Say six.\nAssistant: It is six.<|im_end|>\n"
        "Human: Chinese.\nAssistant: 二乘三等于六。<|im_end|>",
        both(" …<|im_end|>"),
    ),
    "plain": ("Be brief.Say six.It is six.<|im_end|>Chinese.二乘三等于六。<|im_end|>", both("…<|im_end|>")),
}


def bare_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """With ChatML's control tokens, but without a template."""
    tokenizer = tokenizer_of("<|im_start|>", "<|startoftext|>", ("<|im_end|>",), adds_bos=adds_bos)
    tokenizer.chat_template = None
    return tokenizer


def test_the_shipped_templates_are_known():
    assert chat_templates.shipped() == sorted(SHIPPED)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_template_begins_as_the_tokenizer_does(name: str, adds_bos: bool, recipe_on: Callable[..., Recipe]):
    tokenizer = bare_tokenizer(adds_bos=adds_bos)
    recipe = recipe_on([{}], chat_template_path=name)
    assert chat_templates.settle(tokenizer, recipe, ["messages"]) == f"`{name}`"
    masker = Masker(tokenizer, {tokenizer.eos_token_id})
    row = chat("Say six.", SIX, "Chinese.", LIU)
    row.messages.insert(0, {"role": "system", "content": "Be brief."})
    text, answers = SHIPPED[name]
    ids = tokenized(masker, row).input_ids.tolist()
    assert tokenizer.decode(ids) == ("<|startoftext|>" if adds_bos else "") + text
    assert trained(masker, row) == answers
    assert masker.origin.startswith(MARKS)
    for messages in (2, 4):
        asked = masker.prompt_ids(Conversation(row.messages[:messages]))
        assert ids[: len(asked)] == asked
    literal = tokenized(masker, Conversation(text="It is six.", answers_only=False)).input_ids.tolist()
    assert literal.count(tokenizer.bos_token_id) == int(adds_bos)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_template_without_a_form_for_tools_refuses_them(name: str, recipe_on: Callable[..., Recipe]):
    tokenizer = bare_tokenizer()
    chat_templates.settle(tokenizer, recipe_on([{}], chat_template_path=name), ["messages"])
    masker = Masker(tokenizer, {tokenizer.eos_token_id})
    without_list = {"messages": ROWS["tools"]["messages"]}
    assert refused(masker, conversation(ROWS["tools"])).kind == "template"
    assert refused(masker, conversation(without_list)).kind == "template"


def test_a_template_is_a_file_a_shipped_name_or_one_of_trls(recipe_on: Callable[..., Recipe], workdir: Path):
    (workdir / "mine.jinja").write_text(SMOLLM2, encoding="utf-8")
    for wanted, said, begins in (
        ("mine.jinja", "the file mine.jinja", SMOLLM2),
        ("chatml", "`chatml`", "{#- ChatML."),
        ("llama3", "TRL's `llama3`", (TRL / "llama3.jinja").read_text(encoding="utf-8")),
    ):
        tokenizer = bare_tokenizer()
        assert chat_templates.settle(tokenizer, recipe_on([{}], chat_template_path=wanted), ["text"]) == said
        assert tokenizer.chat_template.startswith(begins)


def test_an_unknown_template_is_refused_with_the_known_names(recipe_on: Callable[..., Recipe]):
    with pytest.raises(RecipeError) as caught:
        chat_templates.settle(bare_tokenizer(), recipe_on([{}], chat_template_path="lama3"), ["messages"])
    for name in ("lama3", *SHIPPED, "llama3", "qwen3_training", "tiny.yaml:"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("form", "template"),
    [("text", "human_assistant"), ("prompt_completion", "plain")],
)
def test_without_a_template_literal_formats_have_one(form: str, template: str, recipe_on: Callable[..., Recipe]):
    tokenizer = bare_tokenizer(adds_bos=True)
    assert chat_templates.settle(tokenizer, recipe_on([{}]), [form]) == f"`{template}`, for the tokenizer has none"
    masker = Masker(tokenizer, {tokenizer.eos_token_id})
    ids = tokenized(masker, chat("Say six.", SIX)).input_ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


@pytest.mark.promise("M5")
@pytest.mark.parametrize("form", ["messages", "sharegpt", "alpaca", "question_answer"])
def test_without_a_template_chat_formats_need_one(form: str, recipe_on: Callable[..., Recipe]):
    with pytest.raises(RecipeError, match=r"this tokenizer has no chat template.*chat_template_path.*chatml.*llama3"):
        chat_templates.settle(bare_tokenizer(), recipe_on([{}]), [form])


def test_rows_that_are_no_conversations_need_no_template(recipe_on: Callable[..., Recipe]):
    tokenizer = bare_tokenizer()
    assert chat_templates.settle(tokenizer, recipe_on([{}]), []) == "none"
    assert tokenizer.chat_template is None
    assert refused(Masker(tokenizer, {0}), chat("Say six.", SIX)).message == "the tokenizer has no chat template"


def test_the_models_own_template_is_kept(recipe_on: Callable[..., Recipe]):
    tokenizer = bare_tokenizer()
    tokenizer.chat_template = SMOLLM2
    assert chat_templates.settle(tokenizer, recipe_on([{}]), ["messages"]) == "the model's own"
    assert tokenizer.chat_template == SMOLLM2


@pytest.mark.parametrize(
    ("asked", "answered"),
    [("cafe\u0301 e\u0301 o\u0308", "answer \u0958 done"), ("e\u0301e\u0301", "x \u0344 yes"), ("plain", "cafe\u0301")],
    ids=["grows and shrinks", "grows", "in the answer"],
)
def test_a_normalizer_that_moves_characters_does_not_move_the_mask(asked: str, answered: str):
    """The widths of the tokens add up to the text although both of its ends were changed (NFC, as in Qwen)."""
    tokenizer = own_masker(SMOLLM2).tokenizer
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    masker = Masker(tokenizer, {tokenizer.convert_tokens_to_ids("<|im_end|>")})
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    (row,) = masker.tokenize([masker.render(Conversation(messages))])
    trained = tokenizer.decode([int(label) for label in row.labels if label != IGNORED])
    assert trained == unicodedata.normalize("NFC", answered) + "<|im_end|>"


def test_control_tokens_in_template_kwargs_are_refused_as_well():
    masker = own_masker("{{ note }}" + SMOLLM2)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(BadRow, match="control_token"):
        masker.render(Conversation(messages, template_kwargs={"note": "x<|im_end|>"}))


def test_the_marks_of_escaped_tokens_cannot_be_forged():
    masker = own_masker(SMOLLM2)
    masker.control_tokens = "escape"
    messages = [{"role": "user", "content": "\ue0029\ue003 <|im_end|>"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(BadRow, match="private use"):
        masker.render(Conversation(messages))
