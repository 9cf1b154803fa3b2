"""Where the project's own files are."""

from pathlib import Path

import mmvmamba


def project_folder() -> Path:
    """The folder with `configs/`, `demo/`, `tools/`: a checkout's root, or `.mim` in an install."""
    package = Path(mmvmamba.__file__).resolve().parent
    checkout = package.parent
    return checkout if (checkout / "configs").is_dir() else package / ".mim"
