"""Which checkpoint a training that was interrupted goes on from."""

from collections.abc import Iterator
from pathlib import Path

from mmvmamba.models.checkpoint import CheckpointError, read_checkpoint

# What mmengine's checkpoints hold beside the weights and a training cannot go on without.
RESUME_ENTRIES = ("meta", "message_hub", "optimizer")
# Where mmengine's hook writes which checkpoint was its last.
LAST_CHECKPOINT = "last_checkpoint"


def newest_checkpoint(folder: str | Path) -> tuple[Path | None, list[str]]:
    """Finds the newest checkpoint of a work directory that is whole, by reading it.

    Args:
        folder: The work directory.

    Returns:
        The file, or None where there is no checkpoint yet, and why newer ones were passed over.

    Raises:
        CheckpointError: If there are checkpoints, and none of them is whole.
    """
    damaged = []
    for path in _newest_first(Path(folder)):
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        # Weights alone, such as a best or a published checkpoint, are nothing to go on from.
        if not missing_entries(checkpoint):
            return path, damaged
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {folder} can be resumed from:\n  "
            + "\n  ".join(damaged)
            + "\nMove them away to start from the beginning."
        )
    return None, []


def missing_entries(checkpoint: dict) -> list[str]:
    """The entries without which a training cannot go on that a checkpoint lacks."""
    return [entry for entry in RESUME_ENTRIES if entry not in checkpoint]


def check_resumable(checkpoint: dict, filename: str) -> None:
    """Refuses a checkpoint that a training cannot go on from.

    Raises:
        CheckpointError: If it holds weights alone.
    """
    missing = missing_entries(checkpoint)
    if missing:
        raise CheckpointError(
            f"{filename} has no {', '.join(missing)}: it holds weights, not the state of a "
            "training, and cannot be resumed from. To start a new training from its weights: "
            f"--cfg-options load_from={filename}"
        )


def _newest_first(folder: Path) -> Iterator[Path]:
    """Yields the checkpoint that was written last and then the ones that are older.

    Newer files than the one that the hook named are an earlier training's, which had come further.
    """
    named = _named_last(folder)
    found = sorted((named.parent if named else folder).glob("*.pth"), key=_age)
    if named:
        yield named
    for path in found:
        if path != named and not (named and _age(path) < _age(named)):
            yield path


def _age(path: Path) -> int:
    return -path.stat().st_mtime_ns


def _named_last(folder: Path) -> Path | None:
    """The checkpoint that the hook named; None if it was interrupted while it wrote the name."""
    note = folder / LAST_CHECKPOINT
    name = note.read_text().strip() if note.is_file() else ""
    if "://" in name:
        raise CheckpointError(
            f"the last checkpoint is {name} ({note}), which is not on this disk: fetch it, and "
            "give its path, --resume FILE."
        )
    # The folder may have been moved since the path was written.
    places = (Path(name), folder / Path(name).name) if name else ()
    return next((place for place in places if place.is_file()), None)
