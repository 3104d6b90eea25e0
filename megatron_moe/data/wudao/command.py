"""The command line of `tools/clean_wudao.py`."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import get_args

from megatron_moe.config.base import UserError
from megatron_moe.data.command_line import ToolParser, add_workers
from megatron_moe.data.wudao.distributed import SlurmOptions, run_ray, submit_slurm
from megatron_moe.data.wudao.executors import TaskFailedError, run_local
from megatron_moe.data.wudao.job import Job, Settings, create_job
from megatron_moe.data.wudao.reader import ReadOptions
from megatron_moe.data.wudao.recipe import load_recipe
from megatron_moe.data.wudao.recipe_file import recipe_names
from megatron_moe.data.wudao.report import read_report, summary
from megatron_moe.data.wudao.shards import Compression
from megatron_moe.data.wudao.stages import tidy
from megatron_moe.data.wudao.tasks import PAGE

DONE, FAILED, QUARANTINED = 0, 1, 3
_DEDUP = {
    "none": ("near_dedup=off", "exact_dedup=off"),
    "exact": ("near_dedup=off", "exact_dedup=on"),
    "near": ("near_dedup=on", "exact_dedup=on"),
}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# A task must hold many records, a record must fit in memory several times.
_LEAST_RANGE, _MOST_RECORD = 1 << 16, 1 << 30


def main(argv: Sequence[str] | None, doc: str | None) -> int:
    """Parse the command line, clean, and say what was done.

    Returns:
        The exit code.
    """
    args = _parse(argv, doc)
    if args.list_recipes or args.show_recipe:
        print("\n".join(recipe_names()) if args.list_recipes else _recipe_text(args.show_recipe))
        return DONE
    job, finished = create_job(args.input, args.output, _settings(args), overwrite=args.overwrite)
    if finished:
        # A kill right after the report may have left them.
        tidy(job)
        print(f"{args.output}: finished before, nothing to do (--overwrite starts anew)")
    else:
        try:
            if args.executor == "slurm":
                return _submit(job, args)
            if args.executor == "ray":
                run_ray(job, args.workers, args.ray_address)
            else:
                run_local(job, args.workers)
        except TaskFailedError as error:
            if args.debug:
                raise
            print(f"error: {error}", file=sys.stderr)
            return FAILED
    return _say(job, args.output)


def _submit(job: Job, args: argparse.Namespace) -> int:
    arguments = dict(word.removeprefix("--").split("=", 1) for word in args.slurm_args)
    options = SlurmOptions(args.slurm_partition, args.slurm_time, args.slurm_memory_gb, args.slurm_qos, arguments)
    for stage, number in submit_slurm(job, args.workers, options):
        print(f"stage {stage}: Slurm job {number}")
    print(f"{args.output / PAGE} is there when the last one ends; the same command then says what was done")
    return DONE


def _say(job: Job, output: Path) -> int:
    report = read_report(job.output)
    print(summary(report))
    print(f"{output / PAGE}: what each rule did")
    if not report["quarantine"]["entries"]:
        return DONE
    if not report["read"]["documents"]:
        print(
            f"error: nothing could be read: see {report['quarantine']['file']}; is --text-key right?", file=sys.stderr
        )
    return QUARANTINED


def _parse(argv: Sequence[str] | None, doc: str | None) -> argparse.Namespace:
    parser = ToolParser(doc)
    add = parser.add_argument
    add(
        "--input",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="files or folders, in order; .json .jsonl .parquet, .gz .zst",
    )
    add("--output", type=Path, metavar="DIR", help="an empty or new folder, or one where this job was begun")
    add("--recipe", default="wudao-default", metavar="NAME|FILE", help="the rules (default %(default)s)")
    add("--list-recipes", action="store_true", help="print the names of the recipes and exit")
    add("--show-recipe", metavar="NAME", help="print a recipe, to be changed and given as a file, and exit")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SETTING",
        dest="changes",
        help="change the recipe: length.least=50, language=off, title=on, record.keep=[id], ...",
    )
    add("--dedup", choices=sorted(_DEDUP), help="what duplicates to drop; near includes exact (default: the recipe's)")
    add("--decontaminate", nargs="+", metavar="FILE", help="evaluation sets whose text no document may hold")
    add(
        "--word-list",
        metavar="FILE",
        help="documents full of these words are dropped: sensitive_words.file of the recipe",
    )
    add("--advertising", metavar="FILE", help="sentences with these words are cut out: advertising.file of the recipe")
    add("--text-key", default="content", metavar="KEY", help="field with the text (default %(default)s)")
    add("--title-key", default="title", metavar="KEY", help="field with the title (default %(default)s)")
    add("--compression", choices=get_args(Compression), default="zst", help="of the shards (default %(default)s)")
    add("--overwrite", action="store_true", help="delete what another job has written into --output, and start anew")
    add(
        "--range-size",
        type=_size,
        default=256 << 20,
        metavar="BYTES",
        help="cut plain files and Parquet into tasks of about this size; K M G allowed (default 256M)",
    )
    add(
        "--longest-record",
        type=_size,
        default=16 << 20,
        metavar="BYTES",
        help="longer records go to the quarantine, which bounds memory (default 16M)",
    )
    add_workers(parser)
    add("--executor", choices=("local", "slurm", "ray"), default="local", help="where tasks run (default %(default)s)")
    add("--ray-address", metavar="ADDRESS", help="a Ray cluster; by default Ray is started on this machine")
    add("--slurm-partition", default="", metavar="NAME", help="needed for --executor slurm")
    add("--slurm-time", default="24:00:00", metavar="TIME", help="limit of each array job (default %(default)s)")
    add("--slurm-memory-gb", type=int, default=4, metavar="N", help="memory of each task (default %(default)s)")
    add("--slurm-qos", default="", metavar="NAME", help="quality of service")
    add("--slurm-args", nargs="+", default=[], metavar="NAME=VALUE", help="further flags of sbatch: account=lab")
    args = parser.parse_tool_args(argv)
    if not (args.list_recipes or args.show_recipe):
        for flag in ("input", "output"):
            if not getattr(args, flag):
                parser.error(f"--{flag} is missing")
    for word in args.slurm_args:
        if "=" not in word:
            parser.error(f"--slurm-args {word}: must be NAME=VALUE")
    if args.range_size < _LEAST_RANGE:
        parser.error(f"--range-size {args.range_size}: must be at least {_LEAST_RANGE}")
    if not 1 <= args.longest_record <= _MOST_RECORD:
        parser.error(f"--longest-record {args.longest_record}: must be between 1 and {_MOST_RECORD}")
    return args


def _size(word: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})([KMG]?)B?", word, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{word}: must be a number of bytes, such as 256M")
    return int(match[1]) * _UNITS[match[2].upper()]


def _settings(args: argparse.Namespace) -> Settings:
    changes = list(_DEDUP[args.dedup]) if args.dedup else []
    changes += args.changes
    for option, flag, files in (
        ("sensitive_words.file", "--word-list", [args.word_list] if args.word_list else []),
        ("advertising.file", "--advertising", [args.advertising] if args.advertising else []),
        ("decontamination.files", "--decontaminate", args.decontaminate or []),
    ):
        paths = [_existing(flag, file) for file in files]
        if paths:
            changes.append(f"{option}={_yaml(paths if option.endswith('files') else paths[0])}")
    recipe = args.recipe
    if recipe not in recipe_names() and Path(recipe).is_file():
        recipe = str(Path(recipe).resolve())
    if args.text_key == args.title_key:
        raise UserError(f"--title-key {args.title_key}: is --text-key too; give another field")
    reading = ReadOptions(args.text_key, args.title_key, args.longest_record)
    return Settings(recipe, tuple(changes), reading, args.range_size, args.compression, str(Path.cwd()))


def _recipe_text(name: str) -> str:
    """A recipe of the package as it stands in its file."""
    load_recipe(name)
    path = resources.files("megatron_moe.data.wudao") / "recipes" / f"{name}.yaml"
    return (path if path.is_file() else Path(name)).read_text(encoding="utf-8").rstrip()


def _existing(flag: str, file: str) -> str:
    if not Path(file).is_file():
        raise UserError(f"{flag} {file}: no such file")
    return str(Path(file).resolve())


def _yaml(value: object) -> str:
    """A value as YAML on one line: JSON is."""
    return json.dumps(value, ensure_ascii=False)
