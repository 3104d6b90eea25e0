"""Convert checkpoints: ours to Hugging Face and back, and those of PAI, DeepSpeed and Megatron-LM to ours.

    python tools/convert_checkpoint.py to-hf   --load runs/tiny --output exported
    python tools/convert_checkpoint.py from-hf --hf model-folder --save runs/new
    python tools/convert_checkpoint.py verify  --load runs/tiny --hf exported
    python tools/convert_checkpoint.py inspect runs/tiny        (or a checkpoint, or a Hugging Face folder; --json)
    python tools/convert_checkpoint.py from-pai       --source folder --save runs/new
    python tools/convert_checkpoint.py from-deepspeed --source folder --save runs/new
    python tools/convert_checkpoint.py from-megatron  --source folder --save runs/new

Flags of a command: python tools/convert_checkpoint.py COMMAND --help

to-hf takes the native class of transformers that computes exactly what the model computes (Mixtral, Qwen2-MoE, ...),
or else writes a folder with code of its own; it prints why. Every conversion is proved: a fresh process loads the
folder, nothing may be missing or unexpected, and no logit may be off by more than 1e-4 in float32. A folder appears
under its name only when it is complete and proved; a conversion that was killed goes on with the same command.

An imported run is used like any other: megatron_moe.generate --load, megatron_moe.score --load, and, as it holds
weights alone, megatron_moe.pretrain --config RUN/config.yaml --load RUN --finetune.

Exit codes: 0 done and proved; 2 a mistake in flags or files, or the proof failed; 1 a bug; 130 interrupted.
"""

from collections.abc import Sequence

from megatron_moe.checkpoint.hf import command_line
from megatron_moe.runtime.launch import run_entry_point


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    command_line.main(argv, __doc__ or "")


if __name__ == "__main__":
    run_entry_point(main)
