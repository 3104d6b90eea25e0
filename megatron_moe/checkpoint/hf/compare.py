"""`verify`: whether a Hugging Face folder and a run are the same model. Every weight is compared, then the logits."""

from collections.abc import Iterator
from pathlib import Path

from megatron_moe.checkpoint.convert.blocks import Block, Box
from megatron_moe.checkpoint.convert.coverage import check_coverage
from megatron_moe.checkpoint.convert.engine import Targets, assemble, check_fills
from megatron_moe.checkpoint.convert.ours_reader import OursSource
from megatron_moe.checkpoint.convert.ranges import split
from megatron_moe.checkpoint.convert.tensors import TensorSource
from megatron_moe.checkpoint.hf.families.native import is_left_out
from megatron_moe.checkpoint.hf.inspect import parameters_of_dtype, read_config
from megatron_moe.checkpoint.hf.options import VerifyOptions
from megatron_moe.checkpoint.hf.own_code import needs_code
from megatron_moe.checkpoint.hf.targets import family_of
from megatron_moe.checkpoint.hf.verify import prove
from megatron_moe.checkpoint.hf.weight_files import RenamedSource, open_files
from megatron_moe.checkpoint.layout import CONFIG_FILE
from megatron_moe.config.base import UserError
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.yaml_io import load_saved_run
from megatron_moe.inference.options import LoadOptions
from megatron_moe.inference.saved_model import open_checkpoint

_AT_ONCE = 16 << 20


def verify_hf(options: VerifyOptions, *, debug: bool = False) -> Iterator[str]:
    """Compare a folder with a run.

    Yields:
        Lines that say what was found equal.

    Raises:
        UserError: something is missing, damaged or different.
    """
    folder = Path(options.hf)
    config = read_config(folder)
    saved = open_checkpoint(
        LoadOptions(load=options.load, iteration=options.iteration), ParallelConfig(device="cpu"), 1
    )
    run = load_saved_run(saved.folder / CONFIG_FILE)
    try:
        family = family_of(config)
    except UserError as error:
        raise UserError(f"--hf {folder}: {error}") from error
    remote_code = needs_code(config)
    theirs, ours = open_files(folder, family, run), OursSource(saved.folder)
    blocks = family.blocks(run)
    check_coverage(blocks, ours.infos, theirs.infos, ours_in=str(saved.folder), theirs_in=str(folder))
    check_fills(blocks, theirs)
    theirs.check_tied()
    compared, differing = compare_weights(blocks, ours, theirs)
    if differing:
        name, numbers, largest = differing[0]
        raise UserError(
            f"--hf {folder}: {name} differs from the run in {numbers} numbers, by up to {largest:.2e} "
            f"({len(differing)} of {compared} tensors differ); export the run again"
        )
    yield f"{compared} tensors of {folder} hold the same numbers as {saved.folder}"
    dtype = next(iter(parameters_of_dtype(theirs.infos)))
    proof = prove(
        saved,
        folder,
        dtype=dtype,
        left_out=lambda key: is_left_out(family, run, key),
        remote_code=remote_code,
        debug=debug,
    )
    yield from proof.lines()


def compare_weights(
    blocks: list[Block], ours: TensorSource, theirs: RenamedSource
) -> tuple[int, list[tuple[str, int, float]]]:
    """How many of their tensors were compared, and those that are not ours: name, numbers that differ, by how much.

    Ours are rounded to the type of theirs, as an export does.
    """
    targets = Targets(blocks, "theirs")
    differing = []
    for name, info in theirs.infos.items():
        numbers, largest = 0, 0.0
        for start, size in split(info.shape, _AT_ONCE):
            box = Box(name, start, size)
            expected, found = assemble(targets, box, ours, info.dtype), theirs.read(box)
            unequal = expected != found
            # What is no number on both sides is the same.
            unequal &= ~((expected != expected) & (found != found))
            if bool(unequal.any()):
                numbers += int(unequal.sum())
                largest = max(largest, float((expected.double() - found.double()).abs()[unequal].max()))
        if numbers:
            differing.append((name, numbers, largest))
    return len(theirs.infos), differing
