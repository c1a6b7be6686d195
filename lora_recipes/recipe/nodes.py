"""YAML text becomes plain values that remember their file, line and column. The only room that knows YAML."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from lora_recipes.errors import EXIT_REFUSED
from lora_recipes.recipe.problem import InvalidRecipe, Origin, Problem

MAX_BYTES = 1_000_000  # a recipe is a page of text; anything larger is a mistake or an attack
MAX_DIGITS = 40  # of an integer; a float has room for 308, and no setting for 20
MAX_DEPTH = 40  # nested brackets; the parser's own recursion ends the process at some ten thousand


@dataclass(frozen=True)
class Node:
    """A value (scalar, list of nodes, dict of nodes) and where it was written.

    For an entry of a mapping `key` is where its key stands: that is what an error about the entry points at.
    """

    value: Any
    origin: Origin
    key: Origin

    def plain(self) -> Any:
        """The value without its origins."""
        if isinstance(self.value, dict):
            return {name: child.plain() for name, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def find(self, path: list[str | int]) -> "Node":
        """The deepest node on `path` that exists."""
        node = self
        for step in path:
            known = isinstance(node.value, dict) and step in node.value
            if known or (isinstance(node.value, list) and isinstance(step, int) and step < len(node.value)):
                node = node.value[step]
            else:
                break
        return node

    def children(self) -> list[tuple[str, "Node"]]:
        """Entries of a mapping, or items of a list of mappings by their number; any other value has none."""
        if isinstance(self.value, dict):
            return list(self.value.items())
        if isinstance(self.value, list) and all(isinstance(item.value, dict) for item in self.value):
            return [(str(index), item) for index, item in enumerate(self.value)]
        return []

    def entries(self, prefix: str = "") -> Iterator[tuple[str, "Node"]]:
        """(dotted key, node) of everything below, such as `dataset`, `dataset.0` and `dataset.0.path`."""
        for name, child in self.children():
            yield f"{prefix}{name}", child
            yield from child.entries(f"{prefix}{name}.")

    def leaves(self) -> Iterator[tuple[str, "Node"]]:
        """(dotted key, node) of each value that is neither a mapping nor a list of mappings, or is an empty one."""
        return ((key, node) for key, node in self.entries() if not node.children())


class _CoreSchemaLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Plain scalars much as in YAML 1.2: `2e-4` is a number; `no`, `on`, `012` and `12:30` are text.

    PyYAML follows YAML 1.1, where `2e-4` is text and `no` is false. A private subclass, since changing
    `yaml.SafeLoader` would change it for every library in the process.
    """


class _CoreSchemaDumper(yaml.SafeDumper):
    """Writes what `_CoreSchemaLoader` reads back: text that would read as a number is quoted."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_CoreSchemaDumper.add_representer(str, _text)
for _class in (_CoreSchemaLoader, _CoreSchemaDumper):
    _class.yaml_implicit_resolvers = {}
    for _name, _pattern, _first in (
        ("null", r"^(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
        ("bool", r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
        ("int", r"^[-+]?(0|[1-9][0-9]*)$", list("-+0123456789")),
        (
            "float",
            r"^([-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
            list("-+0123456789."),
        ),
    ):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)

_SCALARS: dict[str, Callable[[str], Any]] = {
    "tag:yaml.org,2002:null": lambda text: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:int": int,
    "tag:yaml.org,2002:float": lambda text: float(re.sub(r"\.(inf|nan)", r"\1", text.lower())),
    "tag:yaml.org,2002:str": str,
}


def dump_inline(value: Any) -> str:
    """A value as YAML on one line, such that `parse_text` reads the same value."""
    text = yaml.dump(value, Dumper=_CoreSchemaDumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()  # PyYAML ends a bare scalar with a document mark


def dump_block(value: Any) -> str:
    """A mapping as indented YAML."""
    text = yaml.dump(value, Dumper=_CoreSchemaDumper, sort_keys=False, allow_unicode=True, width=10**6)
    return text.rstrip("\n")


def parse_file(path: Path, problems: list[Problem]) -> Node:
    """Read a recipe file into nodes; the root is always a mapping. Duplicate keys are added to `problems`.

    Raises:
        InvalidRecipe: missing file, not UTF-8, broken YAML (tabs, indentation), no mapping; and, with the exit
            code of a refusal, tags such as `!!python/object`, aliases, or more than `MAX_BYTES`.
    """
    whole = Origin(str(path))
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise _stop(whole, "is a pipe or a device, which need not end", "copy the recipe into a file")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise _stop(whole, "is a folder", f"name a recipe file such as {path}/NAME.yaml") from None
    except FileNotFoundError:
        raise _stop(whole, "no such file", _similar_files(path)) from None
    except OSError as error:
        raise _stop(whole, f"cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise _stop(
            whole, f"{len(raw):,} bytes or more is no recipe", f"the limit is {MAX_BYTES:,} bytes", EXIT_REFUSED
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise _stop(Origin(str(path), line), "not UTF-8 text", "save the file as UTF-8") from None
    node = parse_text(text, str(path), problems)
    if node is None or node.value is None:
        raise _stop(whole, "the recipe is empty", "start from one of the files in recipes/")
    if not isinstance(node.value, dict):
        raise _stop(node.origin, "a recipe must be a mapping of sections such as `model:` and `training:`")
    return node


def parse_text(text: str, file: str, problems: list[Problem]) -> Node | None:
    """Nodes of one YAML document; None when it holds nothing.

    Raises:
        InvalidRecipe: broken YAML, a tag, an alias.
    """
    try:
        _refuse_unsafe(text, file)
        root = yaml.compose(text, Loader=_CoreSchemaLoader)
    except yaml.MarkedYAMLError as error:
        raise _broken_yaml(error, text, file) from None
    except yaml.reader.ReaderError as error:
        control = next(
            (place for place, character in enumerate(text) if yaml.reader.Reader.NON_PRINTABLE.search(character)), 0
        )
        line = text[:control].count("\n") + 1
        raise _stop(Origin(file, line), f"control characters are not allowed in YAML ({error.reason})") from None
    return _convert(root, file, (), problems) if root is not None else None


def parse_override(text: str, file: str) -> Node:
    """The value of a command line override, by the same rules as a file's (`2e-4` is a number, `[a, b]` a list)."""
    problems: list[Problem] = []
    node = parse_text(text, file, problems)
    if problems:
        raise InvalidRecipe(problems)
    origin = Origin(file)
    return _at(node, origin) if node else Node(None, origin, origin)


