"""The run folder `outputs/<recipe>/`: its layout, and writes that are either whole or not there at all."""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO
from weakref import WeakSet

from lora_recipes.errors import BrokenFile, MachineError, RefusedError, RunError
from lora_recipes.records import fault
from lora_recipes.redact import redacted

SUMS = "SHA256SUMS"  # in a published folder; the format of coreutils: `sha256sum -c SHA256SUMS` checks it
OUTPUTS = Path("outputs")  # relative to the working folder, like every path a recipe names
BLOB = 64  # letters of a sha256; the hub's cache calls the blobs of large files by theirs
FEWEST_CHECKPOINTS = 2  # that stay, whatever the limit: the newest may turn out broken
READABLE = 0o666  # mode of files, of which the umask takes its share


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. Nothing is created until something is written."""

    root: Path

    @classmethod
    def of(cls, name: str) -> "RunDir":
        return cls(OUTPUTS / name)

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def combined(self) -> Path:
        """The adapter that `merge --adapters` made of several."""
        return self.root / "combined"

    @property
    def exports(self) -> Path:
        return self.root / "exports"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def generations(self) -> Path:
        return self.root / "generations.jsonl"

    @property
    def parity(self) -> Path:
        return self.root / "parity.json"

    @property
    def audit(self) -> Path:
        return self.root / "audit.json"

    @property
    def rejected(self) -> Path:
        return self.root / "rejected.jsonl"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    def in_use(self) -> bool:
        """Whether a process holds the lock; nothing is created to find out."""
        if not self.lock.is_file():
            return False
        with self.lock.open("rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:  # a file system without locks: nobody can tell
                return True
            return False

    def evidence(self) -> dict[str, str | None]:
        """What the models in this folder are, by sha256, so that evidence of older ones can be told; None where there is none."""
        adapter, merged = self.adapter / "adapter_model.safetensors", self.merged / SUMS
        return {
            "adapter_sha256": file_sha256(adapter) if adapter.is_file() else None,
            "merged_sha256": file_sha256(merged) if merged.is_file() else None,  # of the list of its files' sums
        }

    def require_writable(self) -> None:
        """Create the folder and write a byte there, before anything is spent on a run.

        Raises:
            MachineError: the folder cannot be created or written to.
            RunError: what a step publishes there would lie behind a link, or a file is where a folder belongs, or a folder
                where a file does.
        """
        replaced = (self.adapter, self.merged, self.combined, self.exports)
        evidence = (self.evaluation, self.generations, self.parity, self.audit, self.rejected)
        for folder in replaced:
            require_no_link(folder)
        for folder in (*replaced, self.checkpoints):
            require_folder(folder)
        for file in (self.recipe, self.manifest, self.status, self.metrics, *evidence):
            require_no_folder(file)
        probe = self.root / f".writable-{os.getpid()}"  # each rank probes
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"1")
            probe.unlink()
        except OSError as error:
            message = f"{self.root.absolute()}: cannot write the run folder: {error.strerror}; nothing was started. "
            raise MachineError(message + "Make it writable, or run from a folder where you may write") from None

    def require_adapter(self, recipe_path: Path) -> None:
        """Raises RunError, with the training command, when there is no trained adapter."""
        if not (self.adapter / "adapter_config.json").is_file():
            raise RunError(
                f"{self.adapter}: no trained adapter yet; train it first: accelerate launch run.py {recipe_path}"
            )

    def require_trained(self, recipe_path: Path, *, adapter: bool) -> None:
        """Raises RunError, with the training command, when there is nothing trained.

        Args:
            adapter: whether the recipe trains an adapter; else training leaves the whole model in `merged/`.
        """
        if adapter:
            self.require_adapter(recipe_path)
        elif not (self.merged / "config.json").is_file():
            raise RunError(
                f"{self.merged}: no trained model yet; train it first: accelerate launch run.py {recipe_path}"
            )

    def set_aside(self) -> Path:
        """Move the whole folder to the first free `NAME.old-N` beside it."""
        return moved_aside(self.root)


def moved_aside(path: Path) -> Path:
    """Give a file or folder the first free `NAME.old-N` beside it, and return that."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def cache_folder(name: str) -> Path:
    """Where things that can be made again are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lora-recipes" / name


def file_sha256(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remembered_sha256(file: Path) -> str:
    """A file's sha256, computed once for a size and time of change: models have gigabytes."""
    real = file.resolve()
    if file.is_symlink() and len(real.name) == BLOB:
        return real.name
    memory = cache_folder("hashes") / f"{text_sha256(str(real))[:32]}.json"
    found = real.stat()
    stamp = [str(real), found.st_size, found.st_mtime_ns, found.st_ino]
    try:
        known = read_json(memory)
    except BrokenFile:  # it can be made again
        known = {}
    if known.get("stamp") != stamp:
        known = {"stamp": stamp, "sha256": file_sha256(real)}
        write_json(memory, known)
    return known["sha256"]


def text_sha256(text: str) -> str:
    """sha256 of a text's UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


class Locked:
    """An exclusive lock on a file, held until `release` or the end of the process."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, READABLE)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a folder, a socket
                raise
            raise _no_lock_file(path) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _no_lock_file(path)
        self.path, self.stream = path, os.fdopen(descriptor, "a+", encoding="utf-8")
        _locks.add(self)

    def acquire(self, *, wait: bool, waiting: Callable[[str], None] | None = None) -> None:
        """Take the lock.

        Args:
            wait: until another process that holds it has let it go, however long that takes.
            waiting: told whom for, where there is somebody to wait for.

        Raises:
            RunError: another process holds it and `wait` is False.
        """
        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.stream.seek(0)
            holder = self.stream.read().strip() or "another process"
            if not wait:
                raise RunError(f"{self.path.parent} is in use by another process ({holder})") from None
            if waiting:
                waiting(f"{self.path} is held by {holder}; waiting until it ends")
            fcntl.flock(self.stream, fcntl.LOCK_EX)
        self.stream.truncate(0)
        self.stream.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self.stream.flush()

    def release(self) -> None:
        """Let others in."""
        self.stream.close()


