"""Python processes of their own that measure something: their environment, and what they said when they failed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def environment(source: Path, **variables: str) -> dict[str, str]:
    """This process's environment with a `src` folder first among the module paths, and other variables."""
    path = os.pathsep.join(filter(None, (str(source), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **variables}


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that a process wrote."""
    said = (done.stderr or done.stdout).strip().splitlines()
    return said[-1] if said else "it said nothing"
