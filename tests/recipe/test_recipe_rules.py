"""The rules between keys: what breaks each and what keeps it, that the refusal says the way out, and which data is refused."""

from pathlib import Path

import pytest

from lora_recipes.errors import EXIT_REFUSED, EXIT_USER
from lora_recipes.recipe import InvalidRecipe, load_recipe
from lora_recipes.recipe.rules import RULES
from tests.recipe.refusals import BASE, refusal, write

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# (rule, overrides that break it, overrides that do not, key that the finding names)
RULE_CASES = [
    ("steps", ["training.max_steps=0"], ["training.max_steps=-1"], "training.max_steps"),
    (
        "steps",
        ["training.warmup_steps=10", "training.max_steps=10"],
        ["training.warmup_steps=9", "training.max_steps=10"],
        "training.warmup_steps",
    ),
    (
        "steps",
        ["training.warmup_steps=10", "training.max_steps=5"],
        ["training.warmup_steps=10", "training.max_steps=5", "training.lr_scheduler_type=constant"],
        "training.warmup_steps",
    ),
    (
        "steps",
        ["training.warmup_steps=2", "training.max_steps=2"],
        ["training.warmup_steps=1", "training.max_steps=1"],
        "training.warmup_steps",
    ),
    (
        "evaluation",
        ["training.eval_steps=5"],
        ["training.eval_steps=5", "training.eval_strategy=no"],
        "training.eval_steps",
    ),
    (
        "evaluation",
        ["training.eval_steps=0.1"],
        ["training.eval_steps=0.1", "training.eval_strategy=steps", "dataset.eval_split=0.1"],
        "training.eval_steps",
    ),
    (
        "best",
        ["training.metric_for_best_model=loss"],
        ["training.metric_for_best_model=loss", "training.eval_strategy=no"],
        "training.metric_for_best_model",
    ),
    (
        "best",
        ["training.greater_is_better=false"],
        ["training.greater_is_better=false", "training.eval_strategy=steps", "dataset.eval_split=0.1"],
        "training.greater_is_better",
    ),
    *(
        (
            "workers",
            [f"training.dataloader_{key}={value}"],
            [f"training.dataloader_{key}={value}", "training.dataloader_num_workers=1"],
            f"training.dataloader_{key}",
        )
        for key, value in (("persistent_workers", "true"), ("multiprocessing_context", "spawn"), ("prefetch_factor", 2))
    ),
    ("required", ["model=null"], [], "model.pretrained_model_name_or_path"),
    ("required", ["model=null", "model.dtype=auto"], ["model.dtype=auto"], "model.pretrained_model_name_or_path"),
    ("required", ["dataset=null"], ["dataset.path=org/data"], "dataset.path"),
    ("required", ["dataset=[{path: org/a}, {split: test}]"], ["dataset=[{path: org/a}]"], "dataset.1.path"),
    ("one_precision", ["training.fp16=true", "training.bf16=true"], ["training.fp16=true"], "training.fp16"),
    ("one_precision", ["training.bf16=true", "training.fp16=true"], ["training.bf16=true"], "training.fp16"),
    (
        "one_quantization",
        ["quantization={load_in_4bit: true, load_in_8bit: true}"],
        ["quantization={load_in_4bit: true}"],
        "quantization.load_in_4bit",
    ),
    (
        "one_quantization",
        ["quantization={bnb_4bit_quant_type: nf4}"],
        ["quantization={load_in_8bit: true, load_in_4bit: false}"],
        "quantization.load_in_4bit",
    ),
    ("one_quantization", ["quantization={}"], ["quantization=null"], "quantization.load_in_4bit"),
    ("lora_targets", ["lora.target_modules=null"], ["lora.target_modules=[q_proj]"], "lora.target_modules"),
    (
        "lora_targets",
        ["lora.target_modules=[]"],
        ["lora.target_modules=[]", "lora.target_parameters=[w]"],
        "lora.target_modules",
    ),
    (
        "lora_targets",
        ["lora.target_modules=[q_proj, lm_head]"],
        ["lora.modules_to_save=[lm_head]"],
        "lora.target_modules",
    ),
    ("lora_targets", ["lora.target_modules=lm_head"], ["lora.target_modules=.*head"], "lora.target_modules"),
    ("full", ["lora=null", "quantization={load_in_4bit: true}"], ["lora=null"], "quantization"),
    (
        "full",
        ["lora=null", "training.fp16=true", "model.dtype=bfloat16"],
        ["lora=null", "training.fp16=true", "model.dtype=float32"],
        "training.fp16",
    ),
    ("full", ["lora=null", "merge.base=original"], ["lora=null", "merge.dtype=float32"], "merge.base"),
    ("first_weights", ["lora.init_lora_weights=corda"], ["lora.init_lora_weights=pissa"], "lora.init_lora_weights"),
    ("first_weights", ["lora.init_lora_weights=lora_ga"], ["lora.init_lora_weights=eva"], "lora.init_lora_weights"),
    (
        "first_weights",
        ["lora.init_lora_weights=pissa_niter_4", "quantization={load_in_4bit: true}"],
        ["lora.init_lora_weights=loftq", "quantization={load_in_4bit: true}"],
        "lora.init_lora_weights",
    ),
    ("first_weights", ["lora.init_lora_weights=loftq"], ["lora.init_lora_weights=true"], "lora.init_lora_weights"),
    (
        "first_weights",
        ["lora.eva_config={rho: 1.5}"],
        ["lora.eva_config={rho: 1.5}", "lora.init_lora_weights=eva"],
        "lora.eva_config",
    ),
    (
        "adapter_optimizers",
        ["lora=null", "training.loraplus_lr_ratio=16"],
        ["training.loraplus_lr_ratio=16"],
        "training.loraplus_lr_ratio",
    ),
    ("adapter_optimizers", ["lora=null", "training.lorafa=true"], ["training.lorafa=true"], "training.lorafa"),
    (
        "adapter_optimizers",
        ["training.lorafa=true", "training.loraplus_lr_ratio=16"],
        ["training.lorafa=false", "training.loraplus_lr_ratio=16"],
        "training.lorafa",
    ),
    (
        "adapter_optimizers",
        ["training.loraplus_lr_embedding=1e-5"],
        ["training.loraplus_lr_embedding=1e-5", "training.loraplus_lr_ratio=16"],
        "training.loraplus_lr_embedding",
    ),
    (
        "adapter_optimizers",
        ["training.lorafa=true", "training.optim=sgd"],
        ["training.lorafa=true", "training.optim=adamw_torch"],
        "training.optim",
    ),
    (
        "adapter_optimizers",
        ["training.lorafa=true", "training.optim_args=a=1"],
        ["training.lorafa=false", "training.optim_args=a=1"],
        "training.optim_args",
    ),
    (
        "adapter_optimizers",
        ["training.loraplus_lr_ratio=4", "training.optim=adalomo"],
        ["training.loraplus_lr_ratio=4", "training.optim=adafactor"],
        "training.optim",
    ),
    ("only_b", ["training.lorafa=true", "lora.use_dora=true"], ["training.lorafa=true"], "training.lorafa"),
    ("only_b", ["training.lorafa=true", "lora.lora_bias=true"], ["lora.lora_bias=true"], "training.lorafa"),
    ("only_b", ["training.lorafa=true", "lora.target_parameters=[w]"], ["training.lorafa=true"], "training.lorafa"),
    (
        "only_b",
        ["training.lorafa=true", "lora.init_lora_weights=mica"],
        ["training.lorafa=true", "lora.init_lora_weights=pissa"],
        "training.lorafa",
    ),
    (
        "first_weights",
        ["lora.init_lora_weights=loftq", "quantization={load_in_8bit: true}"],
        ["lora.init_lora_weights=loftq", "quantization={load_in_4bit: true}"],
        "lora.init_lora_weights",
    ),
    (
        "first_weights_together",
        ["lora.init_lora_weights=olora", "lora.target_parameters=[w]"],
        ["lora.init_lora_weights=olora"],
        "lora.init_lora_weights",
    ),
    (
        "first_weights_together",
        ["lora.init_lora_weights=eva", "lora.trainable_token_indices=[1]"],
        ["lora.init_lora_weights=pissa", "lora.trainable_token_indices=[1]"],
        "lora.init_lora_weights",
    ),
    (
        "first_weights_together",
        ["lora.init_lora_weights=pissa", "lora.use_rslora=true", "lora.rank_pattern={q_proj: 8}"],
        ["lora.init_lora_weights=pissa", "lora.use_rslora=true"],
        "lora.use_rslora",
    ),
    (
        "first_weights_together",
        ["lora.init_lora_weights=pissa", "lora.layer_replication=[[0, 1], [0, 1]]"],
        ["lora.layer_replication=[[0, 1], [0, 1]]"],
        "lora.layer_replication",
    ),
    ("lora_targets", ["lora.task_type=SEQ_CLS"], ["lora.task_type=CAUSAL_LM"], "lora.task_type"),
    ("evaluation", ["training.eval_strategy=steps"], ["training.eval_strategy=no"], "training.eval_strategy"),
    (
        "evaluation",
        ["training.eval_strategy=epoch"],
        ["training.eval_strategy=epoch", "dataset.eval_split=test"],
        "training.eval_strategy",
    ),
    ("evaluation", ["training.eval_on_start=true"], ["training.eval_on_start=false"], "training.eval_strategy"),
    (
        "evaluation",
        ["training.load_best_model_at_end=true"],
        ["training.load_best_model_at_end=true", "training.eval_strategy=epoch", "dataset.eval_split=test"],
        "training.load_best_model_at_end",
    ),
    ("evaluation", ["dataset.eval_split=train"], ["dataset.eval_split=test"], "dataset.eval_split"),
    ("evaluation", ["dataset=[{path: a/b, eval_split: train}]"], ["dataset.eval_split=0.1"], "dataset.0.eval_split"),
    (
        "evaluation",
        ["training.eval_strategy=epoch", "dataset=[{path: a/b}, {path: a/c}]"],
        ["training.eval_strategy=epoch", "dataset=[{path: a/b}, {path: a/c, eval_split: 0.1}]"],
        "training.eval_strategy",
    ),
    (
        "packing",
        ["training.eval_packing=true"],
        ["training.eval_packing=true", "training.packing=true"],
        "training.eval_packing",
    ),
    (
        "packing",
        ["training.packing=true", "training.max_length=null"],
        ["training.packing=true", "training.max_length=64"],
        "training.packing",
    ),
    (
        "packing",
        ["training.padding_free=true"],
        ["training.padding_free=true", "training.max_length=null"],
        "training.padding_free",
    ),
    (
        "packing",
        ["training.padding_free=true", "training.max_length=64"],
        ["training.padding_free=true", "training.packing=true"],
        "training.padding_free",
    ),
    (
        "remote_code",
        ["model.trust_remote_code=true"],
        ["model.trust_remote_code=true", f"model.revision={COMMIT}"],
        "model.trust_remote_code",
    ),
    (
        "remote_code",
        ["model.trust_remote_code=true", "model.revision=main"],
        ["model.trust_remote_code=false", "model.revision=main"],
        "model.trust_remote_code",
    ),
    (
        "remote_code",
        ["model.attn_implementation=kernels-community/flash-attn3"],
        [f"model.attn_implementation=kernels-community/flash-attn3@{COMMIT}"],
        "model.attn_implementation",
    ),
    (
        "remote_code",
        ["model.use_safetensors=false"],
        ["model.use_safetensors=true"],
        "model.use_safetensors",
    ),
    (
        "merge_base",
        ["merge.base=dequantized"],
        ["merge.base=dequantized", "quantization.load_in_4bit=true"],
        "merge.base",
    ),
    (
        "merge_base",
        ["merge.base=dequantized", "quantization.load_in_8bit=true"],
        ["merge.base=original"],
        "merge.base",
    ),
    ("generation", ["generation={}"], ["generation={max_new_tokens: 4}"], "generation.max_new_tokens"),
    (
        "generation",
        ["generation={max_new_tokens: 4, temperature: 0.7}"],
        ["generation={max_new_tokens: 4, temperature: 0.7, do_sample: true}"],
        "generation.temperature",
    ),
    (
        "generation",
        ["generation={max_new_tokens: 4, top_p: 0.9, do_sample: false}"],
        ["generation={max_new_tokens: 4, do_sample: false}"],
        "generation.top_p",
    ),
    *(
        (
            "generation",
            [f"generation={{max_new_tokens: 4, {key}: 0.5}}"],
            [f"generation={{max_new_tokens: 4, {key}: 0.5, do_sample: true}}"],
            f"generation.{key}",
        )
        for key in ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
    ),
    (
        "generation",
        ["generation={max_new_tokens: 4, min_new_tokens: 5}"],
        ["generation={max_new_tokens: 4, min_new_tokens: 4}"],
        "generation.min_new_tokens",
    ),
    ("local_files", ["dataset.path=json"], ["dataset.path=json", "dataset.data_files=a.jsonl"], "dataset.data_files"),
    ("local_files", ["dataset={path: csv, data_files: []}"], ["dataset.data_files=a.csv"], "dataset.data_files"),
    *(
        (
            "local_files",
            ["dataset.path=json", "dataset.data_files=a.jsonl", f"dataset.{key}=x"],
            [f"dataset.{key}=x"],
            f"dataset.{key}",
        )
        for key in ("name", "revision", "cache_dir")
    ),
    (
        "local_files",
        ["dataset=[{path: org/a, name: x}, {path: text, data_files: a.txt, name: x}]"],
        ["dataset=[{path: org/a, name: x}, {path: text, data_files: a.txt}]"],
        "dataset.1.name",
    ),
    ("unsafe_files", ["dataset.path=pandas"], ["dataset.path=org/pandas"], "dataset.path"),
    ("unsafe_files", ["dataset.path=./build.py"], ["dataset.path=./build_py"], "dataset.path"),
    ("unsafe_files", ["dataset.data_files=a.PKL"], ["dataset.data_files=a.pkl.jsonl"], "dataset.data_files"),
    ("unsafe_files", ["dataset.data_files=[a.jsonl, a.npy]"], ["dataset.data_files=[a.jsonl]"], "dataset.data_files"),
    (
        "unsafe_files",
        ["dataset=[{path: org/a}, {path: json, data_files: {train: [a.jsonl, b.tar.gz]}}]"],
        ["dataset=[{path: org/a}, {path: json, data_files: {train: [a.jsonl, b.jsonl.gz]}}]"],
        "dataset.1.data_files",
    ),
    (
        "unsafe_files",
        ["dataset.data_files=https://host/a.jsonl"],
        ["dataset.data_files=hf://datasets/org/a/a.jsonl"],
        "dataset.data_files",
    ),
    ("unsafe_files", ["dataset.data_dir=s3://bucket"], ["dataset.data_dir=folder"], "dataset.data_dir"),
    (
        "streaming",
        ["dataset.streaming=true"],
        ["dataset.streaming=true", "training.max_steps=5"],
        "dataset.streaming",
    ),
    (
        "streaming",
        ["training.max_steps=5", "dataset=[{path: a/b}, {path: a/c, streaming: true}]"],
        ["training.max_steps=5", "dataset=[{path: a/b, streaming: true}, {path: a/c, streaming: true}]"],
        "dataset.1.streaming",
    ),
    (
        "streaming",
        [
            "dataset.streaming=true",
            "training.max_steps=5",
            "training.train_sampling_strategy=group_by_length",
        ],
        ["dataset.streaming=false", "training.train_sampling_strategy=group_by_length"],
        "training.train_sampling_strategy",
    ),
    (
        "row_limits",
        ["dataset.max_bad_fraction=0.1"],
        ["dataset.max_bad_fraction=0.1", "dataset.bad_rows=skip"],
        "dataset.max_bad_fraction",
    ),
    (
        "row_limits",
        ["dataset.max_truncated_fraction=0", "dataset.truncation=error"],
        ["dataset.max_truncated_fraction=0", "dataset.truncation=drop"],
        "dataset.max_truncated_fraction",
    ),
    (
        "truncation",
        ["dataset.truncation=drop", "training.max_length=null"],
        ["dataset.truncation=drop"],
        "dataset.truncation",
    ),
    (
        "control_tokens",
        ["dataset.control_tokens=keep"],
        ["dataset.control_tokens=keep", "dataset.format=text"],
        "dataset.control_tokens",
    ),
    (
        "control_tokens",
        ["dataset=[{path: a/b, control_tokens: keep, format: messages}]"],
        ["dataset.control_tokens=escape"],
        "dataset.0.control_tokens",
    ),
    (
        "checks",
        ["checks.scores={exact_match: {min: 0.5}}"],
        ["checks.scores={exact_match: {min: 0.5}}", "dataset.eval_split=test"],
        "checks.scores",
    ),
    (
        "checks",
        [
            "checks.scores={token_f1: {min: 0.5}}",
            "dataset.eval_split=test",
            "generation={max_new_tokens: 4, max_rows: 0}",
        ],
        [
            "checks.scores={token_f1: {min: 0.5}}",
            "dataset.eval_split=test",
            "generation={max_new_tokens: 4, max_rows: 1}",
        ],
        "checks.scores",
    ),
    (
        "checks",
        ["checks.prompts=[{prompt: a, max_new_tokens: 4, stops: false, json: false}]"],
        ["checks.prompts=[{prompt: a, max_new_tokens: 4, stops: false, equals: ''}]"],
        "checks.prompts.0",
    ),
    (
        "checks",
        ["checks.prompts=[{prompt: a}]"],
        ["checks.prompts=[{prompt: a}]", "generation.max_new_tokens=4"],
        "checks.prompts.0",
    ),
    (
        "checks",
        ["checks.prompts=[{prompt: a, max_new_tokens: 4}, {prompt: b, max_new_tokens: 4, regex: '(a'}]"],
        ["checks.prompts=[{prompt: b, max_new_tokens: 4, regex: '(a)'}]"],
        "checks.prompts.1.regex",
    ),
    (
        "checks",
        ["checks.prompts=[{prompt: a, max_new_tokens: 4, json: {type: objekt}}]"],
        ["checks.prompts=[{prompt: a, max_new_tokens: 4, json: {type: object}}]"],
        "checks.prompts.0.json",
    ),
    (
        "checks",
        ["checks.prompts=[{prompt: a, max_new_tokens: 4, json: {$ref: 'https://example.org/s.json'}}]"],
        ["checks.prompts=[{prompt: a, max_new_tokens: 4, json: {$ref: '#/$defs/b', $defs: {b: {type: array}}}}]"],
        "checks.prompts.0.json",
    ),
    *(
        (
            "checks",
            [f"checks.prompts=[{{prompt: a, max_new_tokens: 4, json: {broken}}}]"],
            [f"checks.prompts=[{{prompt: a, max_new_tokens: 4, json: {whole}}}]"],
            "checks.prompts.0.json",
        )
        for broken, whole in (
            ("{$ref: '#'}", "{items: {$ref: '#'}}"),
            ("{allOf: [{$ref: '#/allOf/0'}]}", "{allOf: [{type: object, properties: {a: {$ref: '#/allOf/0'}}}]}"),
            (
                "{type: object, required: [a], anyOf: [{$ref: '#'}]}",
                "{anyOf: [{type: array, items: {$ref: '#'}}, true]}",
            ),
            ("{$dynamicRef: '#x', $dynamicAnchor: x}", "{items: {$dynamicRef: '#x'}, $dynamicAnchor: x}"),
            ("{dependentSchemas: {a: {$ref: '#'}}}", "{dependentSchemas: {a: {items: {$ref: '#'}}}}"),
            ("{not: {$ref: '#/not'}}", "{not: {properties: {a: {$ref: '#'}}}}"),
            ("{$ref: '#/const', const: {allOf: 5}}", "{$ref: '#/const', const: {allOf: [{}]}}"),
            ("{$ref: '#/a', a: 7}", "{$ref: '#/a', a: true}"),
            ("{$ref: '#/allOf/x', allOf: [{}]}", "{$ref: '#/allOf/0', allOf: [{}]}"),
            ("{$ref: '#/title/x', title: t}", "{$ref: '#/$defs/x', title: t, $defs: {x: {}}}"),
            ("{allOf: [{$ref: '#/$defs/a'}], $defs: {a: {$ref: '#/b'}}}", "{$ref: '#/$defs/a', $defs: {a: false}}"),
        )
    ),
]


