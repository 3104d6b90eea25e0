"""Train a GPT with experts.

    python -m megatron_moe.pretrain --recipe tiny-cpu --data-path data/sample --tokenizer-model data/bpe.model \\
        --save runs/tiny
    torchrun --nproc-per-node 4 -m megatron_moe.pretrain --recipe tiny-cpu --tensor-model-parallel-size 2 ...

One process needs no torchrun. `--dry-run` prints the model and its memory, then stops.
"""

from collections.abc import Sequence

from megatron_moe.config.flags import parse_run
from megatron_moe.config.validate import validate
from megatron_moe.runtime.launch import run_entry_point


def main(argv: Sequence[str]) -> None:
    """Parse, build, train."""
    run, launch = parse_run(argv, prog="python -m megatron_moe.pretrain", description="Train a GPT with experts.")
    # torch is imported below: --help and wrong flags answer at once.
    from megatron_moe.runtime.distributed import environment_world_size, print_main, start

    if launch.dry_run:
        from megatron_moe.model.dry_run import report

        print_main(report(run, launch.world_size or environment_world_size()))
        return
    validate(run, environment_world_size())
    world = start(run.parallel, run.virtual_stages)
    from megatron_moe.training.loop import Trainer

    Trainer.build(run, world).train()


if __name__ == "__main__":
    run_entry_point(main)
