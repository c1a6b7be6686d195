"""The hook that counts other tools' trainings, and what becomes of its lines and of the rows the tools are given."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.peers import Lab, held_out_of, measure, measure_merge, traced
from benchmarks.peers.hook import sitecustomize as hook
from benchmarks.peers.trace import figures

# Two rows of a batch: 5 ids and 3; the second is padded with the end token, and closed by one of its own.
TRAINS = """
import torch
torch.manual_seed(0)
embedding, head = torch.nn.Embedding(10_001, 8), torch.nn.Linear(8, 10_001)
head.weight.requires_grad_(False)
optimizer = torch.optim.SGD([*embedding.parameters(), *head.parameters()], lr=0.5)
ids = torch.tensor([[5, 6, 7, 8, 2], [5, 6, 2, 2, 2]])
labels = torch.tensor([[-100, 6, 7, 8, 2], [-100, 6, 2, -100, -100]])
for _ in range(3):
    scores = head(embedding(ids))
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum").div(6).backward()
    with torch.no_grad():
        embedding(ids)
    optimizer.step()
    optimizer.zero_grad()
"""

# The same rows by a Trainer that computes the token with which both begin once only.
SHARES = """
import torch
from transformers import Trainer, TrainingArguments

class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(10_001, 8), torch.nn.Linear(8, 10_001)
    def forward(self, input_ids, labels):
        scores = self.head(self.embedding(input_ids)).flatten(0, 1)
        return {"loss": torch.nn.functional.cross_entropy(scores, labels.flatten())}

class Shares(Trainer):
    def training_step(self, model, inputs, count=None):
        flat = {name: torch.cat((rows[0], rows[1, 1:]))[None] for name, rows in inputs.items()}
        return super().training_step(model, flat, count)

rows = [{"input_ids": [5, 6, 7, 8, 2], "labels": [-100, 6, 7, 8, 2]}, {"input_ids": [5, 6, 2, 2, 2], "labels": [-100, 6, 2, -100, -100]}]
args = TrainingArguments("out", use_cpu=True, max_steps=3, report_to=[], save_strategy="no", gradient_accumulation_steps=2,
                         per_device_train_batch_size=2)
Shares(Toy(), args, train_dataset=rows * 2).train()
"""


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    lab = Lab(tmp_path)
    for name in ("data", "log"):
        (tmp_path / name).mkdir()
    lab.messages.touch()
    return lab


@pytest.mark.parametrize(
    ("row", "real"),
    [
        ([5, 6, 7], 3),
        ([5, 6, 2], 3),  # its own end
        ([5, 6, 2, 2, 2], 3),  # one end of its own, two of padding
        ([5, 6, 2, 198, 2, 2], 4),  # closed by a template: all that follows is padding
        ([2, 2, 5, 6, 0], 2),  # padded on both sides
        ([2, 2], 0),
        ([5, 2, 198, 5, 6, 2], 6),  # two rows in one
    ],
)
def test_padding_is_what_stands_at_either_end_of_a_row(row: list[int], real: int) -> None:
    assert hook.real_tokens(row) == real


def test_a_training_is_counted_from_outside(lab: Lab) -> None:
    row = traced([sys.executable, "-c", TRAINS], lab.folder, "toy", cores=1)
    assert (row["rc"], row["steps"], row["threads"]) == (0, 3, 1)
    assert (row["computed_tokens"], row["real_tokens"], row["supervised_tokens"]) == (3 * 10, 3 * 8, 3 * 6)
    assert row["losses"] == sorted(row["losses"], reverse=True)
    assert row["learning_rates"] == [0.5] * 3
    assert row["trainable"] == 10_001 * 9  # the frozen head's weight is in the optimizer, and not counted
    assert 0 < row["first_step"] < row["wall"]
    assert 0 < row["first_step_cpu"] <= row["cpu"] + 0.1
    assert 0 < row["training_rss_mb"] <= row["rss_mb"] + 1


def test_what_rows_share_is_real_in_each_of_them_however_often_it_is_computed(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = traced([sys.executable, "-c", SHARES], lab.folder, "shares", cores=1)
    assert (row["rc"], row["steps"]) == (0, 3)
    batches = 3 * 2
    assert (row["computed_tokens"], row["real_tokens"], row["supervised_tokens"]) == (
        batches * 9,
        batches * 8,
        batches * 6,
    )


def test_a_command_that_fails_has_its_last_words_in_its_row(lab: Lab) -> None:
    row = traced([sys.executable, "-c", "raise SystemExit('no such thing')"], lab.folder, "fails")
    assert (row["rc"], row["error"]) == (1, "no such thing")
    assert "steps" not in row


def test_a_command_that_does_not_end_is_ended(lab: Lab) -> None:
    row = traced([sys.executable, "-c", "import time; time.sleep(60)"], lab.folder, "hangs", timeout=1)
    assert row["rc"] == "timeout"


def test_rates_are_of_the_second_step_to_the_last(tmp_path: Path) -> None:
    line = {"pid": 1, "computed": 40, "real": 20, "supervised": 10, "loss": 1.0, "learning_rate": 0.1}
    line |= {"trainable": 1, "dtype": "float32", "threads": 1, "peak_mb": 1.0}
    steps = [line | {"time": 100 + 2 * n, "cpu": 50 + n, "session_cpu": 60 if n == 0 else None} for n in range(3)]
    other = line | {"pid": 2, "time": 0, "cpu": 0, "session_cpu": 0}
    (tmp_path / "trace").write_text("".join(json.dumps(step) + "\n" for step in [other, *steps]), encoding="utf-8")
    found = figures(tmp_path / "trace", started=90)
    assert (found["first_step"], found["first_step_cpu"], found["steps"]) == (10, 60, 3)
    assert (found["real_per_second"], found["real_per_cpu_second"]) == (10, 20)
    assert (found["cpu_per_step"], found["seconds_per_step"]) == (1, 2)


def test_what_a_tool_cannot_do_is_a_row_with_its_reason(lab: Lab) -> None:
    assert measure("litgpt", "qv", 1, lab.folder, schedule="linear")["reason"].startswith("has one schedule")
    assert measure_merge("trl", "qv", lab.folder)["reason"] == "no command that merges"
    assert measure_merge("swift", "qv", lab.folder)["reason"] == "not installed"
    assert "not PEFT's" in held_out_of("litgpt", "qv", lab.folder)["reason"]
