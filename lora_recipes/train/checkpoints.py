"""Checkpoints on disk: written aside, hashed, synced and shown by one rename; found again by their hashes.

A checkpoint is whole when its manifest.json, which is written last, names every file with its size and sha256. Its pickles
(optimizer.pt, scheduler.pt, scaler.pt, rng_state*.pth) hold tensors and numbers and are loaded with `weights_only`.
"""

import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from lora_recipes.errors import LoraRecipesError, MachineError, RefusedError
from lora_recipes.run_dir import FEWEST_CHECKPOINTS, file_sha256, fsync, moved_aside, read_json, write_json, write_text

MANIFEST = "manifest.json"
LATEST = "latest"  # names the newest checkpoint
STAGING = ".saving"  # in the folder of checkpoints; what is in it is not whole
NAME = re.compile(r"checkpoint-(\d+)")
# Of the run's own manifest.json: what a checkpoint says of the run that it belongs to.
IDENTITY = ("run", "recipe", "base", "data", "tokens", "chat_template_sha256", "seed", "world_size", "versions")


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything called like a checkpoint, newest first."""
    found = ((NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return sorted(((int(name[1]), path) for name, path in found if name), reverse=True)


def publish_checkpoint(
    staging: Path, step: int, manifest: dict[str, Any], world_size: int, stopped: dict[str, bool] | None = None
) -> Path:
    """Make what the Trainer wrote into `folder/.saving/checkpoint-N` the run's newest checkpoint, `folder/checkpoint-N`.

    Args:
        manifest: of the run.
        stopped: of a run that was asked to end, see `stopped_there`.

    Raises:
        MachineError: a rank's random state is not there: the nodes do not share the folder.
    """
    folder = staging.parent.parent
    _require_all_ranks(staging, world_size)
    files = {}
    for file in _files(staging):
        file.chmod(0o644)  # safetensors writes mode 0600
        fsync(file)
        files[file.relative_to(staging).as_posix()] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    known = {key: manifest[key] for key in IDENTITY if key in manifest}
    write_json(staging / MANIFEST, {"step": step, **known, "stopped": stopped or {}, "files": files})
    for inner in [path for path in staging.rglob("*") if path.is_dir()]:
        fsync(inner)
    staging.chmod(0o755)  # whatever the umask says
    fsync(staging)
    final = folder / staging.name
    if final.exists():
        _make_way(final, known.get("run"))
    staging.rename(final)
    fsync(folder)
    write_text(folder / LATEST, f"{final.name}\n")
    fsync(folder)
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    return final


def _require_all_ranks(staging: Path, world_size: int) -> None:
    ranks = [f"rng_state_{rank}.pth" for rank in range(world_size)] if world_size > 1 else ["rng_state.pth"]
    missing = [name for name in ("trainer_state.json", *ranks) if not (staging / name).is_file()]
    if missing:
        raise MachineError(
            f"{staging}: {missing[0]} was not written here; all nodes must share the working folder, see docs/reliability.md"
        )


def _make_way(final: Path, run: str | None) -> None:
    """A broken checkpoint of this run, from before the one it went on from, is replaced; a stranger's is moved aside."""
    theirs = _manifest(final)
    if theirs is None or theirs.get("run") == run:
        _delete(final)
        return
    moved_aside(final)


