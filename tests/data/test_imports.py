"""Machines that clean and tokenize need no torch: all of data/ but the datasets of training imports without it."""

import subprocess
import sys
from pathlib import Path

import megatron_moe.data

DATASETS = {"datasets.py", "domain_stream.py", "sample_index.py", "sample_stream.py"}
PROGRAM = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron"):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_data_imports_without_torch() -> None:
    root = Path(megatron_moe.data.__file__).parent
    paths = [path for path in sorted(root.rglob("*.py")) if path.name not in DATASETS]
    names = [
        ".".join(path.relative_to(root.parent.parent).with_suffix("").parts).removesuffix(".__init__") for path in paths
    ]
    assert "megatron_moe.data.tokenizer.load" in names
    run = subprocess.run([sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
