"""The files of the sample: documents a line for training and held out, and the same as parts shaped like WuDao's."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config.base import UserError
from megatron_moe.data.files import atomic_file
from megatron_moe.data.sample.registry import fetch, sha256
from megatron_moe.data.sample.sources import SampleDocument, Source, extract

TRAIN, HELDOUT, MANIFEST = "train.jsonl", "heldout.jsonl", "sample.json"
_HELDOUT_MODULUS = 50
_PART_BYTES = 16 << 20


@dataclass(frozen=True)
class _Entry:
    source: Source
    document: SampleDocument


def is_heldout(text: str) -> bool:
    """Whether a document belongs to the held-out set: one in 50, by its content alone."""
    return int(_md5(text), 16) % _HELDOUT_MODULUS == 0


def write_sample(output_dir: Path, cache_dir: Path, sources: Sequence[Source]) -> None:
    """Download, split and write the sample; print what was made. A complete one is left as it is.

    Writes train.jsonl and heldout.jsonl ({"text", "dataType"} a line, in the order of the sources), wudao/part-*.json
    (the training documents again, as WuDao has them and mixed), and sample.json, which says where they come from.

    Raises:
        UserError: see `fetch` and `extract`, or the folder cannot be written.
    """
    pinned = {source.filename: source.sha256 for source in sources}
    wanted = [source.name for source in sources]
    if _is_complete(output_dir, pinned, wanted):
        print(f"{output_dir}: the sample is there already")
        return
    archives = {source.filename: fetch(source, cache_dir) for source in sources}
    parts: dict[bool, list[_Entry]] = {False: [], True: []}
    for source in sources:
        for document in extract(source, archives[source.filename]):
            parts[is_heldout(document.text)].append(_Entry(source, document))
    for stale in sorted((output_dir / "wudao").glob("part-*.json")):
        stale.unlink()
    written = {
        TRAIN: _write_lines(output_dir, TRAIN, parts[False]),
        HELDOUT: _write_lines(output_dir, HELDOUT, parts[True]),
        **_write_wudao(output_dir, parts[False]),
    }
    manifest = json.dumps({"sources": pinned, "names": wanted, "files": written}, indent=1) + "\n"
    with atomic_file(output_dir / MANIFEST, f"--output-dir {output_dir}") as stream:
        stream.write(manifest.encode())


def _write_lines(output_dir: Path, name: str, entries: Sequence[_Entry]) -> dict[str, object]:
    with atomic_file(output_dir / name, f"--output-dir {output_dir}") as stream:
        for entry in entries:
            record = {"text": entry.document.text, "dataType": entry.source.kind}
            stream.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
    return _describe(output_dir / name, len(entries))


def _write_wudao(output_dir: Path, entries: Sequence[_Entry]) -> dict[str, dict[str, object]]:
    """JSON arrays of about 16 MiB. Documents stand in the order of their hashes, so that each part is a fair mix."""
    records = [_wudao_record(entry) for entry in entries]
    records.sort(key=lambda record: str(record["uniqueKey"]))
    described: dict[str, dict[str, object]] = {}
    start = 0
    while start < len(records):
        lines: list[bytes] = []
        size = 0
        while start < len(records) and size < _PART_BYTES:
            line = json.dumps({"id": start + 1, **records[start]}, ensure_ascii=False).encode("utf-8")
            lines.append(line)
            size += len(line)
            start += 1
        name = f"wudao/part-{len(described):05d}.json"
        with atomic_file(output_dir / name, f"--output-dir {output_dir}") as stream:
            stream.write(b"[" + b",\n".join(lines) + b"]\n")
        described[name] = _describe(output_dir / name, len(lines))
    return described


def _wudao_record(entry: _Entry) -> dict[str, object]:
    document = entry.document
    return {
        "uniqueKey": _md5(document.text),
        "titleUkey": _md5(document.title),
        "dataType": entry.source.kind,
        "title": document.title,
        "content": document.content,
    }


def _describe(path: Path, documents: int) -> dict[str, object]:
    print(f"{path}: {documents:,} documents, {path.stat().st_size / 1e6:.2f} MB")
    return {"documents": documents, "sha256": sha256(path)}


def _is_complete(output_dir: Path, pinned: dict[str, str], names: Sequence[str]) -> bool:
    manifest = output_dir / MANIFEST
    if not manifest.is_file():
        return False
    try:
        made = json.loads(manifest.read_text(encoding="utf-8"))
        files = {name: entry["sha256"] for name, entry in made["files"].items()}
        same = made["sources"] == pinned and made.get("names") == list(names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest}: not a manifest of this tool ({error}); delete it and try again") from error
    return same and all((output_dir / name).is_file() and sha256(output_dir / name) == files[name] for name in files)


def _md5(text: str) -> str:
    return hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest()
