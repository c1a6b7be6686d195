"""`push`: uploads adapter, merged model or exports in one commit, with card and manifest, and nothing private."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from lora_recipes import console
from lora_recipes.errors import MachineError, RecipeError, RefusedError, RunError
from lora_recipes.model.folder import PICKLES, VOCABULARIES, require_intact
from lora_recipes.plan import facts_of
from lora_recipes.plan.method import method_in_full
from lora_recipes.recipe import Recipe
from lora_recipes.redact import find_secret
from lora_recipes.run_dir import RunDir, file_sha256, read_json
from lora_recipes.trained import require_same_adapter

MESSAGE = "Upload by lora-recipes"
WEIGHTS = {".safetensors", ".gguf"}
# A path of somebody's machine inside a text: below a folder that machines have, and not a part of a URL.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/~-])/(?:home|root|Users|tmp|mnt|media|opt|srv|var|work|scratch|workspace|data|content)/[\w.-]+"
    r"|\b[A-Za-z]:\\\\?[\w.-]+"
)
NOT_FIGURES = {"tolerance", "seconds", "peak_rss_bytes", "prompts"}


@dataclass(frozen=True)
class Upload:
    """A file as it will be in the repository: from a file here, or text that was made."""

    path: str
    content: Path | bytes

    def facts(self) -> dict[str, Any]:
        if isinstance(self.content, bytes):
            digest = hashlib.sha256(self.content).hexdigest()
            return {"path": self.path, "bytes": len(self.content), "sha256": digest}
        return {"path": self.path, "bytes": self.content.stat().st_size, "sha256": file_sha256(self.content)}


def push(recipe: Recipe, *, dry_run: bool) -> dict[str, Any]:
    """Create `hub.repo_id` if need be, and commit `hub.folder` to it.

    Args:
        dry_run: list what would be sent and send nothing; works offline.

    Returns:
        {"repo_id", "revision", "private", "folder", "dry_run", "files": [{"path", "bytes", "sha256"}], "commit": its
        address, None for a dry run}.

    Raises:
        RecipeError: no `hub.repo_id`, or one that the hub does not take.
        RunError: the folder that is to be pushed is not there yet.
        RefusedError: the folder is not what was published; a file holds a secret, a path of this machine or a pickle;
            or the repository is public and `hub.private` does not say so.
        MachineError: the hub is switched off, cannot be reached, or does not let this user in.
    """
    run_dir = RunDir.of(recipe.name)
    hub = recipe.section("hub")
    _require_repo(recipe, hub)
    name = hub.get("folder", "adapter" if recipe.get("lora") else "merged")
    folder = _require_folder(recipe, run_dir, name)
    require_intact(folder)
    uploads = _uploads(recipe, run_dir, name, folder)
    _require_publishable(uploads)
    found: dict[str, Any] = {
        "repo_id": hub["repo_id"],
        "revision": hub.get("revision", constants.DEFAULT_REVISION),
        "private": hub.get("private", True),
        "folder": str(folder),
        "dry_run": dry_run,
        "files": [upload.facts() for upload in uploads],
        "commit": None,
    }
    if not dry_run:
        found["commit"] = _send(found, uploads, hub.get("commit_message", MESSAGE))
    _show(found)
    return found


def _require_repo(recipe: Recipe, hub: dict[str, Any]) -> None:
    if "repo_id" not in hub:
        raise RecipeError(f"{recipe.path}: no repository to push to; set hub.repo_id=OWNER/NAME")
    try:
        validate_repo_id(hub["repo_id"])
    except HFValidationError as error:
        raise RecipeError(f"{recipe.where('hub.repo_id')}: {hub['repo_id']!r} is no repository: {error}") from None


def _require_folder(recipe: Recipe, run_dir: RunDir, name: str) -> Path:
    if name == "adapter":
        if not recipe.get("lora"):
            raise RunError(f"{recipe.path}: there is no adapter: the whole model is trained. Set hub.folder=merged")
        run_dir.require_adapter(recipe.path)
        require_same_adapter(recipe, run_dir, None)
        return run_dir.adapter
    folder = {"merged": run_dir.merged, "exports": run_dir.exports}[name]
    if not folder.is_dir():
        verb = {"merged": "merge" if recipe.get("lora") else "train", "exports": "export"}[name]
        raise RunError(f"{folder}: not there yet; make it first: lora-recipes {verb} {recipe.path}")
    return folder


def _uploads(recipe: Recipe, run_dir: RunDir, name: str, folder: Path) -> list[Upload]:
    """The folder's files, with a card where it has none, and the run's manifest without this machine's paths."""
    files: dict[str, Path | bytes] = {}
    for file in sorted(folder.rglob("*")):
        if file.is_symlink() or not (file.is_file() or file.is_dir()):
            raise RefusedError(f"{file}: neither a file nor a folder; a link could publish what lies elsewhere")
        if file.is_file():
            files[file.relative_to(folder).as_posix()] = file
    manifest = _portable({key: value for key, value in read_json(run_dir.manifest).items() if key != "argv"})
    if "manifest.json" in files:
        manifest[name] = _portable(read_json(folder / "manifest.json"))
    files["manifest.json"] = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
    if "README.md" not in files:
        files["README.md"] = _card(recipe, run_dir, name, manifest).encode()
    return [Upload(path, content) for path, content in sorted(files.items())]


