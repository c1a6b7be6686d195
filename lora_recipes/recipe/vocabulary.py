"""What no upstream class says: our own few keys, types that no annotation has, and bounds.

The rest of the schema is read off the libraries (`make schema`), so a new upstream field needs no edit here.
"""

from typing import Any

OWNERS = {
    "model": "transformers.AutoModelForCausalLM.from_pretrained",
    "quantization": "transformers.BitsAndBytesConfig",
    "lora": "peft.LoraConfig",
    "dataset": "datasets.load_dataset",
    "training": "trl.SFTConfig",
    "generation": "transformers.GenerationConfig",
    "checks": "lora_recipes",  # what must hold after training is asked by no library
    "merge": "transformers.PreTrainedModel.save_pretrained",
    "export": "lora_recipes",
    "hub": "huggingface_hub.HfApi.upload_folder",
}

# Builders of `datasets` that read local files, and the forms of a row (`lora_recipes.data.formats` has their columns).
LOCAL_BUILDERS = ("json", "csv", "parquet", "arrow", "text")
FORMATS = ("text", "messages", "prompt_completion", "alpaca", "sharegpt", "question_answer", "input_ids")

# How several adapters become one (`merge --method`).
COMBINATIONS = ("linear", "ties", "dare_ties", "svd")

_DTYPE = {"enum": ["float32", "float16", "bfloat16"]}
_NAME = {"type": "string", "minLength": 1}
# Limits that are far from what anybody trains with, and near enough that nothing overflows or never ends on its way there.
MOST_STEPS = 10**9
MOST_ROWS = 10**9
MOST_TOKENS = 10**8  # of one text; counted in 32 bits
MOST_EPOCHS = 10**6
MOST_AT_ONCE = 10**6  # rows of a step, answers
MOST_PROCESSES = 1_024
MOST_RANK = 1_024
MOST_ALPHA = 10**6
_RANK = {"type": "integer", "minimum": 1, "maximum": MOST_RANK}
_TOKEN = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_NEW_TOKENS = {"type": "integer", "minimum": 1, "maximum": MOST_TOKENS}
_FRACTION = {"type": "number", "minimum": 0, "maximum": 1}
_TEXTS = {"anyOf": [_NAME, {"type": "array", "minItems": 1, "items": _NAME}]}
_LEAST = {"type": "object", "additionalProperties": False, "required": ["min"], "properties": {"min": _FRACTION}}
# One prompt of `checks.prompts` and what its answer must be; `lora_recipes.judge` holds answers against it.
EXPECTATION = {
    "type": "object",
    "additionalProperties": False,
    "required": ["prompt"],
    "properties": {
        "prompt": _NAME | {"description": "What is asked."},
        "contains": _TEXTS | {"description": "Texts that the answer holds, all of them."},
        "equals": {"type": "string", "description": "The whole answer, without white space around it."},
        "regex": _NAME | {"description": "A Python regular expression that matches somewhere in the answer."},
        "json": {
            "type": ["boolean", "object"],
            "description": "The answer is JSON; a mapping is the JSON schema that it satisfies.",
        },
        "max_new_tokens": _NEW_TOKENS | {"description": "Limit of this answer."},
        "stops": {
            "type": "boolean",
            "description": "The answer ends by itself, without a loop and without a control token in it. Unset: true.",
        },
        "differs_from_base": {"type": "boolean", "description": "The untrained model answers something else."},
    },
}

