"""Compiles decode kernels and keeps them for the process; TileLang keeps the binaries on disk."""

from __future__ import annotations

import functools
import logging
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import tilelang
import torch
import z3
from tilelang import tvm

from ...shape import Specialisation
from ...tiling import Tiling
from .decode import decode_program

# the same for ahead-of-time and run-time compilation, so that their cache entries agree
TARGET = {"kind": "cuda", "arch": "sm_90a"}
PASS_CONFIGS = {
    tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True,
    # every role synchronises by hand: a barrier put in by the compiler could wait for warps of another role
    tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
    # every access is guarded where it can leave its tensor
    tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
}

# How Z3 answers TVM's analyzer, which asks ten thousand questions a kernel, nearly all of them in vain. With its older
# arithmetic, and every term relevant, it takes about half the time (docs/kernels.md). TileLang has no option for that.
PROOFS = {"smt.arith.solver": "2", "smt.relevancy": "0"}

TELL_AFTER = 1.0  # seconds

_log = logging.getLogger("flexmla")
_lock = threading.Lock()
_proofs_lock = threading.Lock()
_kernels: dict[Any, Any] = {}


def program(wanted: Specialisation, tiling: Tiling) -> Any:
    """The TileLang program of a specialisation and tile."""
    with tvm.target.Target(TARGET):
        return decode_program(wanted, tiling)


def kernel(wanted: Specialisation, tiling: Tiling) -> Any:
    """The compiled kernel, from this process, the disk cache or the compiler, in this order.

    Raises:
        RuntimeError: the kernel is not compiled and the stream is being captured, or a compiler is missing.
    """
    # workers and merge are arguments of the launch: one kernel serves every grid
    key = wanted, replace(tiling, workers=1, log_merge_ways=0, log_merge_parts=0)
    found = _kernels.get(key)
    if found is not None:
        return found
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the kernel of {wanted.shape} in {wanted.dtype} is not compiled and cannot be during CUDA graph capture: "
            "call mla_decode once with this shape and dtype before capturing, and with such a cache, q_len and options"
        )
    with _lock:
        if key not in _kernels:
            with _told(f"{wanted.shape} in {wanted.dtype}"):
                _kernels[key] = _compile(program(wanted, tiling))
        return _kernels[key]


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Says what takes so long, where it takes long: a kernel of the disk cache is there at once."""
    message = f"compiling a kernel for {what}: 10 to 40 seconds, once; it is kept in {tilelang.env.TILELANG_CACHE_DIR}"
    timer = threading.Timer(TELL_AFTER, _log.warning, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def prebuild(wanted: Specialisation, tiling: Tiling) -> str | None:
    """Compiles a kernel into the disk cache; None, or what went wrong. For worker processes: it can be pickled."""
    try:
        kernel(wanted, tiling)
    except Exception as error:
        return f"{wanted} {tiling}: {error}"
    return None


def _compile(func: Any) -> Any:
    try:
        with _quick_proofs():
            made = tilelang.compile(func, target=TARGET, execution_backend="tvm_ffi", pass_configs=PASS_CONFIGS)
        # the compiled function itself: what TileLang wraps around it looks it up again at every call
        return made.adapter.get_exportable_executable()["main"]
    except Exception as error:
        missing = missing_compilers()
        if missing:
            raise RuntimeError(f"compiling a kernel needs {' and '.join(missing)}") from error
        raise


@contextmanager
def _quick_proofs() -> Iterator[None]:
    """Sets Z3's options while a program is lowered. They are the process's: one at a time, and set back."""
    with _proofs_lock:
        before = {name: z3.get_param(name) for name in PROOFS}
        try:
            for name, value in PROOFS.items():
                z3.set_param(name, value)
            yield
        finally:
            for name, value in before.items():
                z3.set_param(name, value)


def lower(func: Any) -> Any:
    """A program as TileLang's passes leave it for the device compiler, with this backend's options."""
    target = tvm.target.Target(TARGET)
    passes = tvm.transform.PassContext(config={k.value: v for k, v in PASS_CONFIGS.items()})
    with target, passes, _quick_proofs():
        return tilelang.engine.lower(func, target=target, enable_device_compile=False)


def lower_source(wanted: Specialisation, tiling: Tiling) -> tuple[str, dict[str, Any]]:
    """The CUDA source of a kernel and the launch attributes of its device functions, without nvcc or a GPU."""
    artifact = lower(program(wanted, tiling))
    attributes = {name.name_hint: device.attrs for name, device in artifact.device_mod.functions.items()}
    return artifact.kernel_source, attributes


def missing_compilers() -> list[str]:
    """What a first compilation would lack on this machine, each with how to install it."""
    missing = []
    if not _has_nvcc():
        missing.append("nvcc, the CUDA compiler (pip install 'flexmla[nvcc]', or the CUDA toolkit with CUDA_HOME set)")
    if shutil.which("g++") is None and shutil.which("c++") is None:
        missing.append("a host C++ compiler (for example: apt-get install g++)")
    return missing


@functools.cache
def _has_nvcc() -> bool:
    from tilelang.contrib.nvcc import get_nvcc_compiler

    try:
        return shutil.which(get_nvcc_compiler()) is not None
    except Exception:
        return False
