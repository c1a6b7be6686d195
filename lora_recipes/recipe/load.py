"""The one loader that every command uses: file, `extends`, overrides, check, and out comes an immutable `Recipe`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lora_recipes.errors import LONGEST_SHOWN
from lora_recipes.recipe.check import in_place_order, problems_in
from lora_recipes.recipe.nodes import MAX_DEPTH, Node, parse_file, parse_override
from lora_recipes.recipe.problem import InvalidRecipe, Origin, Problem
from lora_recipes.recipe.vocabulary import OWNERS

# What Windows takes for devices: a run folder of that name could not be copied there.
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}
MAX_PARENTS = 10  # recipes that extend one another; those here have two
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `values` maps a section to its keys; `origins` maps `section.key` to where it was set.

    Attributes:
        overrides: the `section.key=value` words that are in `values` and not in the file.
        allow_pickle: said on the command line, never in a file: a base whose weights are no safetensors may be loaded.
    """

    path: Path
    values: Mapping[str, Any]
    origins: Mapping[str, Origin]
    overrides: tuple[str, ...] = ()
    allow_pickle: bool = False

    def __reduce__(self) -> Any:  # mapping proxies cannot be pickled, and data loader workers need a recipe
        return _unpickled, (self.path, self.plain(), dict(self.origins), self.overrides, self.allow_pickle)

    @property
    def name(self) -> str:
        """The file's name without `.yaml`: the name of the run folder, so that a copy never writes over its source."""
        return self.path.stem

    def section(self, name: str) -> Any:
        """A fresh, mutable copy of a section, a mapping (`dataset` may be a list of them); {} when there is none."""
        return _thaw(self.values.get(name, {}))

    def datasets(self) -> list[tuple[str, dict[str, Any]]]:
        """(dotted key, keys) of each source of data: `dataset`, or `dataset.0`, `dataset.1`, ... of a mixture."""
        dataset = self.section("dataset")
        if isinstance(dataset, list):
            return [(f"dataset.{index}", source) for index, source in enumerate(dataset)]
        return [("dataset", dataset)] if dataset else []

    def get(self, key: str, default: Any = None) -> Any:
        """The value at a dotted key such as `training.max_steps`, or `default` when the recipe does not set it."""
        value: Any = self.values
        for step in key.split("."):
            if isinstance(value, Mapping) and step in value:
                value = value[step]
            elif isinstance(value, tuple) and step in map(str, range(len(value))):
                value = value[int(step)]
            else:
                return default
        return _thaw(value)

    def where(self, key: str) -> str:
        """`file:line` of the nearest thing that set `key`: the key itself, its section, or the file."""
        while key:
            if key in self.origins:
                return str(self.origins[key])
            key = key.rpartition(".")[0]
        return str(self.path)

    def changed(self, values: Mapping[str, Any]) -> "Recipe":
        """The recipe with other values at dotted keys, unchecked; None drops a section, or sets a key to null."""
        plain = self.plain()
        for key, value in values.items():
            *path, last = key.split(".")
            section = plain
            for step in path:
                section = section.setdefault(step, {})
            section[last] = value
            if not path and value is None:
                del section[last]
        return replace(self, values=_freeze(plain))

    def plain(self) -> dict[str, Any]:
        """The resolved recipe as plain dicts, lists and scalars."""
        return _thaw(self.values)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, allow_pickle: bool = False) -> Recipe:
    """Read, resolve and check a recipe.

    Args:
        path: a YAML file.
        overrides: `section.key=value` words; the value is read by the same rules as the file's. `dataset.0.key=value`
            reaches into the first source of a mixture.
        allow_pickle: `Recipe.allow_pickle`.

    Raises:
        InvalidRecipe: every problem of the recipe in one message, each as `file:line:column: key, what, what to do`.
    """
    path = Path(path)
    problems = name_problems(path)
    if problems:
        raise InvalidRecipe(problems)
    root = _resolve_extends(path, [], problems)
    for word in overrides:
        root = _overlay(root, _override(word, root))
    root = _drop_null_sections(root)
    problems += problems_in(root, str(path))
    if problems:
        raise InvalidRecipe(in_place_order(problems))
    return replace(_recipe(path, root, overrides), allow_pickle=allow_pickle)


def name_problems(path: Path) -> list[Problem]:
    """What is wrong with a recipe's file name."""
    if path.suffix not in (".yaml", ".yml") and not path.is_dir():
        return [Problem(Origin(str(path)), "", "a recipe is a .yaml file", "`ls recipes` shows those that are shipped")]
    if not NAME_PATTERN.fullmatch(path.stem) or path.stem.split(".")[0].lower() in RESERVED:
        hint = "use letters, digits, `.`, `_` and `-`, at most 80, and no name of a device (con, nul)"
        return [Problem(Origin(str(path)), "", "the file's name becomes the run folder's", hint)]
    return []


def _resolve_extends(path: Path, seen: list[Path], problems: list[Problem]) -> Node:
    """The file's tree laid over its parent's, the parent resolved first."""
    node = parse_file(path, problems)
    here = path.resolve()  # once it is read: a link to itself leads nowhere
    parent = node.value.get("extends")
    if parent is None:
        return node
    own = Node({name: child for name, child in node.value.items() if name != "extends"}, node.origin, node.key)
    if not isinstance(parent.value, str):
        raise _stop(parent, "takes one file name", "such as `extends: base/qlora.yaml`")
    parent_path = path.parent / parent.value
    if not _is_there(parent_path):
        shown = str(parent_path)[:LONGEST_SHOWN]
        raise _stop(parent, f"names a file that does not exist: {shown}", "the path is relative to this file")
    chain = [*seen, here]
    if parent_path.resolve() in chain:
        loop = " → ".join(step.name for step in [*chain[chain.index(parent_path.resolve()) :], parent_path])
        raise _stop(parent, f"goes in a circle: {loop}", "a base recipe extends nothing")
    if len(chain) > MAX_PARENTS:
        raise _stop(parent, f"comes after {MAX_PARENTS} others in a chain", "a recipe needs two or three")
    return _overlay(_resolve_extends(parent_path, chain, problems), own)


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for a file
        return False