def _convert(node: yaml.Node, file: str, path: tuple[str, ...], problems: list[Problem]) -> Node:
    origin = _origin(node.start_mark, file)
    if isinstance(node, yaml.MappingNode):
        entries: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key = _origin(key_node.start_mark, file)
            if not isinstance(key_node, yaml.ScalarNode):
                raise _stop(key, "a key must be text, not a list or a mapping")
            name = key_node.value
            if name in entries:
                message = f"is already set in line {entries[name].key.line}"
                problems.append(Problem(key, ".".join((*path, name)), message, "keep one of the two"))
            child = _convert(value_node, file, (*path, name), problems)
            entries[name] = Node(child.value, child.origin, key)
        return Node(entries, origin, origin)
    if isinstance(node, yaml.SequenceNode):
        items = [_convert(child, file, (*path, str(n)), problems) for n, child in enumerate(node.value)]
        return Node(items, origin, origin)
    assert isinstance(node, yaml.ScalarNode)
    if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:  # Python could not make a float of it
        raise _stop(origin, f"a number of more than {MAX_DIGITS} digits is not read")
    return Node(_SCALARS[node.tag](node.value), origin, origin)


def _refuse_unsafe(text: str, file: str) -> None:
    """Refuse aliases, tags and deep nesting while they are still a stream of events.

    Nested aliases can blow a page of text up to gigabytes, a tag can name a Python object, and nesting is parsed by
    recursion. None of them is needed: `extends` shares values, and quotes make text of a number.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_CoreSchemaLoader):
        origin = _origin(event.start_mark, file)
        if isinstance(event, yaml.AliasEvent):
            hint = "write the value out, or put it in a parent recipe and use `extends`"
            raise _stop(origin, f"the alias `*{event.anchor}` is refused", hint, EXIT_REFUSED)
        if (tag := getattr(event, "tag", None)) is not None:
            raise _stop(origin, f"the tag `{tag}` is refused", "a recipe holds plain values only", EXIT_REFUSED)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _stop(origin, f"nested more than {MAX_DEPTH} deep", "a recipe needs three or four", EXIT_REFUSED)


def _broken_yaml(error: yaml.MarkedYAMLError, text: str, file: str) -> InvalidRecipe:
    mark = error.problem_mark or error.context_mark
    assert mark is not None
    lines = text.splitlines()
    source = lines[mark.line] if mark.line < len(lines) else ""
    problem = error.problem or "broken YAML"
    if "\t" in source[: mark.column + 1]:
        problem = "a tab stands here; YAML is indented with spaces"
    shown = source[:120].replace("\t", "→")
    caret = " " * min(mark.column, 120) + "^"
    return _stop(_origin(mark, file), f"{problem}\n    {shown}\n    {caret}")


def _at(node: Node, origin: Origin) -> Node:
    value = node.value
    if isinstance(value, dict):
        value = {name: _at(child, origin) for name, child in value.items()}
    elif isinstance(value, list):
        value = [_at(child, origin) for child in value]
    return Node(value, origin, origin)


def _origin(mark: Any, file: str) -> Origin:
    return Origin(file, mark.line + 1, mark.column + 1)


def _stop(origin: Origin, message: str, hint: str = "", exit_code: int = 2) -> InvalidRecipe:
    return InvalidRecipe([Problem(origin, "", message, hint, exit_code)])


def _similar_files(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    near = get_close_matches(path.name, [entry.name for entry in folder.glob("*.yaml")], n=3)
    if near:
        return f"did you mean {' or '.join(str(folder / name) for name in near)}?"
    return f"`ls {folder}` shows what is there"
