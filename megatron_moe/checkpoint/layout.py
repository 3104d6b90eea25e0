"""Where checkpoints lie in a run's directory, and which of them is complete.

A checkpoint is written under a temporary name and renamed when everything is in it; `latest_checkpointed_iteration.txt`
names the newest one after that. No torch here.
"""

import os
import re
import shutil
from pathlib import Path

from megatron_moe.config.base import UserError

LATEST_FILE = "latest_checkpointed_iteration.txt"
CONFIG_FILE = "config.yaml"
TOKENIZER_FOLDER = "tokenizer"
UNFINISHED = ".unfinished"
# In the common state of a checkpoint that was converted: where its weights, which are all it holds, come from.
WEIGHTS_ONLY = "weights_only"
_LONGEST_NUMBER = 20
_NAME = re.compile(r"iter_[0-9]{7,}")


def checkpoint_folder(run_dir: str | Path, iteration: int) -> Path:
    """`RUN/iter_0000100`."""
    return Path(run_dir) / f"iter_{iteration:07d}"


def latest_iteration(run_dir: str | Path) -> int | None:
    """Step of the newest complete checkpoint, or None where there is none.

    Raises:
        UserError: the file that names it is damaged, or names a checkpoint that is not there.
    """
    path = Path(run_dir) / LATEST_FILE
    if not path.exists():
        return None
    try:
        with path.open("rb") as stream:
            text = stream.read(_LONGEST_NUMBER + 1).strip().decode("utf-8", "replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    # isdigit alone takes other scripts' digits and superscripts.
    if not (text.isascii() and text.isdigit()) or len(text) > _LONGEST_NUMBER:
        raise UserError(f"{path}: holds {text[:40]!r}, expected the number of a step")
    iteration = int(text)
    if not checkpoint_folder(run_dir, iteration).is_dir():
        raise UserError(
            f"{path}: names step {iteration}, but {checkpoint_folder(run_dir, iteration).name} is not there; "
            f"write the step of a checkpoint that is, {_present(run_dir)}"
        )
    return iteration


def find_checkpoint(run_dir: str | Path) -> Path:
    """Folder of the newest complete checkpoint.

    Raises:
        UserError: there is none.
    """
    if not Path(run_dir).is_dir():
        raise UserError(f"--load {run_dir}: no such folder; give the --save folder of a run")
    iteration = latest_iteration(run_dir)
    if iteration is None:
        folder = Path(run_dir)
        hint = f"; give the folder of the run, {folder.parent}" if folder.name.startswith("iter_") else ""
        raise UserError(f"--load {run_dir}: holds no checkpoint ({LATEST_FILE} is missing){hint}")
    return checkpoint_folder(run_dir, iteration)


def is_hugging_face(folder: str | Path) -> bool:
    """Whether a folder holds a model of Hugging Face's and no run of ours."""
    return (Path(folder) / "config.json").is_file() and not (Path(folder) / LATEST_FILE).exists()


def publish(unfinished: Path, iteration: int) -> Path:
    """Make a finished checkpoint visible: rename it, then point the latest-file at it."""
    run_dir = unfinished.parent
    folder = checkpoint_folder(run_dir, iteration)
    _flush_to_disk(unfinished)
    replaced = folder.with_name(f"{folder.name}.replaced{UNFINISHED}")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        # Left by a run that went further and was then resumed from an earlier step. Moved aside rather than deleted
        # first: the time without a checkpoint of this step is that of two renames.
        folder.rename(replaced)
    unfinished.rename(folder)
    _flush_to_disk(run_dir, contents=False)
    _write_durably(run_dir / LATEST_FILE, f"{iteration}\n")
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def prune(run_dir: str | Path, keep_last: int) -> list[Path]:
    """Delete all but the newest checkpoints; returns what was deleted.

    Checkpoints of later steps than the latest one were left by a run that went further before; they go first.
    """
    latest = latest_iteration(run_dir)
    folders = sorted(
        (path for path in Path(run_dir).glob("iter_*") if _NAME.fullmatch(path.name) and path.is_dir()),
        key=lambda path: (latest is None or _step(path) <= latest, _step(path)),
    )
    doomed = folders[:-keep_last]
    for folder in doomed:
        # Renamed first, so that a half-deleted checkpoint never looks like a whole one.
        trash = folder.with_name(folder.name + UNFINISHED)
        folder.rename(trash)
        shutil.rmtree(trash)
    return doomed


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("iter_"))


def _present(run_dir: str | Path) -> str:
    names = sorted(path.name for path in Path(run_dir).glob("iter_*") if path.suffix != UNFINISHED)
    return f"there are: {', '.join(names)}" if names else "there is none"


def _flush_to_disk(folder: Path, *, contents: bool = True) -> None:
    for path in [*(folder.rglob("*") if contents else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
