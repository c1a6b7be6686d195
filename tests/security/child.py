"""Runs hostile files in a process that is watched: what they execute, import, unpickle or connect to is written down.

python -m tests.security.child CASES.json RESULT.json
"""

import json
import sys
from pathlib import Path
from typing import Any

CODE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn")
NET = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
seen: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook: it cannot be taken out again, not even by the code it watches."""
    told = " ".join(str(argument)[:120] for argument in arguments)
    if (
        event in CODE
        or event in NET
        or (event == "import" and "evil" in told)
        or (event == "pickle.find_class" and arguments[0] in ("os", "posix", "subprocess", "builtins", "shutil"))
        or (event in ("exec", "compile") and "evil" in told)
    ):
        seen.append(f"{event} {told}")


def outcome(verb: str, target: str) -> tuple[int, str]:
    """(exit code, message) of one case."""
    from lora_recipes.errors import EXIT_BUG, LoraRecipesError

    try:
        if verb == "adapter":
            from lora_recipes.model.adapted import check_adapter

            check_adapter(Path(target))
        elif verb == "train":
            from lora_recipes.model.build import load_base, load_tokenizer, model_config
            from lora_recipes.recipe import load_recipe
            from lora_recipes.train.preflight import preflight

            recipe = load_recipe(target)
            ready = preflight(recipe)
            assert ready is not None
            if ready.lock:
                ready.lock.release()
            load_tokenizer(recipe, ready.source)
            model_config(recipe, ready.source)
            load_base(recipe, ready.source, ready.choices)
        else:
            from lora_recipes.audit import audit
            from lora_recipes.recipe import load_recipe

            recipe = load_recipe(target)
            if verb == "audit" and audit(recipe)["problems"]:
                return 2, "problems"
    except LoraRecipesError as error:
        return error.exit_code, str(error)
    except Exception as error:
        return EXIT_BUG, repr(error)
    return 0, ""


def main(cases: Path, result: Path) -> None:
    """Run every case of a list of {"name", "verb", "target"}."""
    from lora_recipes import process

    process.prepare()
    import lora_recipes.audit
    import lora_recipes.train.preflight  # noqa: F401 - what libraries do when they are imported is not a case's doing

    found = {}
    sys.addaudithook(watch)
    for case in json.loads(cases.read_text(encoding="utf-8")):
        seen.clear()
        code, message = outcome(case["verb"], case["target"])
        found[case["name"]] = {"code": code, "message": message, "events": list(seen)}
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
