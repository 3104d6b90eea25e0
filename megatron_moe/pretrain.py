"""Train a GPT with experts.

    python -m megatron_moe.pretrain --recipe tiny-cpu --data-path data/train \\
        --tokenizer-model data/tokenizer/tokenizer.model --save runs/tiny
    torchrun --nproc-per-node 4 -m megatron_moe.pretrain --recipe tiny-cpu --tensor-model-parallel-size 2 ...

One process needs no torchrun. `--dry-run` prints the model and its memory, then stops. On SIGTERM and SIGINT it saves
and leaves with exit code 75: the same command with --load goes on.
"""

from collections.abc import Sequence

from megatron_moe.config.flags import parse_run
from megatron_moe.config.run import RunConfig
from megatron_moe.config.validate import validate
from megatron_moe.runtime.launch import run_entry_point
from megatron_moe.runtime.signals import STOPPED_CODE


def main(argv: Sequence[str]) -> None:
    """Parse, build, train."""
    run, launch = parse_run(argv, prog="python -m megatron_moe.pretrain", description="Train a GPT with experts.")
    # torch is imported below: --help and wrong flags answer at once.
    from megatron_moe.runtime.distributed import environment_rank, environment_world_size, start, stop

    if launch.dry_run:
        if environment_rank() == 0:
            print(describe(run, launch.world_size or environment_world_size()))
        return
    validate(run, environment_world_size())
    world = start(run.parallel, run.virtual_stages)
    from megatron_moe.training.loop import Trainer

    received = Trainer.build(run, world).train()
    if received is not None:
        stop()
        raise SystemExit(STOPPED_CODE if run.checkpoint.save else 128 + received)


def describe(run: RunConfig, world_size: int) -> str:
    """What --dry-run prints; the vocabulary comes from the tokenizer where --vocab-size is not given."""
    from megatron_moe.data.tokenizer.load import load_tokenizer, with_vocab_size
    from megatron_moe.model.dry_run import report
    from megatron_moe.model.meta import count_on_meta

    if run.model.vocab_size is None and run.data.tokenizer_model is not None:
        run = with_vocab_size(run, load_tokenizer(run.data))
    # Raises on a run that is not valid, before anything is built.
    report(run, world_size)
    return report(run, world_size, count_on_meta(run))


if __name__ == "__main__":
    run_entry_point(main)
