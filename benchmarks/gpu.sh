#!/usr/bin/env bash
# The job's table on a card, in one command: this project and `trl sft`, LoRA of SmolLM2-135M in bf16, both jobs.
#
#   bash benchmarks/gpu.sh [alpaca.json] [words of `python -m benchmarks.suite`, such as --steps 200]
#
# Makes .venv here and TRL's own environment in ~/.cache/lora-recipes/bench-gpu (together about 15 GB with CUDA). Without a
# file, the rows are the demo's own orders. With `flash-attn` installed in .venv, our job runs with it once more. Figures go
# to benchmarks/results.json (job-gpu), the table to docs/performance.md.
set -euo pipefail
cd "$(dirname "$0")/.."

BIN="${VENV:-.venv}/bin"
LAB="${LAB:-$HOME/.cache/lora-recipes/bench-gpu}"
DATA=""
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    DATA=$1
    shift
fi

make install
if ! "$BIN/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch sees no GPU here (CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-unset})" >&2
    exit 5
fi
nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv || true

mkdir -p "$LAB"
if [ -z "$DATA" ]; then
    DATA="$LAB/orders.json"
    "$BIN/python" - data/orders/train.jsonl "$DATA" <<'PYTHON'
import json
import sys
from pathlib import Path

rows = []
for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
    said = {message["role"]: message["content"] for message in json.loads(line)["messages"]}
    rows.append({"instruction": said["system"], "input": said["user"], "output": said["assistant"]})
Path(sys.argv[2]).write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
PYTHON
fi

"$BIN/python" -m benchmarks.suite job --device gpu --lab "$LAB" --data "$DATA" --cores "$(nproc)" "$@"
