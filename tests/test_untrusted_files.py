"""Loading never executes code: what could is not called anywhere in the package, the tools and the benchmarks."""

import ast
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_moe.config.base import UserError
from megatron_moe.data.documents import parse_object, read_documents
from megatron_moe.data.safe_numpy import check_array_file
from megatron_moe.data.sample.sources import Source, extract
from tests.helpers.attacks import Evil

ROOT = Path(__file__).parents[1]
FOLDERS = ("megatron_moe", "tools", "benchmarks", "examples")
FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "dill.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.load_all",
    "torch.jit.load",
    "torch.hub.load",
}


# A folder that only links to the weights of the other one and holds this package's code (`own_code.py`, held by
# tests/checkpoint/hf/test_verify.py:test_code_of_others_is_not_run).
ALLOWED = {("megatron_moe/checkpoint/hf/fresh_process.py", "with trust_remote_code")}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an expression, or nothing."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base or '?'}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def problems(source: str) -> Iterator[str]:
    """Calls that would, or could, run what a file says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "shelve", "dill", "joblib"):
            yield f"line {node.lineno}: from {node.module} import"
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {word.arg: word.value for word in node.keywords}

        def says(word: str, value: object, given: dict[str | None, ast.expr] = given) -> bool:
            found = given.get(word)
            return isinstance(found, ast.Constant) and found.value is value

        where = f"line {node.lineno}: {name}"
        if name in FORBIDDEN:
            yield where
        if name == "torch.load" and not says("weights_only", True):
            yield f"{where} without weights_only=True"
        if name == "yaml.load" and dotted(given.get("Loader", ast.Pass())) not in (
            "yaml.SafeLoader",
            "_UniqueKeyLoader",
        ):
            yield f"{where} with another loader"
        if "shell" in given and not says("shell", False):
            yield f"{where} with shell"
        if "trust_remote_code" in given and not says("trust_remote_code", False):
            yield f"{where} with trust_remote_code"
        if "allow_pickle" in given and not says("allow_pickle", False):
            yield f"{where} with allow_pickle"
        if name.endswith((".extractall", ".extract", ".unpack_archive")) and not says("filter", "data"):
            yield f"{where} without filter='data'"
        if name == "AutoTokenizer.from_pretrained" and not says("trust_remote_code", False):
            yield f"{where} without trust_remote_code=False"


def test_nothing_in_the_repository_runs_what_a_file_says() -> None:
    sources = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 80
    found = [(path.relative_to(ROOT), one) for path in sources for one in problems(path.read_text(encoding="utf-8"))]
    allowed = [entry for entry in found if any(str(entry[0]) == at and entry[1].endswith(end) for at, end in ALLOWED)]
    assert len(allowed) == len(ALLOWED)
    assert [entry for entry in found if entry not in allowed] == []


@pytest.mark.parametrize(
    "call",
    [
        "import pickle; pickle.load(f)",
        "from pickle import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.load(f, Loader=yaml.Loader)",
        "yaml.load(f)",
        "eval(text)",
        "os.system('x')",
        "subprocess.run('x', shell=True)",
        "np.load(f, allow_pickle=True)",
        "archive.extractall(folder)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(x)",
    ],
)
def test_the_walk_sees_it(call: str) -> None:
    assert len(list(problems(call))) == 1


def test_the_config_loader_is_a_safe_one() -> None:
    import yaml

    from megatron_moe.config.yaml_io import _UniqueKeyLoader

    assert issubclass(_UniqueKeyLoader, yaml.SafeLoader)
    assert not any("python/" in str(tag) for tag in _UniqueKeyLoader.yaml_constructors)


# ---- archives of the sample corpus


def source(registry: str) -> Source:
    made: Any = SimpleNamespace(
        registry=registry, members=r"inside\.txt", documents=lambda text: iter(text.splitlines())
    )
    return made


def pack(path: Path, registry: str, members: dict[str, bytes]) -> Path:
    """A wheel, or a tarball with a link that leads outside."""
    if registry == "pip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            for name, content in members.items():
                wheel.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("inside.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("registry", ["pip", "npm"])
def test_an_archive_writes_nothing_and_its_size_is_bounded(tmp_path: Path, registry: str) -> None:
    archive = pack(tmp_path / "bomb", registry, {"../../escaped.txt": b"x", "inside.txt": b"a\n" * 40_000_000})
    assert archive.stat().st_size < 1_000_000
    with pytest.raises(UserError, match=r"larger than 64 MiB|makes it too large"):
        list(extract(source(registry), archive))
    assert [path.name for path in tmp_path.iterdir()] == ["bomb"]
    assert not (tmp_path.parent / "escaped.txt").exists()


@pytest.mark.parametrize("registry", ["pip", "npm"])
@pytest.mark.parametrize("place", [0, 10, 40, -30, -10])
def test_a_damaged_archive_is_one_line(place: int, registry: str, tmp_path: Path) -> None:
    archive = pack(tmp_path / "damaged", registry, {"inside.txt": b"abc\n" * 50})
    content = bytearray(archive.read_bytes())
    content[place] ^= 0x55
    archive.write_bytes(bytes(content))
    try:
        assert list(extract(source(registry), archive)) == ["abc"] * 50
    except UserError as error:
        message = str(error)
        assert "\n" not in message


# ---- numpy files and JSON Lines


def test_an_array_of_objects_in_the_cache_is_refused(tmp_path: Path) -> None:
    import os

    marker = tmp_path / "marker"
    np.save(tmp_path / "bad.npy", np.array([Evil(os.mkdir, str(marker))], dtype=object), allow_pickle=True)
    np.save(tmp_path / "good.npy", np.arange(6, dtype=np.int64).reshape(3, 2))
    check_array_file(tmp_path / "good.npy")
    with pytest.raises(ValueError, match=r"bad\.npy holds object, not integers"):
        check_array_file(tmp_path / "bad.npy")
    assert not marker.exists()
    content = (tmp_path / "good.npy").read_bytes()
    for damaged in (
        content[:-1],
        content.replace(b"(3, 2)", b"(3,-2)"),
        content.replace(b"(3, 2)", b"(9**9)"),
        content.replace(b"(3, 2)", b"(3333)"),
        content.replace(b"'<i8'", b"'<f8'"),
        b"",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
    ):
        (tmp_path / "damaged.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged\.npy"):
            check_array_file(tmp_path / "damaged.npy")


def test_json_lines_that_python_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1: holds a number of more digits than can be read"):
        parse_object(b'{"text": ' + b"9" * 5000 + b"}", "the field 'text'", Path("x"), 1)
    import gzip

    packed = bytearray(gzip.compress(b"".join(json.dumps({"text": str(n)}).encode() + b"\n" for n in range(9000))))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "x.jsonl.gz").write_bytes(bytes(packed))
    with pytest.raises(UserError, match=r"x\.jsonl\.gz"):
        list(read_documents(tmp_path / "x.jsonl.gz", "text"))
