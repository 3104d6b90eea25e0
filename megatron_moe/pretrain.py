"""Train a GPT with experts.

    python -m megatron_moe.pretrain --recipe tiny-cpu --data-path data/train \\
        --tokenizer-model data/tokenizer/tokenizer.model --save runs/tiny
    torchrun --nproc-per-node 4 -m megatron_moe.pretrain --recipe tiny-cpu --tensor-model-parallel-size 2 ...

    python -m megatron_moe.pretrain --load HF_FOLDER --finetune --data-path ... --save runs/tuned

One process needs no torchrun. --load takes a run's folder, or with --finetune one of Hugging Face, whose model's flags
and tokenizer need not be given. `--dry-run` prints the model and its memory, then stops. On SIGTERM and SIGINT it saves
and leaves with exit code 75: the same command with --load goes on.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_moe.checkpoint.layout import is_hugging_face
from megatron_moe.config.flags import parse_run
from megatron_moe.config.run import RunConfig
from megatron_moe.config.validate import validate
from megatron_moe.config.yaml_io import Values
from megatron_moe.runtime.launch import run_entry_point
from megatron_moe.runtime.signals import STOPPED_CODE


def main(argv: Sequence[str]) -> None:
    """Parse, build, train."""
    prog = "python -m megatron_moe.pretrain"
    run, launch = parse_run(argv, prog=prog, description="Train a GPT with experts.", loaded=flags_of_loaded)
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


def flags_of_loaded(given: Values) -> Values:
    """What --load says of the model, where it is a folder of Hugging Face."""
    folder = given["checkpoint"].get("load")
    if folder is None or not is_hugging_face(folder):
        return {}
    from megatron_moe.checkpoint.hf.loading import flags_of

    return flags_of(Path(folder), given)


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