def _no_lock_file(path: Path) -> RefusedError:
    return RefusedError(f"{path}: is no plain file (a link, a folder, a pipe), where a lock file is wanted; remove it")


_locks: WeakSet[Locked] = WeakSet()


def _release_inherited() -> None:
    """A lock belongs to the open file, not to a process: a forked one that lives on would hold it on."""
    for lock in list(_locks):
        lock.stream.close()  # does not unlock it where it was taken


os.register_at_fork(after_in_child=_release_inherited)


def write_text(path: Path, text: str, *, mode: int = READABLE) -> None:
    """Replace a file by a whole new one: a reader, or a crash, sees the old text or the new, never half.

    What looks like a secret is not written, whoever's text it is: run folders are shared, published and kept.

    Args:
        mode: who may read and write it, less what the umask forbids. Nobody else may at any moment.
    """
    with _replacing(path, mode) as stream:
        stream.write(redacted(text))


def write_json(path: Path, value: Any, *, mode: int = READABLE) -> None:
    """`write_text` of an indented JSON object."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", mode=mode)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]], *, mode: int = READABLE) -> None:
    """One JSON object a line, written as the rows come; whole or not at all, like `write_text`."""
    with _replacing(path, mode) as stream:
        stream.writelines(redacted(json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


@contextmanager
def _replacing(path: Path, mode: int) -> Iterator[TextIO]:
    """A new file that takes the place of `path` when the block ends well, and is removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: another process may be writing the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    opener = partial(os.open, mode=mode)
    try:
        # Half of a surrogate pair has no UTF-8 form; its escape is what JSON would write.
        with open(temporary, "x", encoding="utf-8", errors="backslashreplace", opener=opener) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        require_no_folder(path)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} when there is no such file.

    Raises:
        BrokenFile: it holds something else (`lora_recipes.records`).
    """
    if not path.is_file():
        return {}
    try:
        return _checked(path, path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _broken(path, error) from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; [] when there is no such file. Raises BrokenFile where a line is none."""
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8") as stream:  # `splitlines` would also cut where a text holds U+2028 or U+0085
            return [_checked(path, line) for line in stream]
    except (ValueError, RecursionError) as error:
        raise _broken(path, error) from None


def _checked(path: Path, text: str) -> dict[str, Any]:
    """The object that a file, or a line of it, holds. Raises ValueError where it is none, or none of that file's."""
    value: dict[str, Any] = json.loads(text)
    if why := fault(path.name, value):
        raise ValueError(why)
    return value


def _broken(path: Path, error: Exception) -> BrokenFile:
    begins = path.name == "manifest.json"
    after = "; without it a run starts over with --fresh, which moves its folder aside" if begins else ""
    return BrokenFile(
        f"{path}: is not what was written there ({error}): it was cut off, or somebody changed it. Put it back, or delete "
        f"it{after}"
    )


@contextmanager
def published(folder: Path, *, private: bool = False, resumes: bool = False) -> Iterator[Path]:
    """A staging folder that becomes `folder` when the block ends well, and is removed when it does not.

    Files are made readable (safetensors writes mode 0600), fsynced, and the folder appears by one rename.
    An existing `folder` is replaced only then.

    Raises:
        RunError: `folder` is a link, or a file.

    Args:
        private: whether only its owner may look into the folder, from the start, and read its files.
        resumes: whether the block goes on from what an earlier try left in the staging folder. It is then kept, unless the
            block refuses what is in it.
    """
    staging = staging_of(folder)
    require_no_link(folder)
    require_folder(folder)
    if staging.is_symlink() or staging.is_file():  # what somebody links to is somebody's
        staging.unlink()
    if not resumes:
        shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=resumes)
    try:
        yield staging
        for file in [path for path in staging.rglob("*") if path.is_file()]:
            file.chmod(0o600 if private else 0o644)
            fsync(file)
        fsync(staging)
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder)
        fsync(folder.parent)
    except BaseException as error:
        if not resumes or isinstance(error, RefusedError):
            shutil.rmtree(staging, ignore_errors=True)
        raise


def require_no_link(folder: Path) -> None:
    """Raises RunError for a link: what lies behind it is somebody's, and a folder is replaced as a whole."""
    if folder.is_symlink():
        raise RunError(
            f"{folder}: is a link, behind which nothing is written or replaced; remove it, or link all of {OUTPUTS}/ to where "
            "there is room"
        )


def require_folder(folder: Path) -> None:
    """Raises RunError where a file bears the name of a folder that is written there."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file, where a folder is written; move it away")


def require_no_folder(file: Path) -> None:
    """Raises RunError where a folder bears the name of a file that is written there."""
    if file.is_dir():
        raise RunError(f"{file}: is a folder, where a file is written; move it away")


def staging_of(folder: Path) -> Path:
    """Where `published` lets a folder grow before it appears under its name."""
    return folder.with_name(f".{folder.name}.staging")


def require_room(folder: Path, wanted: int, what: str, way_out: str, *, reused: int = 0) -> None:
    """Raises MachineError when the disk of a folder, which need not exist yet, has not so many bytes left.

    Args:
        what: takes them, as the subject of the message.
        reused: bytes there that will be written over.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free + reused
    if free < wanted:
        raise MachineError(
            f"{folder.absolute()}: {what} take {wanted / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; {way_out}"
        )


def fsync(path: Path) -> None:
    """What was written to a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