def _stop(node: Node, message: str, hint: str) -> InvalidRecipe:
    return InvalidRecipe([Problem(node.origin, "extends", message, hint)])


def _overlay(parent: Node, child: Node) -> Node:
    """Mappings merge key by key; lists and scalars replace; `null` stays and drops a section later."""
    if not (isinstance(parent.value, dict) and isinstance(child.value, dict)):
        return child
    merged = dict(parent.value)
    for name, node in child.value.items():
        merged[name] = _overlay(merged[name], node) if name in merged else node
    return Node(merged, child.origin, child.key)


def overrides_tree(path: Path, words: Sequence[str]) -> Node:
    """What a child of the recipe at `path` must hold for `section.key=value` words to be true of it; later words win.

    Raises:
        InvalidRecipe: a word that is no override, or a value that is no YAML.
    """
    root = _resolve_extends(path, [], [])
    tree = Node({}, Origin("command line"), Origin("command line"))
    for word in words:
        found = _override(word, root)
        root, tree = _overlay(root, found), _overlay(tree, found)
    return tree


def _override(word: str, root: Node) -> Node:
    """The tree of one word, to be laid over `root`."""
    key, equals, text = word.partition("=")
    steps = key.split(".")
    if word.encode(errors="replace").decode() != word:
        message, hint = f"is not UTF-8 text: {word!a}", "type it in a terminal that is set to UTF-8"
        raise InvalidRecipe([Problem(Origin("command line"), "", message, hint)])
    if len(steps) > MAX_DEPTH:
        message, hint = f"names a key more than {MAX_DEPTH} deep: {key[:LONGEST_SHOWN]}", "a recipe needs three or four"
        raise InvalidRecipe([Problem(Origin("command line"), "", message, hint)])
    if not equals or not all(steps):
        message, hint = "is not an override", "write section.key=value, such as training.max_steps=10"
        raise InvalidRecipe([Problem(Origin("command line"), word, message, hint)])
    origin = f"command line ({word})"
    if steps[0] == "extends":
        message, hint = "cannot be overridden", "copy the recipe (`lora-recipes new`) and edit it there"
        raise InvalidRecipe([Problem(Origin(origin), "extends", message, hint)])
    node = parse_override(text, origin)
    if steps[0] == "dataset" and len(steps) > 1:
        sources = root.find(["dataset"]).value
        if isinstance(sources, list):
            return Node({"dataset": _with_source(sources, steps[1:], node)}, node.origin, node.key)
        if steps[1].isdecimal():
            message, hint = "names a source by number, but `dataset` is no list", ".".join(["dataset", *steps[2:]])
            raise InvalidRecipe([Problem(Origin("command line"), key, message, f"write {hint}=...")])
    return _nested(steps, node)


def _with_source(sources: list[Node], steps: list[str], node: Node) -> Node:
    """The list of sources with `steps` of one of them set: a list replaces, so it is written again as a whole.

    Raises:
        InvalidRecipe: the first step is not the number of a source. The value is not repeated: it may be a secret.
    """
    key, last = ".".join(["dataset", *steps]), len(sources) - 1
    if not steps[0].isdecimal():
        message = f"does not say which of the {len(sources)} sources in the list `dataset` it means"
        hint = f"write dataset.0.{'.'.join(steps)}=..." + (f", or up to dataset.{last}" if last else "")
        raise InvalidRecipe([Problem(Origin("command line"), key, message, hint)])
    if steps[0] not in map(str, range(len(sources))):
        message = f"names a source that is not there: the list `dataset` has {len(sources)}"
        hint = f"they count from 0: dataset.0{f' to dataset.{last}' if last else ''}"
        raise InvalidRecipe([Problem(Origin("command line"), key, message, hint)])
    index = int(steps[0])
    source = sources[index]
    changed = _overlay(source, _nested(steps[1:], node))
    if isinstance(changed.value, dict):  # what the word does not set still stands in the file
        changed = Node(changed.value, source.origin, source.key)
    return Node([*sources[:index], changed, *sources[index + 1 :]], node.origin, node.key)


def _nested(steps: list[str], node: Node) -> Node:
    for step in reversed(steps):
        node = Node({step: node}, node.origin, node.key)
    return node


def _drop_null_sections(root: Node) -> Node:
    """`quantization: null` drops the section; an unknown name stays, so that the check refuses it."""
    kept = {name: node for name, node in root.value.items() if node.value is not None or name not in OWNERS}
    return Node(kept, root.origin, root.key)


def _recipe(path: Path, root: Node, overrides: Sequence[str]) -> Recipe:
    origins = {key: node.key for key, node in root.entries()}
    return Recipe(path, _freeze(root.plain()), MappingProxyType(origins), tuple(overrides))


def _unpickled(
    path: Path, values: dict[str, Any], origins: dict[str, Origin], overrides: tuple[str, ...], allow_pickle: bool
) -> Recipe:
    return Recipe(path, _freeze(values), MappingProxyType(origins), overrides, allow_pickle)


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return MappingProxyType({name: _freeze(child) for name, child in value.items()})
    return tuple(_freeze(child) for child in value) if isinstance(value, list) else value


def _thaw(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _thaw(child) for name, child in value.items()}
    return [_thaw(child) for child in value] if isinstance(value, tuple) else value
