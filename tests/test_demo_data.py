"""The committed demo data is what its generator makes, and nothing held out occurs in training."""

import json
import subprocess
import sys

from tests.conftest import ROOT

ORDERS = ROOT / "data" / "orders"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (ORDERS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def answers(name: str) -> list[dict]:
    return [json.loads(row["messages"][-1]["content"]) for row in rows(name)]


def test_the_files_are_what_the_generator_makes():
    ended = subprocess.run(
        [sys.executable, ROOT / "data" / "make_orders.py", "--check"], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_there_are_enough_rows_and_each_answer_stands_in_its_question():
    assert len(rows("heldout")) >= 200 and len(rows("train")) >= 1000
    for row in rows("train") + rows("heldout"):
        question, answer = row["messages"][-2]["content"], json.loads(row["messages"][-1]["content"])
        assert list(answer) == ["customer", "item", "quantity", "city"]
        assert all(str(value) in question for value in answer.values())
        assert row["messages"][-1]["content"] == json.dumps(answer, ensure_ascii=False)


def test_no_value_of_the_held_out_rows_occurs_in_training():
    for key in ("customer", "item", "quantity", "city"):
        seen, held_out = ({str(answer[key]) for answer in answers(name)} for name in ("train", "heldout"))
        assert not seen & held_out, key
    for key in ("customer", "item"):  # not even a single word of a name or an item
        seen, held_out = ({word for a in answers(name) for word in a[key].split()} for name in ("train", "heldout"))
        assert not seen & held_out, key


def test_no_question_is_asked_twice():
    questions = [row["messages"][-2]["content"] for name in ("train", "heldout") for row in rows(name)]
    assert len(set(questions)) == len(questions)
