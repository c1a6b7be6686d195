"""A conversation with the trained model in the terminal: words as they come, adapters swapped while it goes on."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lora_recipes import console
from lora_recipes.data.formats import SPEAKER, BadRow, Conversation, Message, marked_messages
from lora_recipes.data.load import used_rows
from lora_recipes.data.masks import Masker
from lora_recipes.errors import DataError, LoraRecipesError, RecipeError, RunError
from lora_recipes.model.adapters import parse_named
from lora_recipes.model.build import load_base, load_merged, model_config
from lora_recipes.model.machine import choose
from lora_recipes.model.source import locate, materialise
from lora_recipes.model.speaker import Speaker
from lora_recipes.model.swapping import AdapterSet
from lora_recipes.model.trial import tried_generation
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir
from lora_recipes.trained import as_trained, require_own_adapter, require_same_adapter

LIMITS = {"length": "generation.max_new_tokens", "time": "generation.max_time"}
HELP = """/adapter NAME   answer with this adapter from now on
/adapters       which there are
/base           answer without an adapter
/reset          forget the conversation
/system TEXT    another system message; without TEXT: none
/help           this
/quit           leave (or Ctrl-D); Ctrl-C stops an answer
//TEXT          say something that begins with a slash"""
# What generate() can neither stream nor hold a conversation with.
ONE_AT_A_TIME = ("num_beams", "num_return_sequences")


def chat(recipe: Recipe, adapters: list[str], *, force: bool) -> None:
    """Talk to the trained model until the input ends.

    The model's words go to stdout as they come, everything else to stderr.

    Args:
        adapters: `NAME=PATH` words, adapters beside the recipe's own, which is called like the recipe.
        force: use an adapter on another base than it was trained on.

    Raises:
        RunError: nothing trained yet, or no such adapter.
        RefusedError: the adapter is another recipe's, or broken.
        RecipeError: settings under which no answer can be streamed.
    """
    run_dir = RunDir.of(recipe.name)
    _require_trained(recipe, run_dir, adapters)
    named = parse_named(adapters)
    if recipe.name in named:
        raise RunError(f"--adapter {recipe.name}: the recipe's own adapter is called so; give it another name")
    for key in ONE_AT_A_TIME:
        if recipe.get(f"generation.{key}", 1) != 1:
            where = recipe.where(f"generation.{key}")
            raise RecipeError(f"{where}: a chat gives one answer, word by word; set generation.{key}=1")
    choices = choose(recipe, training=False)
    source = materialise(locate(recipe))
    require_same_adapter(recipe, run_dir, source, force=force)
    for folder in named.values():
        require_own_adapter(folder, recipe, source, force=force)
    opened = as_trained(recipe, run_dir, source)
    tokenizer, rows = opened.tokenizer, opened.data.sources[0]
    masker = Masker(
        tokenizer, set(opened.ends), "escape"
    )  # what is typed is words: a control token in it opens no turn
    dialogue = Dialogue(masker, next(used_rows(rows.train, 1), Conversation(text="")))
    config = tried_generation(recipe, model_config(recipe, source), opened.ends, tokenizer)
    loaded: AdapterSet | None = None
    if recipe.get("lora"):
        loaded = AdapterSet(load_base(recipe, source, choices), {recipe.name: run_dir.adapter} | named)
        model: Any = loaded.model
    else:
        model = load_merged(run_dir.merged, recipe, choices)
    torch.manual_seed(recipe.get("training.seed", 42))
    Terminal(dialogue, Speaker(model, tokenizer, config), loaded).run()


def _require_trained(recipe: Recipe, run_dir: RunDir, adapters: list[str]) -> None:
    if adapters and not recipe.get("lora"):
        raise RunError(f"{recipe.path}: has no `lora` section, so the whole model was trained and takes no --adapter")
    run_dir.require_trained(recipe.path, adapter=bool(recipe.get("lora")))


@dataclass
class Dialogue:
    """What was said so far, and how the model reads it: in the form of the training rows.

    Attributes:
        form: a training row, whose system message, tools and template settings a new conversation takes over.
    """

    masker: Masker
    form: Conversation
    turns: list[Message] = field(default_factory=list)
    system: str | None = None

    def __post_init__(self) -> None:
        first = (self.form.messages or marked_messages(self.form.text or ""))[:1]
        self.system = next((message["content"] for message in first if message["role"] == "system"), None)

    @property
    def has_turns(self) -> bool:
        """False for rows of bare text, which the model goes on with instead of answering."""
        return bool(self.form.messages) or SPEAKER.search(self.form.text or "") is not None

    def prompt_ids(self) -> list[int]:
        """Raises DataError or BadRow when the chat template refuses what was said."""
        if not self.has_turns:
            return self.masker.prompt_ids(Conversation(text=self.turns[-1]["content"]))
        system = [{"role": "system", "content": self.system}] if self.system else []
        if self.form.messages:
            return self.masker.prompt_ids(replace(self.form, messages=[*system, *self.turns]))
        names = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
        lines = [names[message["role"]] + message["content"] for message in [*system, *self.turns]]
        return self.masker.prompt_ids(Conversation(text="\n".join([*lines, "Assistant:"])))


