"""Loss and perplexity of a trained model on token files.

    python -m megatron_moe.evaluate --load runs/tiny --data-path data/heldout
    torchrun --nproc-per-node 2 -m megatron_moe.evaluate --load runs/tiny --data-path data/heldout data/other \\
        --expert-model-parallel-size 2 --output evaluation.json

Every token of the files is read once, in sequences of the run's --seq-length.
"""

import json
from collections.abc import Sequence

from megatron_moe.config.flags import parse_sections
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.inference.options import EvaluateOptions, LoadOptions
from megatron_moe.runtime.launch import run_entry_point

SECTIONS = {"checkpoint": LoadOptions, "evaluation": EvaluateOptions, "parallel": ParallelConfig}


def main(argv: Sequence[str]) -> None:
    """Parse, load, evaluate, print and write."""
    flags, _ = parse_sections(
        argv,
        SECTIONS,
        prog="python -m megatron_moe.evaluate",
        description="Loss and perplexity of a trained model on token files.",
        example="python -m megatron_moe.evaluate --load runs/tiny --data-path data/heldout",
    )
    options: EvaluateOptions = flags["evaluation"]
    # torch is imported below: --help and wrong flags answer at once.
    from megatron_moe.inference.evaluation_data import combine, open_data
    from megatron_moe.inference.output import check_output, write_text
    from megatron_moe.inference.saved_model import open_checkpoint
    from megatron_moe.runtime.distributed import environment_world_size

    saved = open_checkpoint(flags["checkpoint"], flags["parallel"], environment_world_size())
    files = open_data(options.data_path, saved.vocab_size)
    if options.output is not None:
        check_output(options.output)
    from megatron_moe.inference.evaluation import evaluate_files
    from megatron_moe.inference.model import load_saved

    model = load_saved(saved)
    results = evaluate_files(model, files, micro_batch_size=options.micro_batch_size, eval_iters=options.eval_iters)
    total = combine(results)
    if not model.is_main:
        return
    for result in [*results, total] if len(results) > 1 else results:
        row = result.as_dict()
        print(f"{row['prefix']}: {row['tokens']} tokens, loss {row['loss']:.4f}, perplexity {row['perplexity']:.2f}")
    if options.output is not None:
        report = {
            "checkpoint": str(saved.folder),
            "seq_length": saved.run.model.seq_length,
            **{name: value for name, value in total.as_dict().items() if name != "prefix"},
            "data": [result.as_dict() for result in results],
        }
        write_text(options.output, [json.dumps(report, indent=1, ensure_ascii=False) + "\n"])


if __name__ == "__main__":
    run_entry_point(main)
