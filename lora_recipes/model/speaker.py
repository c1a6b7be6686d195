"""Answers that are written as they come, by a model that remembers what it has read of the conversation."""

import sys
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase, TextStreamer
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lora_recipes import console
from lora_recipes.model.answer import end_ids, limit_met, stop_strings


class Words(TextStreamer):
    """Writes an answer to stdout word by word and keeps it; end tokens are no words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=False)
        self.ends, self.ended = ends, False
        self.said: list[str] = []

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt first, then one token at a time."""
        if not self.next_tokens_are_prompt:
            self.ended = value.reshape(-1)[-1].item() in self.ends
            if self.ended:
                return
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """On a terminal escape sequences are shown, never obeyed."""
        self.said.append(text)
        shown = console.UNSAFE.sub(lambda match: f"<U+{ord(match.group()):04X}>", text)
        sys.stdout.write((shown if sys.stdout.isatty() else text) + ("\n" if stream_end else ""))
        sys.stdout.flush()


@dataclass
class Speaker:
    """The model, and what it remembers of the conversation: keys and values of the tokens it has read."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig
    read: tuple[list[int], DynamicCache] | None = None

    def __post_init__(self) -> None:
        self.config = deepcopy(self.config)
        self.config.return_dict_in_generate = True  # with the cache

    def answer(self, ids: list[int]) -> tuple[str, str]:
        """Answer a prompt (token ids) on stdout.

        Returns:
            What was said, and how it ended: "eos", "length", "time" or "interrupt".
        """
        words = Words(self.tokenizer, end_ids(self.config))
        prompt = torch.tensor([ids], device=self.model.device)
        extra: dict[str, Any] = {"tokenizer": self.tokenizer} if self.config.stop_strings else {}
        if self.read is not None and ids[: len(self.read[0])] == self.read[0] and len(ids) > len(self.read[0]):
            extra["past_key_values"] = self.read[1]
        self.read = None  # the cache grows while the answer does; it is known again when that has ended
        try:
            with torch.no_grad():
                output = self.model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=self.config,
                    streamer=words,
                    **extra,
                )
        except KeyboardInterrupt:
            words.end()
            return "".join(words.said), "interrupt"
        self._remember(output)
        text = "".join(words.said)
        stopped = words.ended or any(stop in text for stop in stop_strings(self.config))
        return text, "eos" if stopped else limit_met(self.config, output.sequences.shape[1] - len(ids))

    def _remember(self, output: Any) -> None:
        """Only keys and values: a recurrent state cannot be asked what it has read, nor a cache of a fixed size."""
        cache = output.past_key_values
        if type(cache) is not DynamicCache or self.config.cache_implementation is not None:
            return
        if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
            self.read = (output.sequences[0, : cache.get_seq_length()].tolist(), cache)

    def forget(self) -> None:
        """Another adapter reads the same words otherwise."""
        self.read = None
