"""Which files a source's rows lie in; light, since it is asked before anything heavy is imported."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_recipes.errors import DataError
from lora_recipes.recipe import Recipe
from lora_recipes.recipe.vocabulary import LOCAL_BUILDERS

HUB_KEYS = ("name", "revision", "cache_dir")
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}  # as fsspec calls them
KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}


@dataclass(frozen=True)
class DataFile:
    """A local file and the reader that suits it."""

    path: Path
    kind: str  # one of LOCAL_BUILDERS


@dataclass(frozen=True)
class Source:
    """One data source of a recipe: a mapping under `dataset`, or one entry of the list there.

    Attributes:
        key: dotted key in the recipe, "dataset" or "dataset.0".
        keys: its keys.
    """

    key: str
    keys: dict[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        """What people know it by: its files or its hub id."""
        named = self.keys.get("data_files")
        if isinstance(named, dict):
            named = named.get(self.split.split("[")[0], named)
        text = named if isinstance(named, str) else ", ".join(map(str, named or [])) if named else self.keys["path"]
        return text if len(text) <= 60 else f"{text[:57]}..."

    @property
    def split(self) -> str:
        """The split that is trained on."""
        return self.keys.get("split") or "train"

    @property
    def eval_split(self) -> str | float | None:
        """A split's name, a share of the rows, or None."""
        return self.keys.get("eval_split")

    def get(self, key: str, default: Any = None) -> Any:
        """The source's own key, or the default when it is unset."""
        value = self.keys.get(key)
        return default if value is None else value

    def where(self, key: str) -> str:
        """`file:line` of one of the source's keys."""
        return self.recipe.where(f"{self.key}.{key}")

    def is_hub(self) -> bool:
        """Whether the rows are read from the hub or its cache."""
        return self.keys["path"] not in LOCAL_BUILDERS and not Path(self.keys["path"]).is_dir()


def sources(recipe: Recipe) -> list[Source]:
    """The recipe's data sources, in its order."""
    return [Source(key, keys, recipe) for key, keys in recipe.datasets()]


def local_files(source: Source, split: str) -> list[DataFile]:
    """The local files of a split, patterns resolved and sorted; [] for a hub data set.

    Args:
        split: a split's name; a slice in brackets is ignored.

    Raises:
        DataError: no such file, no file that a pattern matches, no such split.
    """
    base = split.split("[")[0]
    if source.is_hub():
        return []
    folder = Path(source.keys.get("data_dir") or "")
    if source.keys["path"] not in LOCAL_BUILDERS:
        folder = Path(source.keys["path"]) / folder
        if unread := [key for key in HUB_KEYS if source.keys.get(key) is not None]:
            raise DataError(f"{source.where(unread[0])}: `{unread[0]}` has no effect: {folder} is a folder here")
        if source.keys.get("data_files") is None:
            return list(_folder_files(source, folder, base))
    named = source.keys.get("data_files")
    if isinstance(named, dict):
        if base not in named:
            raise DataError(f"{source.where('data_files')}: there is no split `{base}`; splits: {', '.join(named)}")
        named = named[base]
    elif base != "train":
        raise DataError(
            f"{source.where('data_files')}: there is no split `{base}`: files without names are all `train`; write "
            f"data_files: {{train: ..., {base}: ...}}"
        )
    patterns = [named] if isinstance(named, str) else list(named or [])
    paths = [path for pattern in patterns for path in _matching(source, folder, pattern)]
    return [DataFile(path, _kind(source, path)) for path in dict.fromkeys(paths)]


def kind_of(path: Path) -> str | None:
    """The reader that a file's ending names, whether it is compressed or not; None for an unknown one."""
    return KINDS.get(_suffix(path))


def _kind(source: Source, path: Path) -> str:
    """The reader that the recipe names, or in a folder the one that the file's ending names."""
    if source.keys["path"] in LOCAL_BUILDERS:
        return source.keys["path"]
    if (kind := kind_of(path)) is None:
        raise DataError(f"{source.where('data_files')}: {path} is of no known kind; known endings: {', '.join(KINDS)}")
    return kind


def _matching(source: Source, folder: Path, pattern: str) -> list[Path]:
    path = folder / pattern
    if path.is_file():
        return [path]
    where = source.where("data_files")
    if path.is_dir():
        wanted = source.keys["path"] if source.keys["path"] in LOCAL_BUILDERS else None
        suffixes = [suffix for suffix, kind in KINDS.items() if wanted in (None, kind)]
        found = [file for file in sorted(path.rglob("*")) if _suffix(file) in suffixes and file.is_file()]
        if not found:
            raise DataError(f"{where}: no {wanted or 'data'} file ({', '.join(suffixes)}) in the folder {path}")
        return found
    if any(mark in pattern for mark in "*?["):
        base = Path("/") if path.is_absolute() else Path()
        found = sorted(file for file in base.glob(str(path).lstrip("/")) if file.is_file())
        if not found:
            raise DataError(f"{where}: no file matches {path} (seen from {Path.cwd()})")
        return found
    raise DataError(f"{where}: no such data file: {path} (seen from {Path.cwd()})")


def _suffix(path: Path) -> str:
    """The suffix under that of a compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _folder_files(source: Source, folder: Path, split: str) -> Iterator[DataFile]:
    """The files of a data set folder. `datasets` knows which file names and folders mean which split."""
    from datasets.config import DATASET_STATE_JSON_FILENAME
    from datasets.data_files import FILES_TO_IGNORE, DataFilesDict, EmptyDatasetError, get_data_patterns

    where = source.where("path")
    base = folder.resolve()
    try:
        found = DataFilesDict.from_patterns(get_data_patterns(str(base)), base_path=str(base))
    except (EmptyDatasetError, FileNotFoundError) as error:
        raise DataError(f"{where}: no data files in the folder {folder}: {error}") from None
    about = (*FILES_TO_IGNORE, DATASET_STATE_JSON_FILENAME)  # the folder's own records
    splits: dict[str, list[Path]] = {}
    for name, files in found.items():
        paths = [Path(file) for file in files]
        if kept := [path for path in paths if _suffix(path) in KINDS and path.name not in about]:
            splits[str(name)] = kept
    if split not in splits:
        known = ", ".join(splits) or f"none (known endings: {', '.join(KINDS)})"
        raise DataError(f"{where}: the folder {folder} has no split `{split}`; splits found: {known}")
    for file in sorted(splits[split]):
        yield DataFile(folder / file.relative_to(base), KINDS[_suffix(file)])
