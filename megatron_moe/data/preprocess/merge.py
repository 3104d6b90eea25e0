"""Several pairs put together into one, of any size: nothing is held in memory, and all is counted in 64 bits."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_moe import __version__
from megatron_moe.config.base import UserError
from megatron_moe.data.command_line import byte_progress
from megatron_moe.data.domains import Domains, DomainsWriter, check_same_names, has_domains, read_domains
from megatron_moe.data.files import atomic_write
from megatron_moe.data.indexed import CODE_OF_DTYPE, IndexHeader, bin_path, idx_path, read_header
from megatron_moe.data.indexed_stream import PairReader
from megatron_moe.data.indexed_writer import IndexedWriter
from megatron_moe.data.preprocess.report import find_report, read_report, report_path
from megatron_moe.data.preprocess.workspace import open_workspace

# How `merge` names its inputs in errors: they have no flag.
_FLAG = "merge"
# Documents whose domains are copied at a time.
_BLOCK = 1 << 22
# Options that two pairs of one set share; one of another tokenizer would be noise to a model.
_SAME = ("tokenizer_fingerprint", "vocab_size", "eod")


def expand_prefixes(paths: Sequence[Path], command: str) -> list[Path]:
    """Prefixes as they are, and folders replaced by the pairs in them, in the order of their names.

    Raises:
        UserError: a folder without a pair, or a pair named twice.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir() and not idx_path(path).exists():
            inside = sorted(index.with_suffix("") for index in path.glob("*.idx"))
            if not inside:
                raise UserError(f"{command} {path}: no pair (.bin and .idx) in this folder")
            found += inside
        else:
            found.append(path)
    for place, path in enumerate(found):
        if path in found[:place]:
            raise UserError(f"{command} {path}: is given twice")
    return found


def merge(paths: Sequence[Path], output_prefix: Path, progress: bool | None = None) -> IndexHeader:
    """Write the documents of several pairs, one after the other, as one pair.

    Args:
        paths: prefixes in order, or folders of pairs.
        output_prefix: the new pair.
        progress: show a bar on stderr; None: if it is a terminal.

    Raises:
        UserError: a pair is missing or damaged, or they do not go together.
    """
    prefixes = expand_prefixes(paths, _FLAG)
    if output_prefix.resolve() in [prefix.resolve() for prefix in prefixes]:
        raise UserError(f"--output-prefix {output_prefix}: is one of the pairs that are merged")
    headers = [read_header(prefix, _FLAG) for prefix in prefixes]
    _check_together(prefixes, headers)
    domains = _common_domains(prefixes, headers)
    options = _common_options(prefixes)
    total = sum(bin_path(prefix).stat().st_size for prefix in prefixes)
    work = {"merge": [str(prefix) for prefix in prefixes]}
    with (
        open_workspace(output_prefix, work, str(bin_path(output_prefix))) as workspace,
        byte_progress(total, "merging", progress) as bar,
        DomainsWriter(output_prefix, workspace.folder) as domains_writer,
    ):
        with IndexedWriter(output_prefix, headers[0].dtype, scratch=workspace.folder) as writer:
            _copy_pairs(prefixes, writer, bar)
            domains_writer.discard_old()
        for source in domains:
            for start in range(0, len(source.ids), _BLOCK):
                domains_writer.add(source.ids[start : start + _BLOCK])
        if domains:
            domains_writer.publish(domains[0].names)
    merged = IndexHeader(headers[0].dtype, writer.sequences, writer.documents, multimodal=False)
    content = {
        "megatron_moe": __version__,
        "options": options,
        "merged": [str(prefix) for prefix in prefixes],
        "outputs": [
            {
                "prefix": str(output_prefix),
                "documents": writer.documents,
                "sequences": writer.sequences,
                "tokens": writer.tokens,
            }
        ],
    }
    atomic_write(report_path(output_prefix), json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return merged


def _copy_pairs(prefixes: Sequence[Path], writer: IndexedWriter, bar: Any) -> None:
    for prefix in prefixes:
        with PairReader(prefix, _FLAG) as pair:
            before = writer.sequences
            for lengths in pair.lengths():
                try:
                    writer.add_sequences(pair.tokens, lengths)
                except EOFError as error:
                    raise UserError(f"{_FLAG} {prefix}: {bin_path(prefix)} was cut short ({error})") from error
                bar.update(int(lengths.sum(dtype="int64")) * pair.header.dtype.itemsize)
            for ends in pair.document_ends():
                writer.add_marks(before + ends)


def _common_domains(prefixes: Sequence[Path], headers: Sequence[IndexHeader]) -> list[Domains]:
    """The domains of all pairs; none where no pair has any."""
    without = [prefix for prefix in prefixes if not has_domains(prefix)]
    if len(without) == len(prefixes):
        return []
    if without:
        other = next(prefix for prefix in prefixes if prefix not in without)
        raise UserError(f"{_FLAG} {without[0]}: has no domains, but {other} has; write both with --domain-key FIELD")
    pairs = zip(prefixes, headers, strict=True)
    domains = [read_domains(prefix, header.documents, _FLAG) for prefix, header in pairs]
    check_same_names(domains, _FLAG)
    return domains


def _check_together(prefixes: Sequence[Path], headers: Sequence[IndexHeader]) -> None:
    first = headers[0]
    for prefix, header in zip(prefixes, headers, strict=True):
        if header.dtype not in CODE_OF_DTYPE:
            raise UserError(f"{_FLAG} {prefix}: stores {header.dtype}; only uint16 and int32 pairs can be merged")
        if header.multimodal:
            raise UserError(f"{_FLAG} {prefix}: is a multimodal pair, which this tool does not merge")
        if header.dtype != first.dtype:
            raise UserError(
                f"{_FLAG} {prefix}: stores {header.dtype}, but {prefixes[0]} stores {first.dtype}; merge pairs of one "
                "tokenizer"
            )


def _common_options(prefixes: Sequence[Path]) -> dict[str, Any] | None:
    """What the reports beside the pairs say of their tokenizer; None where one of them has no report."""
    known = [(prefix, options) for prefix in prefixes if (options := _options(prefix)) is not None]
    for prefix, options in known:
        for name in _SAME:
            if options.get(name) != known[0][1].get(name):
                raise UserError(
                    f"{_FLAG} {prefix}: was made with another tokenizer than {known[0][0]} ({name} "
                    f"{options.get(name)}, not {known[0][1].get(name)}, say their reports)"
                )
    return {name: known[0][1].get(name) for name in _SAME} if len(known) == len(prefixes) else None


def _options(prefix: Path) -> dict[str, Any] | None:
    path = find_report(prefix)
    if path is None:
        return None
    options = read_report(path)["options"]
    return options if isinstance(options, dict) else None
