"""One screen about a run: how far the loss fell, against what a model without context would reach, and where all lies.

    python tools/summarize_run.py --run runs/tiny --train-prefix data/train --heldout-prefix data/heldout \\
        --tokenizer-model data/tokenizer/tokenizer.model

The bar is the unigram entropy of the held-out text: no model that ignores context can have a lower loss on it. With
--require-margin NATS the command fails unless the last evaluation lies that far below it. Beside it stands what the
token frequencies of the training text reach there, which is what can be learned of them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_moe.config.base import UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.data.command_line import ToolParser, run_tool
from megatron_moe.data.rows import Row, counts, iterate_rows, number, read_rows
from megatron_moe.data.stats import unigram_cross_entropy, unigram_entropy
from megatron_moe.data.tokenizer.load import load_tokenizer


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="a run's --save folder")
    parser.add_argument("--train-prefix", required=True, metavar="PREFIX", help="its training tokens")
    parser.add_argument("--heldout-prefix", required=True, metavar="PREFIX", help="its held-out tokens")
    parser.add_argument("--tokenizer-model", required=True, metavar="FILE", help="the SentencePiece model")
    parser.add_argument("--require-margin", type=float, metavar="NATS", help="fail unless the loss is so far below")
    return parser.parse_tool_args(argv)


def summarize(run: Path, entropy: float, learned: float) -> tuple[list[str], float]:
    """Lines about a run, and the loss of its last evaluation.

    Args:
        run: its folder.
        entropy: unigram entropy of the held-out text, nats.
        learned: cross-entropy of the training text's frequencies on it, nats.

    Raises:
        UserError: the run has no metrics or was never evaluated.
    """
    path = run / "metrics.jsonl"
    rows = read_rows(path)
    steps = [row for row in rows if "lm_loss" in row]
    evaluations = [row for row in rows if "eval_lm_loss" in row]
    if not steps or not evaluations:
        raise UserError(f"--run {run}: was not evaluated; train with --eval-interval")

    def value(row: Row, key: str) -> float:
        return number(row.get(key), f"{key} of step {row['step']}", path)

    first, last, held = steps[0], steps[-1], evaluations[-1]
    # Only every --log-interval-th step has a row.
    minutes = sum(value(row, "step_seconds") for row in steps) / len(steps) * last["step"] / 60
    speeds = sorted(value(row, "tokens_per_second") for row in steps)
    loss = value(held, "eval_lm_loss")
    lines = [
        f"steps            {last['step']}, {value(last, 'consumed_tokens'):,.0f} tokens in about {minutes:.1f} minutes "
        f"(median {speeds[len(speeds) // 2]:,.0f} tokens/s)",
        f"training loss    {value(first, 'lm_loss'):.3f} at step {first['step']} -> "
        f"{value(last, 'lm_loss'):.3f} at the last",
        f"held-out loss    {loss:.3f} nats per token, perplexity {value(held, 'eval_perplexity'):.1f}",
        f"without context  {entropy:.3f} nats per token (unigram entropy of the held-out text; {learned:.3f} by the "
        "training text's frequencies)",
        f"below it by      {entropy - loss:.3f} nats",
    ]
    path_of_loads = run / "expert_load.jsonl"
    for line, load in iterate_rows(path_of_loads):
        if load["step"] == last["step"]:
            layer, tokens = counts(load, f"{path_of_loads} line {line}")
            shares = " ".join(f"{count / max(1, sum(tokens)):.0%}" for count in tokens)
            lines.append(f"experts, layer {layer:<2} {len(tokens)}: {shares} of the last step's tokens")
    return lines, loss


def main(argv: Sequence[str] | None) -> None:
    """Print the summary; fail when the required margin is missed."""
    flags = _parse(argv)
    tokenizer = load_tokenizer(DataConfig(tokenizer_model=flags.tokenizer_model))
    entropy = unigram_entropy(flags.heldout_prefix, tokenizer.vocab_size)
    learned = unigram_cross_entropy(flags.train_prefix, flags.heldout_prefix, tokenizer.vocab_size)
    lines, loss = summarize(flags.run, entropy, learned)
    print("\n".join(lines))
    if flags.require_margin is not None and loss > entropy - flags.require_margin:
        raise UserError(
            f"--require-margin {flags.require_margin}: the held-out loss {loss:.3f} is not that far below "
            f"{entropy:.3f}; train longer"
        )


if __name__ == "__main__":
    run_tool(main)
