"""The training loop: when it stops, what it writes, and what it says when the loss is lost."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import load_run
from tests.helpers.distributed import RankFailure, run_ranks
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import Curve, train_curve

# --log-interval 2 of six steps; the first is always there.
LOGGED = [1, 2, 4, 6]
STEP_FIELDS = {
    "step",
    "consumed_tokens",
    "lm_loss",
    "moe_aux_loss",
    "grad_norm",
    "lr",
    "loss_scale",
    "step_seconds",
    "tokens_per_second",
    "tflops_per_device",
    "peak_memory_bytes",
}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path, Curve]:
    """A run of six steps on two ranks that evaluates, saves and logs."""
    folder = tmp_path_factory.mktemp("loop") / "run"
    flags = {
        "train_iters": 6,
        "eval_interval": 4,
        "eval_iters": 2,
        "save": str(folder),
        "save_interval": 4,
        "log_interval": 2,
        "moe_expert_capacity_factor": 1.0,
    }
    run = tiny_run(**data_flags(tiny_data), **flags)
    curve = run_ranks(2, train_curve, run)[0]
    return run, folder, curve


def test_folder_explains_the_run(finished: tuple[RunConfig, Path, Curve]) -> None:
    _, folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "expert_load.jsonl",
        "tensorboard",
        "iter_0000004",
        "iter_0000006",
        "latest_checkpointed_iteration.txt",
    }
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "6\n"
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "iter_0000006" / "config.yaml").is_file()
    assert (folder / "iter_0000006" / "tokenizer").is_dir()


def test_metrics_of_every_logged_step(finished: tuple[RunConfig, Path, Curve]) -> None:
    run, folder, curve = finished
    lines = rows(folder / "metrics.jsonl")
    steps = [line for line in lines if "lm_loss" in line]
    assert [line["step"] for line in steps] == LOGGED
    for line in steps:
        assert set(line) >= STEP_FIELDS
        assert all(math.isfinite(value) for value in line.values())
        assert line["consumed_tokens"] == line["step"] * 8 * 32
        assert line["lr"] == run.optimizer.lr
        assert line["tokens_per_second"] == pytest.approx(8 * 32 / line["step_seconds"])
    assert [line["lm_loss"] for line in steps] == curve.losses
    evaluations = [line for line in lines if "eval_lm_loss" in line]
    assert [line["step"] for line in evaluations] == [4, 6]
    assert [line["eval_lm_loss"] for line in evaluations] == curve.evaluations
    for line in evaluations:
        assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_lm_loss"]))


def test_expert_load_of_every_logged_step(finished: tuple[RunConfig, Path, Curve]) -> None:
    _, folder, _ = finished
    lines = rows(folder / "expert_load.jsonl")
    assert [(line["step"], line["layer"], len(line["tokens"])) for line in lines] == [
        (step, layer, experts) for step in LOGGED for layer, experts in ((2, 4), (4, 8))
    ]
    for line in lines:
        # A line stands for one step, however seldom lines are written.
        assert sum(line["tokens"]) + line["dropped"] == 8 * 32
        tokens = np.array(line["tokens"])
        share = tokens[tokens > 0] / tokens.sum()
        assert line == {
            "step": line["step"],
            "layer": line["layer"],
            "tokens": line["tokens"],
            "dropped": line["dropped"],
            "recycled": 0,
            "load_cv": pytest.approx(tokens.std() / tokens.mean()),
            "load_entropy": pytest.approx(-(share * np.log(share)).sum() / math.log(len(tokens))),
            "dropped_share": line["dropped"] / (8 * 32),
            "recycled_share": 0.0,
        }
    assert any(line["dropped"] for line in lines)
    means = {"moe_load_cv": "load_cv", "moe_load_entropy": "load_entropy", "moe_dropped": "dropped_share"}
    for row in (row for row in rows(folder / "metrics.jsonl") if "lm_loss" in row):
        for name, key in means.items():
            assert row[name] == pytest.approx(np.mean([line[key] for line in lines if line["step"] == row["step"]]))
        assert row["moe_recycled"] == 0.0


def test_tensorboard_has_the_same_numbers(finished: tuple[RunConfig, Path, Curve]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, folder, curve = finished
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    losses = events.Scalars("lm_loss")
    assert [event.step for event in losses] == LOGGED
    assert [event.value for event in losses] == pytest.approx(curve.losses)
    assert {"moe/imbalance_layer_2", "moe/imbalance_layer_4", "eval_perplexity"} <= set(events.Tags()["scalars"])
    for line in rows(folder / "expert_load.jsonl")[:2]:
        for name, key in (
            ("load_cv", "load_cv"),
            ("load_entropy", "load_entropy"),
            ("dropped", "dropped_share"),
            ("recycled", "recycled_share"),
        ):
            event = events.Scalars(f"moe/{name}_layer_{line['layer']}")[0]
            assert (event.step, event.value) == (line["step"], pytest.approx(line[key]))


def pretrain(words: list[str]) -> None:
    from megatron_moe.pretrain import main

    main(words)


def test_written_config_gives_the_same_run_again(finished: tuple[RunConfig, Path, Curve], tmp_path: Path) -> None:
    run, folder, _ = finished
    written = load_run(folder / "config.yaml")
    assert written.model.vocab_size == 860
    assert written.training == run.training
    assert written.moe == run.moe
    again = tmp_path / "again"
    run_ranks(2, pretrain, ["--config", str(folder / "config.yaml"), "--save", str(again)])
    assert [line.get("lm_loss") for line in rows(again / "metrics.jsonl")] == [
        line.get("lm_loss") for line in rows(folder / "metrics.jsonl")
    ]
    first, second = (yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) for path in (folder, again))
    assert first["checkpoint"].pop("save") != second["checkpoint"].pop("save")
    assert first == second


def test_stops_after_the_tokens_given(tiny_data: Path) -> None:
    """600 tokens are two and a third steps of 8 x 32: three steps."""
    curve = run_ranks(1, train_curve, tiny_run(**data_flags(tiny_data), train_iters=None, train_tokens=600))[0]
    assert len(curve.losses) == 3


def test_ramp_up_counts_what_it_consumes(tiny_data: Path, tmp_path: Path) -> None:
    flags = {"rampup_batch_size": (2, 2, 12), "train_iters": 6, "save": str(tmp_path), "tensorboard": False}
    run_ranks(1, train_curve, tiny_run(**data_flags(tiny_data), **flags))
    consumed = [line["consumed_samples"] for line in rows(tmp_path / "metrics.jsonl")]
    sizes = [after - before for before, after in zip([0, *consumed], consumed, strict=False)]
    assert sizes[0] == 2
    assert sizes == sorted(sizes)
    assert sizes[-1] == 8
    loads = rows(tmp_path / "expert_load.jsonl")
    assert [sum(line["tokens"]) for line in loads if line["layer"] == 2] == [32 * size for size in sizes]


def test_time_limit_saves_and_the_run_goes_on_later(tiny_data: Path, tmp_path: Path) -> None:
    flags = data_flags(tiny_data) | {"train_iters": 3, "save": str(tmp_path), "load": str(tmp_path)}
    stopped = run_ranks(2, train_curve, tiny_run(**flags, exit_duration_in_mins=1e-6))
    assert [len(curve.losses) for curve in stopped] == [1, 1]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1\n"
    rest = run_ranks(2, train_curve, tiny_run(**flags))[0]
    whole = run_ranks(2, train_curve, tiny_run(**data_flags(tiny_data)))[0]
    assert stopped[0].losses + rest.losses == whole.losses
    assert [line["step"] for line in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def train_with_a_lost_weight(run: RunConfig) -> str:
    from megatron_moe.config.base import UserError
    from megatron_moe.runtime.distributed import start
    from megatron_moe.training.loop import Trainer

    trainer = Trainer.build(run, start(run.parallel, run.virtual_stages))
    with torch.no_grad():
        next(iter(trainer.model[0].parameters())).fill_(torch.nan)
    try:
        trainer.train()
    except UserError as error:
        return str(error)
    return ""


def test_lost_loss_is_one_clear_line_on_every_rank(tiny_data: Path) -> None:
    messages = run_ranks(2, train_with_a_lost_weight, tiny_run(**data_flags(tiny_data), pipeline_model_parallel_size=2))
    for message in messages:
        assert message == (
            "loss is nan at step 3, 3 such steps in a row (--max-nonfinite-steps 3); samples 0 to 23; no weight was "
            "changed since step 0: lower --lr, or look at the data"
        )


def test_resuming_cuts_the_files_back(tiny_data: Path, tmp_path: Path) -> None:
    """A run that was killed after its last checkpoint has written steps that are now taken again."""
    flags = data_flags(tiny_data) | {"save": str(tmp_path), "load": str(tmp_path), "save_interval": 2}
    run_ranks(1, train_curve, tiny_run(**flags, train_iters=2))
    for name in ("metrics.jsonl", "expert_load.jsonl"):
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.write('{"step": 3, "lm_loss": 1.0, "layer": 2}\n{"step": 4, "lm_lo')
    run_ranks(1, train_curve, tiny_run(**flags, train_iters=4))
    assert [line["step"] for line in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert rows(tmp_path / "metrics.jsonl")[2]["lm_loss"] > 2.0
    assert [line["step"] for line in rows(tmp_path / "expert_load.jsonl")] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_vocabulary_smaller_than_the_tokenizer_is_an_error(tiny_data: Path) -> None:
    with pytest.raises(RankFailure, match="--vocab-size 100: the tokenizer has 860 ids"):
        run_ranks(1, train_curve, tiny_run(**data_flags(tiny_data), vocab_size=100))


def test_ranks_without_a_part_in_reporting_write_nothing(tiny_data: Path, tmp_path: Path) -> None:
    run_ranks(2, train_curve, tiny_run(**data_flags(tiny_data), save=str(tmp_path), train_iters=1, tensorboard=False))
    assert len(rows(tmp_path / "metrics.jsonl")) == 1
    assert not (tmp_path / "tensorboard").exists()
