"""Rows that tests break, and what the audit and the check make of them."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from lora_recipes.data.check import check_data
from lora_recipes.errors import DataError
from lora_recipes.recipe import Recipe

ANSWER = {"role": "assistant", "content": "hello"}
ASKED = {"role": "user", "content": "hi"}
GOOD = {"messages": [ASKED, ANSWER]}
TEXT = {"text": "Human: hi\nAssistant: hello"}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


@dataclass
class Seen:
    """What `lora-recipes audit RECIPE --json` came to: its exit code, its report, and all that was said."""

    code: int
    report: dict[str, Any]
    text: str

    @property
    def warnings(self) -> str:
        return "\n".join(finding["text"] for finding in self.report["warnings"])


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def refusal(recipe: Recipe) -> str:
    """What `check_data` refuses the rows with."""
    with pytest.raises(DataError) as caught:
        check_data(recipe)
    return str(caught.value)
