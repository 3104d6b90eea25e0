"""Write the log-probability that a trained model gives every token of a file.

    python -m megatron_moe.score --load runs/tiny --input texts.jsonl --output scores.jsonl
    torchrun --nproc-per-node 2 -m megatron_moe.score --load runs/tiny --input texts.jsonl --output scores.jsonl \\
        --pipeline-model-parallel-size 2

A line of the input is a JSON object with `text`, or with `ids`, and, for a model that knows domains, with `domain` (or
--domain says it for all). Its line of the output holds ids, logprobs (natural
logarithms, one per token after the first), their sum and mean, and perplexity = exp(-mean). To score a text's first
token as well, give ids that begin with the end-of-document token. Probabilities are those of the training loss: they
sum to 1 over the padded vocabulary (--make-vocab-size-divisible-by).
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_moe.config.flags import parse_sections
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.inference.options import LoadOptions, ScoreOptions
from megatron_moe.runtime.launch import run_entry_point

SECTIONS = {"checkpoint": LoadOptions, "scoring": ScoreOptions, "parallel": ParallelConfig}


def main(argv: Sequence[str]) -> None:
    """Parse, load, score, write."""
    flags, _ = parse_sections(
        argv,
        SECTIONS,
        prog="python -m megatron_moe.score",
        description="Write the log-probability that a trained model gives every token of a file.",
        example="python -m megatron_moe.score --load runs/tiny --input texts.jsonl --output scores.jsonl",
    )
    options: ScoreOptions = flags["scoring"]
    # torch is imported below: --help, wrong flags and wrong lines answer at once.
    from megatron_moe.inference.domains import text_domains
    from megatron_moe.inference.output import check_output, json_line, write_text
    from megatron_moe.inference.saved_model import open_checkpoint
    from megatron_moe.inference.score_file import perplexity, read_sequences, score_row
    from megatron_moe.runtime.distributed import environment_world_size

    saved = open_checkpoint(flags["checkpoint"], flags["parallel"], environment_world_size())
    sequences = read_sequences(Path(options.input), saved.tokenizer, saved.vocab_size, saved.max_positions)
    domains = text_domains(len(sequences), saved.run.model, options.domain, options.input)
    check_output(options.output, options.input)
    from megatron_moe.inference.model import load_saved
    from megatron_moe.inference.scoring import score_sequences

    model = load_saved(saved)
    scores = score_sequences(model, sequences, options.micro_batch_size, domains)
    if not model.is_main:
        return
    rows = [score_row(ids, logprobs) for ids, logprobs in zip(sequences, scores, strict=True)]
    write_text(options.output, map(json_line, rows))
    tokens = sum(len(logprobs) for logprobs in scores)
    loss = -sum(row["sum"] for row in rows) / tokens
    print(
        f"scored {len(rows)} sequences, {tokens} tokens by {saved.folder}: loss {loss:.4f}, "
        f"perplexity {perplexity(loss):.2f}; wrote {options.output}"
    )


if __name__ == "__main__":
    run_entry_point(main)
