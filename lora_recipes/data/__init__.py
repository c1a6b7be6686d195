"""Rows on disk become tokens with labels: read, check every row, render, mask what is not the assistant's."""

from lora_recipes.data.questions import Question, questions
from lora_recipes.data.read import RawData, read_data
from lora_recipes.data.tokens import TokenizedData, tokenize

__all__ = ["Question", "RawData", "TokenizedData", "questions", "read_data", "tokenize"]
