"""What stands in the files of a run folder, as JSON schemas: anybody may have written there since."""

from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry

TEXT, WHOLE, NUMBER, TRUTH = {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}
TEXTS, OBJECT = {"type": "array", "items": TEXT}, {"type": "object"}
BY_NAME = {"type": "object", "additionalProperties": TEXT}
MOST_PROCESSES = 65_536  # that a record can be meant to say


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(*required: str, **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


BASE = _object("name", "weights_sha256", name=TEXT, revision=_or_null(TEXT), weights_sha256=TEXT)
COUNT = {"type": "integer", "minimum": 1, "maximum": MOST_PROCESSES}
FAILED = _object("check", "expected", "found", check=TEXT)
ANSWER = _object("text", "stopped", text=TEXT, stopped=TEXT, fault=TEXT, failed={"type": "array", "items": FAILED})
PUBLISHED = _object(
    "folder",
    "step",
    "files",
    "tensors",
    "metrics_sha256",
    folder={"enum": ["adapter", "merged"]},
    step=WHOLE,
    files=BY_NAME,
    tensors=BY_NAME,
    metrics_sha256=TEXT,
)
# Of a file by its name, or of each line of it. A key that is not named here may hold anything; none of ours reads it.
SCHEMAS: dict[str, dict[str, Any]] = {
    "manifest.json": _object(
        run=TEXT,
        recipe=_object("sha256", sha256=TEXT),
        base=_object(**BASE["properties"]),
        data=BY_NAME,
        tokens={"type": "object", "additionalProperties": _or_null(TEXT)},
        audit=OBJECT,
        chat_template_sha256=_or_null(TEXT),
        seed=WHOLE,
        world_size=COUNT,
        accepted_changes=TEXTS,
        changed_on_the_way=TEXTS,
        chosen=BY_NAME,
        versions={"type": "object", "additionalProperties": _or_null(TEXT)},
        machine=OBJECT,
        launch=_object(
            "machines", "threads", "environment", machines=COUNT, threads=_or_null(COUNT), environment=OBJECT
        ),
        published=PUBLISHED,
        repeats=_object("run", "accepted", run=TEXT, accepted=OBJECT),
        files=OBJECT,  # of a checkpoint
    ),
    "status.json": _object(
        state=TEXT,
        exit_code=_or_null(WHOLE),
        reason=TEXT,
        step=_or_null(WHOLE),
        max_steps=_or_null(WHOLE),
        last_good_checkpoint=_or_null(TEXT),
        diagnosis=_or_null(_object("text", "causes", text=TEXT, causes=TEXTS | {"minItems": 1})),
    ),
    "evaluation.json": _object(
        eval_loss={"type": "object", "additionalProperties": NUMBER},
        improved=_or_null(TRUTH),
        forgetting=_object(passed=TRUTH),
        tasks=OBJECT,
    ),
    "parity.json": _object(
        passed=TRUTH,
        proof=TEXT,
        base=TEXT,
        merged_sha256=_or_null(TEXT),
        answers_in_common=NUMBER,
        tolerance=_object(greedy_agreement=NUMBER),
    ),
    "provenance.json": _object(
        base=BASE,
    ),
    "generations.jsonl": _object(
        "prompt",
        "expected",
        prompt=TEXT,
        expected=_or_null(TEXT),
        expectation=_object("prompt", prompt=TEXT),
        base=ANSWER,
        adapter=ANSWER,
        merged=ANSWER,
        served=ANSWER,
    ),
    "metrics.jsonl": _object("step", step=WHOLE),
    "trainer_state.json": _object(  # of a checkpoint
        "global_step",
        "max_steps",
        "log_history",
        global_step=WHOLE,
        max_steps=WHOLE,
        epoch=_or_null(NUMBER),
        log_history={"type": "array", "items": OBJECT},
        best_metric=_or_null(NUMBER),
        best_model_checkpoint=_or_null(TEXT),
        stateful_callbacks=OBJECT,
    ),
}


@cache
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(SCHEMAS.get(name, OBJECT), registry=Registry())


def fault(name: str, value: Any) -> str | None:
    """Why a value is not what stands in the file of this name, or in a line of it; None where it may be."""
    error = next(iter(_validator(name).iter_errors(value)), None)
    if error is None:
        return None
    place = ".".join(str(step) for step in error.absolute_path)
    if error.validator == "required":
        return f"{f'`{place}`' if place else 'it'} lacks {error.message.split(' is a required')[0]}"
    return f"`{place}` is {str(error.instance)[:40]!r}" if place else f"{str(value)[:40]!r} is no object"
