"""Mean loss per supervised token of an adapter in PEFT's format: plain transformers and PEFT, row by row, no padding.

python -m benchmarks.peers.held_out BASE ROWS [ADAPTER]

The same for every tool: the base's own chat template, and a loss on the reply with its end token. Prints JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

MAX_LENGTH = 512
IGNORED = -100


def encoded(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """A row's ids and labels: the reply's through its end token."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    said = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return (asked + said)[:MAX_LENGTH], ([IGNORED] * len(asked) + said)[:MAX_LENGTH]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("adapter", type=Path, nargs="?")
    args = parser.parse_args()

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
    model.eval()
    total, tokens, rows = 0.0, 0, 0
    with torch.inference_mode():
        for line in args.rows.read_text(encoding="utf-8").splitlines():
            ids, labels = encoded(tokenizer, json.loads(line)["messages"])
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
            targets = torch.tensor(labels[1:])
            total += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
            tokens += int((targets != IGNORED).sum())
            rows += 1
    print(json.dumps({"loss": total / tokens, "supervised_tokens": tokens, "rows": rows}))


if __name__ == "__main__":
    main()
