"""The layers of the package: a module imports only from rooms in earlier layers, and from its own room."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lora_recipes"
# A room is a module or a folder of the package; `__init__` is the package itself.
LAYERS = [
    {"__init__", "errors", "records", "redact"},
    {"recipe", "run_dir", "console", "process", "limits"},
    {"data", "model", "score", "judge", "introspect", "launch", "metrics"},
    {"plan", "trained", "verdict"},
    {"audit", "train", "generate", "chat", "evaluate", "merge", "export", "push", "status", "reproduce"},
    {"cli"},
    {"__main__"},
]
LAYER_OF = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate"}
LIGHT_LAYERS = 2  # the first two answer at once, so nothing in them imports a heavy library, not even in a function
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(parts: tuple[str, ...] | list[str], package: Path) -> str:
    """The room that a path inside the package, in parts and without suffix, belongs to."""
    first = parts[0] if parts else "__init__"
    is_room = (package / first).is_dir() or (package / f"{first}.py").is_file()
    return first if is_room else "__init__"


def imports(module: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything that a module imports, at its top or in a function."""
    folder = [package.name, *module.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else []
            origin = [*start, node.module] if node.module else start
            yield from ((node.lineno, ".".join([*origin, alias.name])) for alias in node.names)


def violations(package: Path) -> list[str]:
    """Every import that breaks the law, as `file:line room (layer) imports what`."""
    found = []
    for module in sorted(package.rglob("*.py")):
        room = room_of(module.relative_to(package).with_suffix("").parts, package)
        layer = LAYER_OF[room]
        for line, name in imports(module, package):
            first, *rest = name.split(".")
            where = f"{module.relative_to(package.parent)}:{line} {room} ({layer})"
            if first == package.name:
                other = room_of(rest, package)
                if other != room and LAYER_OF[other] >= layer:
                    found.append(f"{where} imports {other} ({LAYER_OF[other]})")
            elif first in HEAVY and layer < LIGHT_LAYERS:
                found.append(f"{where} imports {first}")
    return list(dict.fromkeys(found))


def fake_package(folder: Path, **sources: str) -> Path:
    """A package with the named modules; `recipe__load` is recipe/load.py."""
    package = folder / "lora_recipes"
    for name, source in ({"__init__": ""} | sources).items():
        module = package / f"{name if name.startswith('__') else name.replace('__', '/')}.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text(source)
    return package


def test_every_module_imports_only_from_earlier_layers() -> None:
    assert violations(PACKAGE) == []


def test_every_room_has_one_layer() -> None:
    assert {room_of(module.relative_to(PACKAGE).with_suffix("").parts, PACKAGE) for module in MODULES} == set(LAYER_OF)
    assert sum(len(rooms) for rooms in LAYERS) == len(LAYER_OF)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for(module: Path) -> None:
    assert ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("errors", "from lora_recipes.recipe import load_recipe", "errors (0) imports recipe (1)"),
        ("recipe__load", "import lora_recipes.train.session", "recipe (1) imports train (4)"),
        ("recipe__load", "from lora_recipes import console", "recipe (1) imports console (1)"),
        ("recipe__load", "from .. import console", "recipe (1) imports console (1)"),
        ("recipe__load", "def late():\n    from lora_recipes.model import build", "recipe (1) imports model (2)"),
        ("run_dir", "if True:\n    import torch", "run_dir (1) imports torch"),
        ("console", "def late():\n    from torch.nn import Linear", "console (1) imports torch"),
        ("errors", "import transformers.utils as utils", "errors (0) imports transformers"),
        ("generate", "from lora_recipes.merge import merge", "generate (4) imports merge (4)"),
        ("merge", "from .cli import main", "merge (4) imports cli (5)"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, room: str, source: str, found: str) -> None:
    others = dict.fromkeys(["console", "merge", "cli", "recipe____init__", "train__session", "model__build"], "")
    line = source.count("\n") + 1
    package = fake_package(tmp_path, **(others | {room: source}))
    assert violations(package) == [f"lora_recipes/{room.replace('__', '/')}.py:{line} {found}"]


def test_a_right_import_is_not_found(tmp_path: Path) -> None:
    package = fake_package(
        tmp_path,
        errors="import json",
        recipe__nodes="from lora_recipes.errors import RecipeError",
        recipe__load="from lora_recipes.recipe.nodes import Node\nfrom . import nodes\nfrom .nodes import Node",
        model__build="import torch\nfrom lora_recipes.recipe import Recipe",
        train____init__="from lora_recipes import __version__",
        cli="from lora_recipes import train",
    )
    assert violations(package) == []