class Terminal:
    """Reads lines from stdin: commands, and what is said to the model."""

    def __init__(self, dialogue: Dialogue, speaker: Speaker, adapters: AdapterSet | None) -> None:
        self.dialogue, self.speaker, self.adapters = dialogue, speaker, adapters
        self.limit = getattr(speaker.model.config.get_text_config(), "max_position_embeddings", None)
        self.commands: dict[str, Callable[[str], None]] = {
            "/adapter": self.adapter,
            "/adapters": self.list_adapters,
            "/base": self.base,
            "/reset": self.reset,
            "/system": self.system,
            "/help": lambda _: console.say(HELP),
        }

    def run(self) -> None:
        """Until `/quit` or the end of the input."""
        if not self.dialogue.has_turns:
            console.say("The training rows are bare text: the model goes on with each line, and remembers none.")
        console.say("/help says what can be typed; /quit or Ctrl-D leaves.", "dim")
        for line in self._lines():
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            if command in self.commands:
                try:
                    self.commands[command](rest.strip())
                except LoraRecipesError as error:
                    console.error(str(error))
            elif line.startswith("/") and not line.startswith("//"):
                console.say(f"there is no {command}; /help says what there is, //{line[1:]} says it to the model")
            else:
                self.say(line.removeprefix("/") if line.startswith("//") else line)

    def _lines(self) -> Iterator[str]:
        if reconfigure := getattr(sys.stdin, "reconfigure", None):
            reconfigure(errors="replace")  # a broken byte is no reason to end a conversation
        while True:
            sys.stderr.write(f"{self._who()}> ")
            sys.stderr.flush()
            try:
                line = sys.stdin.readline()
            except KeyboardInterrupt:
                console.say("\n/quit or Ctrl-D leaves")
                continue
            if not line:
                sys.stderr.write("\n")
                return
            if line.strip():
                yield line.strip()

    def _who(self) -> str:
        return "you" if self.adapters is None else f"you to {self.adapters.active or 'base'}"

    def say(self, text: str) -> None:
        """One question and its answer; what could not be answered is not remembered."""
        turns = self.dialogue.turns
        turns.append({"role": "user", "content": text})
        try:
            ids = self.dialogue.prompt_ids()
        except (DataError, BadRow) as error:
            turns.pop()
            console.error(error.message if isinstance(error, BadRow) else str(error))
            return
        if self.limit is not None and len(ids) >= self.limit:
            turns.pop()
            console.error(f"the conversation has {len(ids)} tokens, the model reads {self.limit}; /reset begins anew")
            return
        said, ended = self.speaker.answer(ids)
        if said.strip():
            turns.append({"role": "assistant", "content": said})
        else:
            turns.pop()
            console.say("[it said nothing]", "dim")
        if ended == "interrupt":
            console.say("[stopped]", "dim")
        elif ended in LIMITS:
            console.say(f"[cut off; {LIMITS[ended]} sets the limit]", "dim")

    def adapter(self, name: str) -> None:
        """`/adapter NAME`"""
        if not name:
            self.list_adapters("")
            return
        started = time.perf_counter()
        how = self._adapters().swap(name)
        self.speaker.forget()
        console.say(f"{name} ({how}, {1000 * (time.perf_counter() - started):.0f} ms)", "dim")

    def list_adapters(self, _: str) -> None:
        """`/adapters`"""
        adapters = self._adapters()
        for name, file in adapters.files.items():
            console.say(f"{'*' if name == adapters.active else ' '} {name}  {file.folder}")

    def base(self, _: str) -> None:
        """`/base`"""
        self._adapters().swap(None)
        self.speaker.forget()
        console.say("the base, without an adapter", "dim")

    def _adapters(self) -> AdapterSet:
        if self.adapters is None:
            raise RunError("the whole model was trained, so there are no adapters")
        return self.adapters

    def reset(self, _: str) -> None:
        """`/reset`"""
        self.dialogue.turns.clear()
        self.speaker.forget()
        console.say("the conversation begins anew", "dim")

    def system(self, text: str) -> None:
        """`/system TEXT`"""
        if not self.dialogue.has_turns:
            raise RunError("bare text has no system message")
        if SPEAKER.match(text):
            raise RunError("a system message that begins with a speaker's name would be read as a turn")
        self.dialogue.system = text or None
        console.say(f"system message: {text}" if text else "no system message", "dim")
