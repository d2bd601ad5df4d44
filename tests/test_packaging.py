from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import flexmla

ROOT = Path(__file__).parent.parent
BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def python(code: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter in which the given packages cannot be imported."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(p) for p in (ROOT / "src", os.environ.get("PYTHONPATH", "")) if p),
    }
    command = [sys.executable, "-c", f"BLOCKED = {blocked!r}\n{BLOCK}\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


EXTRAS = (
    "tilelang",
    "tvm",
    "transformers",
    "gguf",
    "accelerate",
    "safetensors",
    "matplotlib",
    "triton",
    "tokenizers",
)
NOT_TORCH = (*EXTRAS, "typer", "rich")

DECODE = """
import torch, flexmla
q, q_pe = torch.randn(2, 1, 6, 16), torch.randn(2, 1, 6, 8)
ckv, kpe = torch.randn(2, 9, 16), torch.randn(2, 9, 3, 8)
out, lse = flexmla.mla_decode(q, q_pe, ckv, kpe)
print(tuple(out.shape), tuple(lse.shape))
"""


def test_decoding_needs_torch_only():
    done = python(DECODE, blocked=NOT_TORCH)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "(2, 1, 6, 16) (2, 6, 1)"


def test_import_loads_nothing_optional():
    done = python(f"import flexmla; print([m for m in {NOT_TORCH!r} if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.strip()
    assert loaded == "[]", f"import flexmla loads {loaded}"


def test_importing_does_not_start_cuda():
    done = python("import torch, flexmla; print(torch.cuda.is_initialized())")
    assert done.stdout.strip() == "False", done.stderr


def test_the_program_works_without_the_extras():
    code = "from flexmla.cli import main; main(['info', '--shape', '32,1,512,16', '--device', 'cpu'])"
    done = python(code, blocked=EXTRAS)
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout


def test_the_package_carries_its_data():
    package = files("flexmla")
    assert package.joinpath("py.typed").is_file()
    assert len(json.loads(package.joinpath("shapes.json").read_text())) > 0


def test_every_public_name_is_there():
    assert all(hasattr(flexmla, name) for name in flexmla.__all__)


def test_the_readme_example_runs():
    example = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    done = python(f"{example}\nprint(tuple(out.shape), tuple(lse.shape), float(lse[3].max()))", blocked=EXTRAS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(4, 1, 32, 512) (4, 32, 1) -inf"
    assert done.stdout.startswith("torch ")
