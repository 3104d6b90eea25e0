"""Every router on the same small Chinese corpus: held-out loss at equal steps, load variation, tokens per second.

    python tools/fetch_sample_corpus.py --sources all --output-dir data
    python benchmarks/routers.py --corpus data --output runs/routers
    python benchmarks/routers.py --corpus data --output runs/routers --routers topk hash --seeds 1

Four kinds of text (news, reviews, poetry, novel) take equal turns; the kind is the domain of `random-routed`. A seed
draws the weights and the order of the text, and every router gets the same ones, so that differences to `topk` are
taken seed by seed. Losses are of held-out text, the same for all. Load numbers are of the last fifth of the steps.

Speed is measured afterwards, on all cores: the routers take turns step by step, so that whatever else the machine does
falls on all of them. A second call goes on where the first one stopped.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron_moe.config.data import DataConfig
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import build_run
from megatron_moe.runtime.quiet import silence_third_party_warnings

DOMAINS = ("新闻", "评论", "诗词", "小说")
UNCOUNTED = 2

MODEL: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 4,
        "hidden_size": 128,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "seq_length": 128,
        "position_embedding_type": "rope",
        "init_method_std": 0.04,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    },
    "moe": {"num_experts": (8, 8, 16, 16)},
    "parallel": {"device": "cpu"},
    "training": {"micro_batch_size": 4, "global_batch_size": 4},
    "optimizer": {"lr": 8e-4, "min_lr": 8e-5, "weight_decay": 0.1},
    "logging": {"progress": "off", "tensorboard": False, "log_interval": 20},
}
FULL = {"moe_expert_capacity_factor": 1.0}
MARGIN = {"router": "large-margin"}
BALANCED = {"router_map": "balanced"}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"num_experts": None},
    "topk": {},
    "topk, no balancing": {"moe_router_load_balancing_type": "none"},
    "topk, sinkhorn": {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0},
    "topk, sigmoid and expert bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_load_balancing_type": "none",
        "moe_router_enable_expert_bias": True,
    },
    "topk, RSample": {"moe_router_noise": "rsample"},
    "topk, capacity 1": FULL,
    "topk, capacity 1, random": FULL | {"moe_token_drop_policy": "random"},
    "topk, weights x 8": {"moe_router_topk_scaling_factor": 8.0},
    "topk, 2 experts": {"moe_router_topk": 2},
    "large-margin, lsoftmax, round_robin": MARGIN,
    "large-margin, lsoftmax, self": MARGIN | {"router_margin_target": "self"},
    "large-margin, lsoftmax, balanced": MARGIN | {"router_margin_target": "balanced"},
    "large-margin, additive, balanced": MARGIN | {"router_margin_type": "additive", "router_margin_target": "balanced"},
    "large-margin, elsayed": MARGIN | {"router_margin_type": "elsayed"},
    "recycle, capacity 1": FULL | {"router": "recycle"},
    "random-routed": {"router": "random-routed", "num_domains": len(DOMAINS), **BALANCED},
    "hash, uniform": {"router": "hash"},
    "hash, balanced": {"router": "hash", **BALANCED},
    "base": {"router": "base"},
    "expert-choice": {"router": "expert-choice"},
    "token-embedding": {"router": "token-embedding"},
}
"""Flags of each line of the table."""


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of tools/fetch_sample_corpus.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for token files, runs and the table")
    parser.add_argument("--routers", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--vocab-size", type=int, default=4000)
    parser.add_argument("--eval-iters", type=int, default=96, help="batches of held-out text")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--speed-rounds", type=int, default=15, help="timed steps of each router; 0: none")
    return parser.parse_args(argv)


# ---- token files


def prepare(corpus: Path, folder: Path, vocab_size: int) -> None:
    """Token files of every kind of text with its domain, a tokenizer, and the counts of its ids."""
    if (folder / "counts.npy").exists():
        return
    import numpy as np

    from megatron_moe.data.preprocess import Preprocessing, preprocess
    from megatron_moe.data.preprocess.counts import count_tokens
    from megatron_moe.data.tokenizer.build import train_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        _split_by_kind(corpus / f"{split}.jsonl", folder, split)
    tokenizer = folder / "tokenizer.model"
    train_tokenizer([folder / f"train-{kind}.jsonl" for kind in DOMAINS], tokenizer, vocab_size)
    job = Preprocessing(data=DataConfig(tokenizer_model=str(tokenizer)), domain_key="dataType", domains=DOMAINS)
    for split in ("train", "heldout"):
        for kind in DOMAINS:
            preprocess([folder / f"{split}-{kind}.jsonl"], folder / f"{split}-{kind}", job)
    np.save(folder / "counts.npy", count_tokens([folder / f"train-{kind}" for kind in DOMAINS]))


def _split_by_kind(source: Path, folder: Path, split: str) -> None:
    """One file per kind; of each at most 8 MB, so that the tokenizer is not one of poetry."""
    lines: dict[str, list[str]] = {kind: [] for kind in DOMAINS}
    left = dict.fromkeys(DOMAINS, 8 << 20)
    with source.open(encoding="utf-8") as file:
        for line in file:
            kind = json.loads(line)["dataType"]
            if left.get(kind, 0) > 0:
                lines[kind].append(line)
                left[kind] -= len(line.encode())
    for kind, text in lines.items():
        (folder / f"{split}-{kind}.jsonl").write_text("".join(text), encoding="utf-8")


# ---- runs


def variant_run(name: str, seed: int, steps: int, data: Path, save: Path | None, eval_iters: int = 1) -> RunConfig:
    """The run of one line of the table."""
    layers: dict[str, dict[str, Any]] = {section: dict(values) for section, values in MODEL.items()}
    default = RunConfig()
    sections = {field.name: getattr(default, field.name) for field in dataclasses.fields(RunConfig)}
    flags = {
        "seed": seed,
        "train_iters": steps,
        "eval_interval": steps,
        "eval_iters": eval_iters,
        "lr_warmup_iters": min(40, steps // 4),
        "train_data_path": _blend(data, "train"),
        "valid_data_path": _blend(data, "heldout"),
        "tokenizer_model": str(data / "tokenizer.model"),
        "save": None if save is None else str(save),
        **VARIANTS[name],
    }
    if flags.get("router_map") == "balanced":
        flags["router_token_counts"] = str(data / "counts.npy")
    for flag, value in flags.items():
        section = next(section for section, values in sections.items() if hasattr(values, flag))
        layers.setdefault(section, {})[flag] = value
    if VARIANTS[name].get("num_experts", ()) is None:
        layers["moe"] = {}
    return build_run(layers)


def _blend(data: Path, split: str) -> tuple[str, ...]:
    return tuple(word for kind in DOMAINS for word in ("1", str(data / f"{split}-{kind}")))


@cache
def _world() -> Any:
    """This process as the only rank, started once."""
    from megatron_moe.runtime.distributed import start

    return start(ParallelConfig(device="cpu"))


def _trainer(run: RunConfig) -> Any:
    from megatron_moe.config.validate import validate
    from megatron_moe.training.loop import Trainer

    validate(run, 1)
    return Trainer.build(run, _world())


def train(jobs: Iterable[tuple[str, int]], steps: int, eval_iters: int, data: Path, output: Path) -> None:
    """Train some runs one after another in this process, on one thread."""
    silence_third_party_warnings()
    import torch

    torch.set_num_threads(1)
    for name, seed in jobs:
        folder = run_folder(output, name, seed, steps)
        if not finished(folder, steps):
            trainer = _trainer(variant_run(name, seed, steps, data, folder, eval_iters))
            trainer.train()
            print(f"{name}, seed {seed}: loss {held_out_loss(folder):.4f}", flush=True)


def run_folder(output: Path, name: str, seed: int, steps: int) -> Path:
    """Where a run is written."""
    return output / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}-{steps}"


def finished(folder: Path, steps: int) -> bool:
    """Whether a run has come to its end."""
    latest = folder / "latest_checkpointed_iteration.txt"
    return latest.exists() and int(latest.read_text()) == steps


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def held_out_loss(folder: Path) -> float:
    """Loss of the held-out text after the last step."""
    return next(row["eval_lm_loss"] for row in reversed(_rows(folder / "metrics.jsonl")) if "eval_lm_loss" in row)


def load_numbers(folder: Path, steps: int) -> tuple[float, float, float]:
    """Coefficient of variation of the load, dropped share, recycled share: means over layers and late steps."""
    rows = [row for row in _rows(folder / "expert_load.jsonl") if row["step"] > steps * 4 // 5]
    if not rows:
        return (math.nan,) * 3
    variations, dropped, recycled = [], [], []
    for row in rows:
        tokens, lost, moved = row["tokens"], row["dropped"], row.get("recycled", 0)
        variations.append(statistics.pstdev(tokens) / statistics.fmean(tokens))
        asked = sum(tokens) + lost
        dropped.append(lost / asked)
        recycled.append(moved / asked)
    return statistics.fmean(variations), statistics.fmean(dropped), statistics.fmean(recycled)


# ---- speed


def time_steps(names: Sequence[str], data: Path, rounds: int, answer: Any) -> None:
    """Seconds of each router's steps: all are built in this process and take turns, step by step."""
    silence_third_party_warnings()
    from megatron_moe.training.step import train_step

    total = UNCOUNTED + rounds
    trainers = {name: _trainer(variant_run(name, 1, total, data, None)) for name in names}
    batches = {name: trainer._training_batches() for name, trainer in trainers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for step in range(total):
        for name, trainer in trainers.items():
            trainer.clock.begin(step)
            began = time.perf_counter()
            result = train_step(trainer.run, trainer.model, trainer.optimizer, batches[name], 1)
            seconds[name].append(time.perf_counter() - began)
            trainer.clock.finish(skipped=result.skipped)
    answer.put({name: statistics.median(values[UNCOUNTED:]) for name, values in seconds.items()})


def measure_speed(names: Sequence[str], data: Path, rounds: int) -> dict[str, float]:
    """Tokens per second of every router: the median of its steps."""
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=time_steps, args=(names, data, rounds, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("measuring the speed failed; the error stands above")
    tokens = MODEL["training"]["global_batch_size"] * MODEL["model"]["seq_length"]
    return {name: tokens / seconds for name, seconds in answer.get().items()}


# ---- the table


def table(names: Sequence[str], seeds: int, steps: int, output: Path, speed: dict[str, float]) -> str:
    """Markdown: loss, difference to `topk` seed by seed, load, speed."""
    plain = [held_out_loss(run_folder(output, "topk", seed, steps)) for seed in range(1, seeds + 1)]
    lines = [
        "| router | held-out loss | against `topk` | load variation | dropped | recycled | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        folders = [run_folder(output, name, seed, steps) for seed in range(1, seeds + 1)]
        losses = [held_out_loss(folder) for folder in folders]
        against = [loss - base for loss, base in zip(losses, plain, strict=True)]
        loads = [load_numbers(folder, steps) for folder in folders]
        variation, dropped, recycled = (statistics.fmean(values) for values in zip(*loads, strict=True))
        shown = "" if name == "topk" else f"{_spread(against, '+.3f')}"
        rest = ["" if math.isnan(variation) else f"{variation:.2f}"]
        rest += ["" if math.isnan(share) or not share else f"{share:.1%}" for share in (dropped, recycled)]
        rest += [f"{speed[name]:,.0f}" if name in speed else ""]
        lines.append(f"| {name} | {_spread(losses, '.3f')} | {shown} | {' | '.join(rest)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare, train, measure, print."""
    flags = _parse(argv)
    data = flags.output / "data"
    prepare(flags.corpus, data, flags.vocab_size)
    names = list(dict.fromkeys(["topk", *flags.routers]))
    # Seed by seed: when it is stopped, every router has as many runs.
    jobs = [(name, seed) for seed in range(1, flags.seeds + 1) for name in names]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(
            target=train, args=(jobs[w :: flags.workers], flags.steps, flags.eval_iters, data, flags.output)
        )
        for w in range(flags.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a run failed; its error stands above. The same command goes on with what is left")
    speed = measure_speed(names, data, flags.speed_rounds) if flags.speed_rounds else {}
    text = table(names, flags.seeds, flags.steps, flags.output, speed)
    (flags.output / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