@pytest.mark.promise("R8")
@pytest.mark.parametrize(("rule", "breaks", "holds", "key"), RULE_CASES)
def test_a_rule_between_keys_holds(tmp_path: Path, rule: str, breaks: list[str], holds: list[str], key: str) -> None:
    error = refusal(tmp_path, "", *breaks)
    assert key in [problem.key for problem in error.problems]
    assert error.exit_code == (EXIT_REFUSED if rule in ("unsafe_files", "remote_code") else EXIT_USER)
    load_recipe(tmp_path / "r.yaml", holds)


def test_a_finding_says_the_way_out(tmp_path: Path) -> None:
    for _, breaks, _, key in RULE_CASES:
        if key.startswith("dataset"):
            problems = [problem for problem in refusal(tmp_path, "", *breaks).problems if problem.key == key]
            assert all(problem.hint for problem in problems), breaks


def test_every_rule_has_a_case() -> None:
    assert {rule.__name__ for rule in RULES} == {rule for rule, *_ in RULE_CASES}


def test_a_dataset_without_a_split_trains_on_train(tmp_path: Path) -> None:
    write(tmp_path, "")
    (tmp_path / "base.yaml").write_text(BASE.replace("  split: train\n", ""))
    load_recipe(tmp_path / "r.yaml")
    with pytest.raises(InvalidRecipe, match=r"`dataset\.eval_split` is the training split itself"):
        load_recipe(tmp_path / "r.yaml", ["dataset.eval_split=train"])