# The keys no upstream class owns. Few on purpose: a key here is a thing the libraries do not have.
OWN_KEYS: dict[str, dict[str, dict[str, Any]]] = {
    "dataset": {
        "eval_split": {
            "anyOf": [
                _NAME,
                {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                {"type": "null"},
            ],
            "description": "What is held out for the evaluation loss and the score of `generate`: a split of the same "
            "source, or a seeded share of its rows such as 0.05.",
        },
        "weight": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": MOST_EPOCHS,
            "description": "How often each row of this source is seen in an epoch: 2 twice, 0.5 a seeded half. Unset: 1.",
        },
        "format": {
            "enum": list(FORMATS),
            "description": "Form of the rows. Unset: recognised by the columns.",
        },
        "columns": {
            "type": "object",
            "additionalProperties": _NAME,
            "description": "Field of the format to the column that holds it, such as "
            "`{prompt: question, completion: answer}`.",
        },
        "bad_rows": {
            "enum": ["error", "skip"],
            "description": "What a row that cannot be trained on does: stop (default), or be left out and written to "
            "rejected.jsonl.",
        },
        "max_bad_fraction": _FRACTION
        | {
            "description": "Largest share of rows that `bad_rows: skip` may leave out. "
            "Unset: no limit but one row must remain."
        },
        "truncation": {
            "enum": ["error", "drop", "keep_start"],
            "description": "What happens to a row longer than `training.max_length`: error (default), the row is left "
            "out, or its end is cut off.",
        },
        "max_truncated_fraction": _FRACTION
        | {"description": "Largest share of rows that `truncation` may drop or cut. Unset: no limit."},
        "max_duplicate_fraction": _FRACTION
        | {"description": "Largest share of rows that repeat an earlier row. Unset: no limit."},
        "overlap": {
            "enum": ["error", "allow"],
            "description": "What a held-out row that is also a training row does. Unset: error.",
        },
        "control_tokens": {
            "enum": ["error", "escape", "keep"],
            "description": "What a control token of the tokenizer written inside a row's text does: error (default), "
            "become plain text, or (`format: text` only) stay a control token.",
        },
    },
    "training": {
        "loraplus_lr_ratio": {
            "type": "number",
            "exclusiveMinimum": 1,
            "maximum": 10**6,
            "description": "LoRA+: the learning rate of every B is this many times that of A "
            "(peft.optimizers.create_loraplus_optimizer).",
        },
        "loraplus_lr_embedding": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1,
            "description": "LoRA+: learning rate of adapters on embeddings. Unset: 1e-6.",
        },
        "lorafa": {
            "type": "boolean",
            "description": "LoRA-FA: A stays as it was drawn, B alone is trained (peft.optimizers.create_lorafa_optimizer).",
        },
    },
    "generation": {
        "prompts": {
            "type": "array",
            "items": _NAME,
            "description": "Questions that `generate` and the parity proof of `merge` ask, beside the held-out rows.",
        },
        "batch_size": {
            "type": "integer",
            "minimum": 1,
            "maximum": MOST_AT_ONCE,
            "description": "Prompts answered at a time. Unset: 16.",
        },
        "max_rows": {
            "type": ["integer", "null"],
            "minimum": 0,
            "maximum": MOST_ROWS,
            "description": "Held-out rows to answer and score. Unset or null: all of them.",
        },
    },
    "checks": {
        "prompts": {
            "type": "array",
            "items": EXPECTATION,
            "description": "Prompts whose answers must be as they say, or `generate` ends with exit code 4.",
        },
        "scores": {
            "type": "object",
            "additionalProperties": False,
            "properties": dict.fromkeys(("exact_match", "field_match", "token_f1"), _LEAST),
            "description": "Least score of the trained model over the held-out rows, such as `{exact_match: {min: 0.9}}`.",
        },
        "min_stopped": _FRACTION
        | {
            "description": "Least share of all answers that end by themselves, without a loop or a control token. "
            "Unset: 0.95; 0 switches it off."
        },
        "forgetting": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "data_files": {"anyOf": [_NAME, {"type": "array", "minItems": 1, "items": _NAME}]},
                "max_rows": {"type": "integer", "minimum": 1, "maximum": MOST_ROWS},
                "max_loss_increase": {"type": "number", "minimum": 0},
                "max_kl": {"type": "number", "exclusiveMinimum": 0},
            },
            "description": "What `evaluate` asks of text that the run did not train on: `data_files` (unset: "
            "data/general), `max_rows`, and the largest rise of its loss and KL divergence from the base, both in nats "
            "a token (unset: 0.2 and 0.3).",
        },
    },
    "export": {
        "formats": {
            "type": "array",
            "minItems": 1,
            "items": {"enum": ["gguf", "ollama", "adapter"]},
            "description": "What `export` writes. Unset: gguf and ollama.",
        },
        "outtype": {
            "enum": ["f32", "f16", "bf16", "q8_0"],
            "description": "Type of the weights in the GGUF file. Unset: f16.",
        },
        "llama_cpp": _NAME
        | {
            "description": "Folder of a llama.cpp checkout, whose converter writes the GGUF file of families that this "
            "project does not convert itself."
        },
    },
    "hub": {
        "folder": {
            "enum": ["adapter", "merged", "exports"],
            "description": "What is pushed. Unset: adapter, or merged where the whole model was trained.",
        },
    },
    "merge": {
        "dtype": _DTYPE
        | {
            "description": "Type the base is loaded in, merged in and saved in. Unset: `model.dtype`, or the checkpoint's own."
        },
        "base": {
            "enum": ["original", "dequantized"],
            "description": "For an adapter trained on 4-bit weights: merge into the original weights (default), or into "
            "the dequantized 4-bit weights, which is the function that was trained.",
        },
        "proof": {
            "enum": ["behaviour", "weights"],
            "description": "What is proved before anything is published: that adapter and merged model behave alike "
            "(default; needs memory for one of them), or only that the weights are right.",
        },
    },
}

