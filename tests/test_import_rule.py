"""Imports point down the layers of the package; data stands beside model.

config <- runtime <- moe <- model <- checkpoint, training, inference <- entry points
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_moe

PACKAGE = Path(megatron_moe.__file__).parent
LAYERS = (
    {"config"},
    {"runtime"},
    {"moe"},
    {"model", "data"},
    {"checkpoint", "training", "inference"},
)
ENTRY_POINTS = len(LAYERS)
RANKS = {folder: rank for rank, folders in enumerate(LAYERS) for folder in folders}
# Copied into checkpoints, where they stand by themselves: of ours they may import their neighbour alone, by a dot.
SHIPPED = {
    PACKAGE / "checkpoint" / "hf" / "remote" / f"{kind}_megatron_moe.py" for kind in ("configuration", "modeling")
}
MODULES = sorted(set(PACKAGE.rglob("*.py")) - SHIPPED)


def _rank(folder: str) -> int:
    return RANKS.get(folder, ENTRY_POINTS)


def _imported_folders(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and second name of every import of this package, also inside functions: megatron_moe.<folder>."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which layer is imported"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "megatron_moe" else [module]
        for name in names:
            if name.startswith("megatron_moe."):
                yield node.lineno, name.split(".")[1]


def _allowed(importer: str, imported: str) -> bool:
    if importer == imported or importer not in RANKS:
        return True
    beside = {importer, imported} <= LAYERS[-1]  # the loop saves checkpoints; data and model stay strangers
    return beside or _rank(imported) < _rank(importer)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    folder = path.relative_to(PACKAGE).parts[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = [
        f"{path.name}:{line} imports megatron_moe.{imported}"
        for line, imported in _imported_folders(tree)
        if imported != "__version__" and not _allowed(folder, imported)
    ]
    assert not wrong, f"{folder} stands below: {wrong}"


def test_every_folder_has_a_layer() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders <= set(RANKS)


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("config", "moe", False),
        ("moe", "config", True),
        ("model", "data", False),
        ("data", "model", False),
        ("training", "checkpoint", True),
        ("model", "training", False),
        ("pretrain.py", "training", True),
        ("training", "pretrain", False),
    ],
)
def test_the_rule(importer: str, imported: str, allowed: bool) -> None:
    assert _allowed(importer, imported) is allowed