def _delete(checkpoint: Path) -> None:
    """Under another name first: whatever ends this, no checkpoint is left in halves."""
    gone = checkpoint.with_name(f".{checkpoint.name}.deleting")
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def retain(folder: Path, run: str | None, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints of this run above a limit, which is at least two. The best and the newest stay.

    Args:
        limit: None keeps all.
        best: path of the best one, where the recipe asks for it.
    """
    for gone in folder.glob(".checkpoint-*.deleting"):
        shutil.rmtree(gone, ignore_errors=True)
    if limit is None:
        return
    whole = [path for _, path in numbered(folder) if why_broken(path, run, hashed=False) is None]
    pinned = [path for path in whole if path is whole[0] or (best and path.name == Path(best).name)]
    others = [path for path in whole if path not in pinned]
    for checkpoint in others[max(limit, FEWEST_CHECKPOINTS) - len(pinned) :]:
        _delete(checkpoint)


def newest_whole(
    folder: Path, run: str | None, check: Callable[[Path], Any], skipped: Callable[[str], None]
) -> Path | None:
    """The newest checkpoint of a run that is whole, hashes and all; None when nothing was saved yet.

    Args:
        check: raises RefusedError for weights that are not sound.
        skipped: told of each newer one, and why it was passed over.

    Raises:
        RefusedError: there are checkpoints, and none is whole.
    """
    found = numbered(folder)
    for _, checkpoint in found:
        reason = why_broken(checkpoint, run)
        if reason is None:
            try:
                check(checkpoint)
            except LoraRecipesError as error:
                reason = str(error)
        if reason is None:
            return checkpoint
        skipped(f"Skipping {checkpoint}: {reason}")
    if found:
        raise RefusedError(
            f"{folder}: none of {len(found)} checkpoint{'s' * (len(found) > 1)} is whole, see above; put one back, or start "
            "over with --fresh, which moves this run aside"
        )
    return None


def why_broken(checkpoint: Path, run: str | None, *, hashed: bool = True) -> str | None:
    """What is wrong with a checkpoint; None when it is whole and of this run.

    Args:
        hashed: compare contents, not only sizes.
    """
    manifest = _manifest(checkpoint)
    if manifest is None:
        return f"{MANIFEST} is missing or cannot be read; the save was cut off, or this is no checkpoint of ours"
    if manifest.get("run") != run:
        return f"it belongs to another run ({manifest.get('run')}, this one is {run})"
    if f"checkpoint-{manifest.get('step')}" != checkpoint.name:
        return f"it was saved at step {manifest.get('step')}"
    there = {file.relative_to(checkpoint).as_posix(): file for file in _files(checkpoint)}
    for name in there.keys() - manifest["files"].keys():
        return f"{name} was put there later"
    if lacking := _lacking(there.keys() | manifest["files"].keys(), manifest):
        return f"{lacking} was never in it, and would begin anew in silence"
    for name, known in manifest["files"].items():
        if name not in there:
            return f"{name} is gone"
        if there[name].is_symlink():
            return f"{name} is a link"
        size = there[name].stat().st_size
        if size != known["bytes"]:
            return f"{name} has {size:,} bytes, {known['bytes']:,} were saved"
        if hashed and file_sha256(there[name]) != known["sha256"]:
            return f"{name} is not what was saved (sha256)"
    return _open_to_others(checkpoint, there.values())


def _lacking(names: Collection[str], manifest: dict[str, Any]) -> str | None:
    """Which part of a run's state no file of a checkpoint holds; FSDP and DeepSpeed have folders of their own for it."""
    ranks = manifest.get("world_size", 1)
    if not isinstance(ranks, int) or ranks < 1:
        return f"a sensible number of processes (world_size is {str(ranks)[:40]})"
    parts = [
        ("the state of the optimizer", r"optimizer.*|global_step.*|pytorch_model_fsdp.*"),
        ("the schedule of the learning rate", r"scheduler\.pt|global_step.*"),
        ("the trainer's state", r"trainer_state\.json"),
    ]
    # One after another: the number of ranks is what a file says.
    each = (
        (f"the random state of rank {rank}", rf"rng_state{f'_{rank}' if ranks > 1 else ''}\.pth")
        for rank in range(ranks)
    )
    return next(
        (part for part, wanted in chain(parts, each) if not any(re.fullmatch(wanted, name) for name in names)), None
    )


def _open_to_others(checkpoint: Path, files: Iterable[Path]) -> str | None:
    """Whether somebody else could have written a checkpoint. A mount that gives all its files to one user, or to everybody,
    says so of the folder above too."""
    above = checkpoint.parent.stat()
    if checkpoint.is_symlink():
        return "it is a link"
    for place in (checkpoint, *files):
        owner = place.stat().st_uid
        if owner not in (os.geteuid(), above.st_uid):
            return f"{place.name} belongs to another user (uid {owner})"
    if checkpoint.stat().st_mode & ~above.st_mode & stat.S_IWOTH:
        return "anybody may write into its folder"
    return None


def _manifest(checkpoint: Path) -> dict[str, Any] | None:
    try:
        found = read_json(checkpoint / MANIFEST)
    except (OSError, ValueError):
        return None
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(files, dict):
        return None
    whole = all(
        isinstance(known, dict) and isinstance(known.get("bytes"), int) and isinstance(known.get("sha256"), str)
        for known in files.values()
    )
    return found if whole else None


def _files(folder: Path) -> Iterator[Path]:
    """All files but the manifest and hidden ones, which file systems leave."""
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and path != folder / MANIFEST:
                yield path


def stopped_there(checkpoint: Path) -> dict[str, bool]:
    """What a run that was stopped at a checkpoint has to know; nothing where the recipe asked for it.

    "owes_evaluation": it was stopped before, or in, the evaluation after this step. "unplanned": without the stop the run
    would have no checkpoint here, so none that could be its best.
    """
    return (_manifest(checkpoint) or {}).get("stopped", {})