def _portable(value: Any) -> Any:
    """The same with every absolute path cut down to its last part."""
    if isinstance(value, dict):
        return {_portable(key): _portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    return PurePath(value.replace("\\", "/")).name if isinstance(value, str) and _absolute(value) else value


def _absolute(text: str) -> bool:
    return "\n" not in text and (PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute())


def _require_publishable(uploads: list[Upload]) -> None:
    problems = []
    for upload in uploads:
        suffix = PurePosixPath(upload.path).suffix
        if suffix in PICKLES:
            problems.append(f"{upload.path}: a pickle runs code when it is loaded")
        elif suffix not in WEIGHTS:
            problems += _private(upload)
    if problems:
        raise RefusedError(
            "\n".join(
                ["nothing was sent; these files may not be published:"]
                + [f"  - {problem}" for problem in problems]
                + ["Remove what is named there, and push again"]
            )
        )


def _private(upload: Upload) -> Iterator[str]:
    """What a text file gives away; the secret itself is not repeated."""
    data = upload.content if isinstance(upload.content, bytes) else upload.content.read_bytes()
    text = data.decode("utf-8", errors="replace")
    if secret := find_secret(text):
        yield f"{upload.path}:{_line(text, secret.start())}: looks like a secret ({secret.group()[:4]}…)"
    if PurePosixPath(upload.path).name in VOCABULARIES:
        return
    if path := MACHINE_PATH.search(text) or _here().search(text):
        yield f"{upload.path}:{_line(text, path.start())}: a path of a machine ({path.group()})"
    elif upload.path.endswith(".json"):
        for value in _strings(json.loads(text)):
            if _absolute(value) and len(value) > 1:
                yield f"{upload.path}: a path of a machine ({value})"


def _here() -> re.Pattern[str]:
    """The home and working folder of this very machine, wherever they are."""
    places = [re.escape(str(place)) for place in (Path.home(), Path.cwd()) if len(place.parts) > 1]
    return re.compile(rf"(?<![\w.:/~-])(?:{'|'.join(places)})(?![\w.-])" if places else "(?!)")


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _card(recipe: Recipe, run_dir: RunDir, name: str, manifest: dict[str, Any]) -> str:
    """A model card that says what is known of the run, and what is not."""
    base = manifest.get("base", {})
    named = str(base.get("name", _portable(recipe.get("model.pretrained_model_name_or_path"))))
    known = facts_of(named) or {}
    front = ["library_name: " + ("peft" if name == "adapter" else "transformers"), "tags: [lora-recipes, trl, sft]"]
    if base.get("source") == "hub":
        front.insert(0, f"base_model: {named}")
    rows = {
        "Base": named + (f" at {base['revision']}" if base.get("revision") else ""),
        "Licence of the base": known.get("licence") or "not known here; see the base",
        "Licence of this model": "not stated",
        "Method": method_in_full(recipe),
        "Trained on": ", ".join(f"`{file}`" for file in sorted(manifest.get("data", {}))) or "not recorded",
        "Versions": ", ".join(f"{key} {value}" for key, value in manifest.get("versions", {}).items())
        or "not recorded",
    }
    figures = [
        (f"{title}: {key}", value)
        for title, file in (("evaluation", run_dir.evaluation), ("merge parity", run_dir.parity))
        for key, value in _figures(read_json(file))
    ]
    lines = ["---", *front, "---", "", f"# {recipe.name}", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in rows.items()]
    lines += ["", "## Measured", ""]
    lines += ["| figure | value |", "|---|---|"] if figures else ["Nothing was measured before this upload."]
    lines += [f"| {key} | {value} |" for key, value in figures]
    return "\n".join([*lines, "", "`manifest.json` holds what it takes to repeat the run.", ""])


def _figures(found: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every number and verdict of a report, in its own words."""
    for key, value in found.items():
        if isinstance(value, dict) and key not in NOT_FIGURES:
            yield from _figures(value, f"{prefix}{key} / ")
        elif isinstance(value, bool | int | float) and key not in NOT_FIGURES:
            told = str(value).lower() if isinstance(value, bool) else f"{value:.6g}"
            yield f"{prefix}{key}".replace("_", " "), told


def _send(found: dict[str, Any], uploads: list[Upload], message: str) -> str:
    """One commit, so that no reader sees half of it. Returns its address."""
    if constants.HF_HUB_OFFLINE:
        raise MachineError("HF_HUB_OFFLINE is set, so nothing is sent; unset it, or look with --dry_run")
    api, repo_id = HfApi(), found["repo_id"]
    operations = [CommitOperationAdd(upload.path, upload.content) for upload in uploads]
    try:
        api.create_repo(repo_id, private=found["private"], exist_ok=True)
        if found["private"] and not api.model_info(repo_id).private:
            raise RefusedError(
                f"{repo_id} exists and is public; nothing was sent. Set hub.private=false to publish, or choose another"
            )
        if found["revision"] != constants.DEFAULT_REVISION:
            api.create_branch(repo_id, branch=found["revision"], exist_ok=True)
        console.say(f"Sending {len(uploads)} files to {repo_id} …")
        return str(
            api.create_commit(repo_id, operations, commit_message=message, revision=found["revision"]).commit_url
        )
    except HfHubHTTPError as error:
        raise MachineError(f"the hub refused the upload to {repo_id}: {_first_line(error)}; {_help(error)}") from None
    except OSError as error:
        raise MachineError(f"the upload to {repo_id} failed: {_first_line(error)}; {_help(error)}") from None
    except Exception as error:  # the HTTP client's own tree of network errors, which huggingface_hub does not wrap
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise
        told = f"{type(error).__name__}: {_first_line(error)}"
        raise MachineError(f"the hub at {api.endpoint} cannot be reached ({told}); nothing was committed") from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _help(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = {401: "log in with `hf auth login`", 403: "this token may not write there", 413: "a file is too large"}
    return known.get(status or 0, "see `hf auth whoami`, and push again")


def _show(found: dict[str, Any]) -> None:
    state = "would be sent" if found["dry_run"] else "sent"
    kind = "private" if found["private"] else "public"
    rows = [[file["path"], f"{file['bytes']:,}", file["sha256"]] for file in found["files"]]
    title = f"{len(rows)} files {state} to {found['repo_id']} ({kind}, {found['revision']})"
    console.table(title, ["file", "bytes", "sha256"], rows, lines=False)
    if found["commit"]:
        console.say(f"Committed: {found['commit']}", "bold")
