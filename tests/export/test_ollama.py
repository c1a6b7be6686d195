"""Ollama's template writes what the model's own does, or is left out; greedy recipes stay greedy."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from lora_recipes.export.ollama import SAMPLES, Form, form_of, modelfile
from tests.conftest import CHATML
from tests.data_room.chat_tokenizers import tokenizer_of
from tests.export.models import make_model, write

SYSTEM_FIRST = "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}{% endif %}"
TEMPLATES = {
    "chatml": CHATML,
    "chatml with a default system message": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe \"good\"\\ {{ '{{' }}<|im_end|>\n{% endif %}"
        + CHATML
    ),
    "llama 3": (
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "llama 2": SYSTEM_FIRST
    + (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token }}[INST] "
        "{% if loop.first and system is defined %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ message['content'] }} [/INST]"
        "{% else %} {{ message['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral": SYSTEM_FIRST
    + (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
        "{% if loop.last and system is defined %}{{ system }}\n\n{% endif %}{{ message['content'] }}[/INST]"
        "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "no system message": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</{{ message['role'] }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
}
INEXPRESSIBLE = {
    "numbered turns": "{% for message in messages %}{{ loop.index }}: {{ message['content'] }}\n{% endfor %}",
    "upper case": "{% for message in messages %}{{ message['role'] }}: {{ message['content'] | upper }}\n{% endfor %}",
    "the last two only": "{% for message in messages[-2:] %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}",
}


def renderer(template: str) -> Any:
    tokenizer = tokenizer_of(template, "<s>", ("</s>",))

    def render(messages: list[dict[str, str]]) -> str | None:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            assert "no system" in str(error)
            return None

    return render


def go(template: str, messages: list[dict[str, str]]) -> str:
    """A reading of the few words of Go's language that `Form.go` uses, written apart from `Form.render`."""
    system = next((message["content"] for message in messages if message["role"] == "system"), "")
    body = re.sub(r"\s*\{\{-", "{{", template)
    tokens = re.findall(r"\{\{ *((?:\"(?:[^\"\\]|\\.)*\"|[^\"])*?) *\}\}", body)
    assert re.sub(r"\{\{ *((?:\"(?:[^\"\\]|\\.)*\"|[^\"])*?) *\}\}", "", body) == ""  # no text outside of actions
    assert tokens[0].startswith("range") and tokens[1].startswith("$last :=") and tokens[-1] == "end"

    def truth(words: str, at: int) -> bool:
        words = words.strip()
        last = at == len(messages) - 1
        if match := re.fullmatch(r"or \((.*?)\) \((.*)\)", words):
            return truth(match[1], at) or truth(match[2], at)
        if match := re.fullmatch(r"and (\S+) \((.*)\)", words):
            return truth(match[1], at) and truth(match[2], at)
        if match := re.fullmatch(r"and (\S+) (\S+)", words):
            return truth(match[1], at) and truth(match[2], at)
        if match := re.fullmatch(r'eq \$m.Role "(\w+)"', words):
            return messages[at]["role"] == match[1]
        if match := re.fullmatch(r"eq \$i (\d+)", words):
            return at == int(match[1])
        return {"$last": last, "not $last": not last, "$.System": bool(system)}[words]

    text = ""
    for at, message in enumerate(messages):
        stack: list[tuple[bool, bool]] = []  # (this branch runs, some branch of this `if` has run)
        for token in tokens[2:-1]:
            running = all(now for now, _ in stack)
            if token.startswith("if "):
                held = truth(token[3:], at)
                stack.append((held, held))
            elif token.startswith("else if "):
                _, done = stack.pop()
                held = not done and truth(token[8:], at)
                stack.append((held, done or held))
            elif token == "else":
                _, done = stack.pop()
                stack.append((not done, True))
            elif token == "end":
                stack.pop()
            elif running:
                text += {"$m.Content": message["content"], "$.System": system}.get(token) or __import__("json").loads(
                    token
                )
    return text


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_the_form_writes_what_the_template_does_and_go_what_the_form_does(name: str):
    render = renderer(TEMPLATES[name])
    form = form_of(render)
    assert form is not None
    compared = [sample for sample in SAMPLES if render(sample) is not None]
    assert len(compared) == (3 if name == "no system message" else 6)
    for sample in compared:
        assert form.render(sample) == render(sample) == go(form.go(), sample)


@pytest.mark.parametrize("name", list(INEXPRESSIBLE))
def test_a_template_that_has_no_form_gets_none(name: str):
    assert form_of(renderer(INEXPRESSIBLE[name])) is None


def test_where_the_system_message_stands_is_found_out():
    places = {name: form_of(renderer(TEMPLATES[name])) for name in ("llama 2", "mistral", "no system message")}
    assert [form and form.system_last for form in places.values()] == [False, True, False]
    assert places["no system message"] is not None and places["no system message"].system is None


def test_a_form_is_compared_on_every_sample():
    """The positive control: a form that is right for one turn only is not taken."""
    form = Form("<u>", "<a>", "<a>", "<wrong>", None)
    assert form.render(SAMPLES[0]) == f"<u>{SAMPLES[0][0]['content']}<a>"
    template = "{% for message in messages %}<{{ message['role'][0] }}>{{ message['content'] }}{% endfor %}<a>"
    assert form.render(SAMPLES[1]) != renderer(template)(SAMPLES[1])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ollama") / "model"
    make_model(folder, "llama")
    return folder


def lines_of(files: Path, section: dict, template: str = CHATML, **generation: Any) -> tuple[list[str], list[str]]:
    tokenizer = tokenizer_of(template, None, ("<|im_end|>", "<|endoftext|>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    text, notes = modelfile(write(files, "f16"), tokenizer, GenerationConfig(**generation), section)
    return text.splitlines(), notes


def test_a_greedy_recipe_stays_greedy_and_stops(files: Path):
    lines, notes = lines_of(files, {"max_new_tokens": 64, "stop_strings": "###"}, eos_token_id=[499, 500])
    assert lines[0] == "FROM ./f16.gguf" and notes == []
    parameters = [line for line in lines if line.startswith("PARAMETER")]
    stops = [line for line in parameters if line.startswith("PARAMETER stop")]
    assert stops[0] == 'PARAMETER stop "<|im_end|>"' and stops[-1] == 'PARAMETER stop "###"'
    assert parameters[len(stops) :] == [
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1.0",
        "PARAMETER num_predict 64",
    ]
    assert lines[1].startswith('TEMPLATE """{{- range')


def test_a_recipe_that_samples_passes_its_settings_on(files: Path):
    lines, _ = lines_of(files, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.05})
    told = {line.split()[1]: line.split()[2] for line in lines if line.startswith("PARAMETER") and "stop" not in line}
    assert told == {"temperature": "0.7", "top_p": "0.9", "top_k": "50", "repeat_penalty": "1.05"}


def test_without_a_form_the_file_says_so_and_leaves_the_template_to_the_gguf(files: Path):
    lines, notes = lines_of(files, {}, INEXPRESSIBLE["numbered turns"])
    assert lines[1].startswith("# No TEMPLATE: ") and not any(line.startswith("TEMPLATE") for line in lines)
    assert "has no TEMPLATE" in notes[0]
    dated, _ = lines_of(files, {}, CHATML + "{% set today = strftime_now('%d %b %Y') %}")
    assert "the day's date" in dated[1]
