"""Continue prompts with a trained model.

    python -m megatron_moe.generate --load runs/tiny --prompt 北京 今天
    python -m megatron_moe.generate --load runs/tiny --prompt-file prompts.jsonl --output continued.jsonl --top-p 0.9
    torchrun --nproc-per-node 2 -m megatron_moe.generate --load runs/tiny --prompt 北京 --tensor-model-parallel-size 2

The checkpoint may have been written under any parallel layout. A prompt file whose name ends in .jsonl holds JSON
objects with a field `text`; any other holds one prompt a line. The output is JSON Lines: prompt, sample (its number
when there are several), text, ids (the new tokens) and finish_reason (`stop` at an end of document, or `length`).
"""

from collections.abc import Sequence

from megatron_moe.config.flags import parse_sections
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.inference.options import GenerateOptions, LoadOptions, SamplingOptions
from megatron_moe.runtime.launch import run_entry_point

SECTIONS = {
    "checkpoint": LoadOptions,
    "generation": GenerateOptions,
    "sampling": SamplingOptions,
    "parallel": ParallelConfig,
}


def main(argv: Sequence[str]) -> None:
    """Parse, load, generate, write."""
    flags, _ = parse_sections(
        argv,
        SECTIONS,
        prog="python -m megatron_moe.generate",
        description="Continue prompts with a trained model.",
        example="python -m megatron_moe.generate --load runs/tiny --prompt 北京 --greedy",
    )
    options: GenerateOptions = flags["generation"]
    # torch is imported below: --help and wrong flags answer at once.
    from megatron_moe.inference.domains import text_domains
    from megatron_moe.inference.output import check_output, json_line, write_text
    from megatron_moe.inference.prompts import (
        JSON_LINES,
        check_lengths,
        continuation_text,
        describe,
        encode_prompts,
        read_prompts,
    )
    from megatron_moe.inference.saved_model import open_checkpoint
    from megatron_moe.runtime.distributed import environment_world_size

    saved = open_checkpoint(flags["checkpoint"], flags["parallel"], environment_world_size())
    texts = read_prompts(options)
    prompts = encode_prompts(texts, saved.tokenizer)
    check_lengths(prompts, options.max_new_tokens, saved.max_positions)
    rows_file = options.prompt_file if (options.prompt_file or "").endswith(JSON_LINES) else None
    domains = text_domains(len(prompts), saved.run.model, options.domain, rows_file)
    if options.output is not None:
        check_output(options.output, options.prompt_file or "")
    from megatron_moe.inference.generation import generate
    from megatron_moe.inference.model import load_saved

    model = load_saved(saved)
    completions = generate(
        model,
        prompts,
        flags["sampling"],
        max_new_tokens=options.max_new_tokens,
        num_samples=options.num_samples,
        micro_batch_size=options.micro_batch_size,
        kv_cache=options.kv_cache,
        domains=domains,
    )
    if not model.is_main:
        return
    rows = [
        {
            "prompt": texts[done.prompt],
            "sample": done.sample,
            "text": continuation_text(saved.tokenizer, prompts[done.prompt], done.ids),
            "ids": done.ids,
            "finish_reason": done.finish_reason,
        }
        for done in completions
    ]
    if options.output is None:
        print("\n".join(describe(row) for row in rows))
    else:
        write_text(options.output, map(json_line, rows))
        print(f"wrote {len(rows)} continuations by {saved.folder} to {options.output}")


if __name__ == "__main__":
    run_entry_point(main)