# from_pretrained takes these through **kwargs, so a signature does not show them.
MODEL_KEYWORDS: dict[str, dict[str, Any]] = {
    "pretrained_model_name_or_path": _NAME
    | {
        "description": "A hub id, a local folder, or `package:NAME` for weights that an installed Python package carries."
    },
    "revision": _NAME | {"description": "Branch, tag or commit of a hub id; pin a commit to repeat a run exactly."},
    "dtype": {
        "enum": ["auto", "float32", "float16", "bfloat16"],
        "description": "Type the weights are loaded in. Unset: the checkpoint's own.",
    },
    "attn_implementation": _NAME | {"description": "`sdpa`, `eager`, `flash_attention_2`, ..."},
    "device_map": {
        "type": ["string", "object"],
        "description": "Where the parts of the model go: `auto`, or module name to device.",
    },
    "max_memory": {"type": "object", "description": "Bytes that `device_map: auto` may use on each device."},
    "trust_remote_code": {
        "type": "boolean",
        "description": "Run code that the model's repository ships. Needs `revision` pinned to a commit.",
    },
    "subfolder": {"type": "string", "description": "Folder inside the repository that holds the weights."},
    "variant": _NAME | {"description": "Variant of the weight files, such as `fp16`."},
    "cache_dir": _NAME | {"description": "Where downloads are kept. Unset: the Hugging Face cache."},
    "local_files_only": {"type": "boolean", "description": "Never ask the hub; use what is in the cache."},
    "use_safetensors": {"type": "boolean", "description": "Refuse weights that are not safetensors."},
}
SAVE_KEYWORDS: dict[str, dict[str, Any]] = {
    "max_shard_size": {
        "type": ["string", "integer"],
        "pattern": r"^(?=.*[1-9])[0-9]{1,9}(\.[0-9]{1,9})?\s*[KMGTkmgt][Bb]$(?!\n)",
        "minimum": 1,
        "description": "Largest weight file, such as `5GB`. Unset: 50GB.",
    },
}
HUB_KEYWORDS: dict[str, dict[str, Any]] = {
    "repo_id": _NAME | {"description": "Repository that `push` creates or adds to, such as `me/my-model`."},
    "private": {"type": "boolean", "description": "Whether a repository that is created is private. Unset: true."},
    "revision": _NAME | {"description": "Branch that is pushed to. Unset: main."},
    "commit_message": _NAME | {"description": "Message of the commit."},
}

_FILES = {"type": "array", "items": _NAME}
_COMPUTE_DTYPE = {"enum": ["float32", "float16", "bfloat16"]}

# Where a class's own annotation or docstring is looser than what the class takes.
TYPES: dict[str, dict[str, dict[str, Any]]] = {
    "quantization": {
        "bnb_4bit_compute_dtype": _COMPUTE_DTYPE,
        "bnb_4bit_quant_type": {"enum": ["nf4", "fp4"]},
        "bnb_4bit_quant_storage": {"enum": ["uint8", "int8", "float16", "bfloat16", "float32"]},
        "llm_int8_skip_modules": {"type": "array", "items": {"type": "string"}},
    },
    "lora": {
        "init_lora_weights": {
            "anyOf": [
                {"type": "boolean"},
                {
                    "enum": [
                        "gaussian",
                        "olora",
                        "pissa",
                        "orthogonal",
                        "mica",
                        "eva",
                        "corda",
                        "lora_ga",
                        "loftq",
                    ]
                },
                {"type": "string", "pattern": "^pissa_niter_[0-9]{1,3}$"},
            ]
        },
        "rank_pattern": {"type": ["object", "null"], "additionalProperties": _RANK},
        "alpha_pattern": {
            "type": ["object", "null"],
            "additionalProperties": {"type": "number", "exclusiveMinimum": 0, "maximum": MOST_ALPHA},
        },
        "layer_replication": {
            "type": ["array", "null"],
            "items": {
                "type": "array",
                "minItems": 2,
                "maxItems": 2,
                "items": {"type": "integer", "minimum": 0, "maximum": 10_000},
            },
        },
    },
    "dataset": {
        "revision": {"type": ["string", "null"]},
        "data_files": {
            "anyOf": [
                _NAME,
                _FILES,
                {"type": "object", "additionalProperties": {"anyOf": [_NAME, _FILES]}},
                {"type": "null"},
            ]
        },
        "split": _NAME | {"description": "Split that is trained on. Unset: `train`."},
        "path": _NAME,
        "streaming": {
            "type": "boolean",
            "description": "Read rows as they are needed and keep no tokens on disk; needs `training.max_steps`.",
        },
    },
    "training": {
        "loss_type": {"enum": ["nll", "dft"]},
        "debug": {"type": "string"},
        "include_num_input_tokens_seen": {"enum": ["all", "non_padding", "no", True, False]},
        "pad_to_multiple_of": {
            "anyOf": [{"type": "integer", "minimum": 1, "maximum": 10**5}, {"enum": ["auto"]}, {"type": "null"}]
        },
    },
    "generation": {
        "eos_token_id": _TOKEN | {"type": ["integer", "array", "null"], "items": _TOKEN},
        "forced_eos_token_id": _TOKEN | {"type": ["integer", "array", "null"], "items": _TOKEN},
        "stop_strings": {"type": ["string", "array", "null"]},
    },
}

