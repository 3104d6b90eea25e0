"""Twenty kill -9 at random moments of training and saving: nothing that was acknowledged is lost, and nothing differs.

A life of a run ends at the n-th call of a Python or C function that its victim makes, so that with a fixed seed the
same moments are hit again: between two writes of a file, between two renames, in a backward pass, in an exchange. The
run then starts again with the same command. At the end its losses are those of a run that was never killed, bit for
bit; after every kill, whatever was printed as saved is the newest checkpoint, or an older one than it.
"""

import json
import os
import random
import re
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_moe.checkpoint.layout import latest_iteration
from megatron_moe.config.yaml_io import save_run
from tests.helpers.launch import Launch, launch
from tests.helpers.tiny import data_flags, tiny_run

TENSOR, PIPELINE, EXPERT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
)
STEPS = 10
KILLS = 4

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process, fp16": (1, {"fp16": True, "initial_loss_scale": 2.0**16, "loss_scale_window": 3}),
    "distributed optimizer": (2, {"use_distributed_optimizer": True, "bf16": True}),
    "pipeline 2, interleaved": (2, {PIPELINE: 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "tensor 2, expert 2": (4, {TENSOR: 2, EXPERT: 2, "expert_tensor_parallel_size": 1}),
    "expert 4, distributed optimizer": (4, {EXPERT: 4, "use_distributed_optimizer": True}),
}


class Counter:
    """Counts the calls of this process, in all of its training and in saving alone, and kills at one of them."""

    def __init__(self, where: str, deadline: int | None, whole_node: bool) -> None:
        self.calls = {"training": 0, "saving": 0}
        self._saving = False
        self._where, self._deadline, self._whole_node = where, deadline, whole_node

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        self.calls["training"] += 1
        self.calls["saving"] += self._saving
        if self._deadline is not None and self.calls[self._where] == self._deadline:
            sys.setprofile(None)
            if self._whole_node:
                for rank in psutil.Process(os.getppid()).children():
                    rank.kill()
            os.kill(os.getpid(), signal.SIGKILL)

    def train(self, original: Any, report: str) -> Any:
        """The training loop, counted; what was counted is written at its end."""

        def counted(*args: Any) -> Any:
            sys.setprofile(self)
            try:
                return original(*args)
            finally:
                sys.setprofile(None)
                Path(report).write_text(json.dumps(self.calls), encoding="utf-8")

        return counted

    def save(self, original: Any) -> Any:
        """The saving of a checkpoint, known as such."""

        def counted(*args: Any) -> Any:
            self._saving = True
            try:
                return original(*args)
            finally:
                self._saving = False

        return counted


def count_calls(victim: int, where: str, deadline: int | None, whole_node: bool, report: str) -> None:
    """Runs on every rank before the program: kill the victim in its `deadline`-th call while it trains, or saves."""
    from megatron_moe.training import loop

    rank = int(os.environ.get("RANK", "0"))
    counter = Counter(where, deadline if rank == victim else None, whole_node)
    loop.Trainer.train = counter.train(loop.Trainer.train, f"{report}_{rank}")  # type: ignore[method-assign]
    loop.save_checkpoint = counter.save(loop.save_checkpoint)


class Run:
    """A run that is started again and again with the same command."""

    def __init__(self, folder: Path, data: Path, world_size: int, flags: dict[str, Any]) -> None:
        self.folder, self.world_size = folder, world_size
        folder.mkdir()
        common = {"train_iters": STEPS, "save_interval": 1, "keep_last": 2, "hidden_dropout": 0.1, "tensorboard": False}
        places = {"save": str(folder / "run"), "load": str(folder / "run")}
        schedule = {"lr_decay_style": "cosine", "lr_warmup_iters": 2}
        save_run(tiny_run(**data_flags(data) | common | schedule | places | flags), folder / "run.yaml")

    def live(
        self, victim: int = 0, where: str = "training", deadline: int | None = None, whole_node: bool = False
    ) -> Launch:
        """Start the run; with a deadline the victim is killed on the way."""
        prepare = (count_calls, victim, where, deadline, whole_node, str(self.folder / "calls"))
        return launch(self.world_size, "megatron_moe.pretrain", "--config", self.folder / "run.yaml", prepare=prepare)

    def calls_a_step(self, rank: int, where: str) -> int:
        """Of a whole run; the first rank makes more than the others when it saves."""
        return json.loads((self.folder / f"calls_{rank}").read_text(encoding="utf-8"))[where] // STEPS

    def steps(self) -> dict[int, dict[str, float]]:
        """Loss, gradient norm, learning rate and loss scale of every step, each of which stands there once."""
        rows = [json.loads(line) for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert len({row["step"] for row in rows}) == len(rows)
        names = ("lm_loss", "grad_norm", "lr", "loss_scale", "consumed_samples")
        return {row["step"]: {name: row[name] for name in names} for row in rows}


def acknowledged(life: Launch) -> int:
    """The last step that was printed as saved."""
    return max((int(step) for step in re.findall(r"^saved .*/iter_(\d+)$", life.stdout, re.MULTILINE)), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_acknowledged_is_lost(name: str, tiny_data: Path, tmp_path: Path) -> None:
    world_size, flags = LAYOUTS[name]
    whole = Run(tmp_path / "whole", tiny_data, world_size, flags)
    assert set(whole.live().codes) == {0}
    expected = whole.steps()
    assert len(expected) == STEPS

    chance = random.Random(name)
    run, saved = Run(tmp_path / "killed", tiny_data, world_size, flags), 0
    for kill in range(KILLS):
        # Saving is a small part of the time, and the part where a kill could do most harm: every second one goes there.
        where = "saving" if kill % 2 else "training"
        victim = chance.randrange(world_size)
        deadline = chance.randrange(1, 2 * whole.calls_a_step(victim, where))
        life = run.live(victim, where, deadline, whole_node=chance.random() < 0.5)
        assert -signal.SIGKILL in life.codes, life.stdout + life.stderr
        assert 0 not in life.codes
        saved = max(saved, acknowledged(life))
        assert (latest_iteration(run.folder / "run") or 0) >= saved
    assert set(run.live().codes) == {0}
    assert run.steps() == expected
    assert sorted(path.name for path in (run.folder / "run").glob("iter_*")) == ["iter_0000009", "iter_0000010"]