@pytest.mark.parametrize(
    "ending", ["pkl", "pickle", "pt", "pth", "npy", "joblib", "py", "zip", "tar", "tgz", "tar.gz", "7z", "rar"]
)
@pytest.mark.parametrize("key", ["path", "data_files"])
def test_what_runs_code_or_writes_files_when_read_is_refused_with_the_reason(
    tmp_path: Path, key: str, ending: str
) -> None:
    error = refusal(tmp_path, f"dataset:\n  {key}: data/a.{ending}")
    [problem] = error.problems
    assert str(error).startswith(f"{tmp_path / 'r.yaml'}:3:3: `dataset.{key}` names a")
    assert "runs code" in problem.message or "outside its folder" in problem.message
    assert error.exit_code == EXIT_REFUSED


@pytest.mark.parametrize("scheme", ["https", "http", "s3", "gs", "ftp", "file", "zip://a.jsonl::https"])
def test_a_url_is_refused_and_its_password_not_repeated(tmp_path: Path, scheme: str) -> None:
    error = refusal(tmp_path, f"dataset:\n  data_files: {{train: '{scheme}://me:letmein@host/a.jsonl'}}")
    assert error.exit_code == EXIT_REFUSED
    assert "letmein" not in str(error)
    assert "password" in str(error)
    assert "letmein" not in str(refusal(tmp_path, "", f"dataset.data_files={scheme}://me:letmein@host/a.jsonl"))
    assert "sha256" in str(refusal(tmp_path, f"dataset:\n  data_files: {{train: '{scheme}://host/a.jsonl'}}"))