# Bounds: (schema keyword, value). The classes accept anything.
POSITIVE = {"exclusiveMinimum": 0}
AT_LEAST_ONE = {"minimum": 1}
NOT_EMPTY = {"minLength": 1}
COUNT = {"minimum": 1, "maximum": MOST_STEPS}
INTERVAL = {"exclusiveMinimum": 0, "maximum": 10**12}
AT_ONCE = {"minimum": 1, "maximum": MOST_AT_ONCE}
PROCESSES = {"maximum": MOST_PROCESSES}
SEED = {"minimum": 0, "maximum": 2**32 - 1}  # numpy takes no other
NOT_NEGATIVE = {"minimum": 0}
SHARE = {"minimum": 0, "exclusiveMaximum": 1}
BOUNDS: dict[str, dict[str, Any]] = {
    "lora": {
        "r": {"minimum": 1, "maximum": MOST_RANK},
        "lora_alpha": {"minimum": 1, "maximum": MOST_ALPHA},
        "lora_dropout": SHARE,
    },
    "quantization": {"llm_int8_threshold": NOT_NEGATIVE},
    "training": {
        "per_device_train_batch_size": AT_ONCE,
        "per_device_eval_batch_size": AT_ONCE,
        "gradient_accumulation_steps": AT_ONCE,
        "eval_accumulation_steps": COUNT,
        "torch_empty_cache_steps": COUNT,
        "num_train_epochs": POSITIVE | {"maximum": MOST_EPOCHS},
        "max_steps": {"minimum": -1, "maximum": MOST_STEPS},
        "learning_rate": {"exclusiveMinimum": 0, "maximum": 1},
        "warmup_steps": {"minimum": 0, "maximum": MOST_STEPS},
        "weight_decay": {"minimum": 0, "maximum": 10**4},
        "adam_beta1": SHARE,
        "adam_beta2": SHARE,
        "adam_epsilon": POSITIVE | {"maximum": 10**4},
        "max_grad_norm": NOT_NEGATIVE,
        "label_smoothing_factor": SHARE,
        "neftune_noise_alpha": {"minimum": 0, "maximum": 10**4},
        "logging_steps": INTERVAL,
        "eval_steps": INTERVAL,
        "eval_delay": {"minimum": 0, "maximum": MOST_STEPS},
        "save_steps": INTERVAL,
        "save_total_limit": AT_LEAST_ONE,
        "max_length": {"minimum": 2, "maximum": MOST_TOKENS},
        "seed": SEED,
        "data_seed": SEED,
        "dataloader_num_workers": NOT_NEGATIVE | PROCESSES,
        "dataloader_prefetch_factor": {"minimum": 1, "maximum": 10_000},
        "dataset_num_proc": AT_LEAST_ONE | PROCESSES,
        "ddp_bucket_cap_mb": {"minimum": 1, "maximum": 10**6},
        "ddp_timeout": {"minimum": 1, "maximum": 10**8},  # seconds: three years
        "eos_token": NOT_EMPTY,
        "chat_template_path": NOT_EMPTY,
    },
    "generation": {
        "max_new_tokens": {"minimum": 1, "maximum": MOST_TOKENS},
        "min_new_tokens": {"minimum": 0, "maximum": MOST_TOKENS},
        "min_length": {"minimum": 0, "maximum": MOST_TOKENS},
        "max_cache_len": {"minimum": 1, "maximum": MOST_TOKENS},
        "max_time": POSITIVE,
        "temperature": POSITIVE,
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "top_k": NOT_NEGATIVE,
        "min_p": {"minimum": 0, "maximum": 1},
        "top_h": {"exclusiveMinimum": 0, "maximum": 1},
        "typical_p": {"exclusiveMinimum": 0, "maximum": 1},
        "epsilon_cutoff": SHARE,
        "eta_cutoff": SHARE,
        "num_beams": {"minimum": 1, "maximum": 10_000},
        "no_repeat_ngram_size": NOT_NEGATIVE,
        "length_penalty": {"minimum": -20, "maximum": 20},
        "repetition_penalty": POSITIVE,
        "forced_bos_token_id": {"minimum": 0, "maximum": 2**31 - 1},
    },
}
