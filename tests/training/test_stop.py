"""SIGTERM and SIGINT end a run at the end of its step: saved, with exit code 75, and exact when it goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint.layout import latest_iteration
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import save_run
from megatron_moe.runtime.signals import STOPPED_CODE
from tests.helpers.distributed import run_ranks
from tests.helpers.launch import launch
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import Curve, build_trainer, record_curve, train_curve

QUIET = {"tensorboard": False}


# ---- every rank stops at the same step


def stopped_curve(run: RunConfig, number: int, rank: int, moment: str) -> tuple[Curve, int]:
    """Train; one rank sends itself a signal in its second step. Returns what the trainer says stopped it."""
    import torch.distributed as dist

    from megatron_moe.training import loop

    trainer = build_trainer(run)
    owner, name = {
        "step": (loop, "train_step"),
        "save": (loop, "save_checkpoint"),
        "evaluation": (loop, "evaluate"),
    }[moment]
    original = getattr(owner, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == rank and trainer.progress.step >= 1:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, interrupted)
    curve = record_curve(trainer)
    return curve, trainer.progress.step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (4, 3)])
def test_saves_and_goes_on_exactly(number: int, world_size: int, rank: int, tiny_data: Path, tmp_path: Path) -> None:
    """Only one rank hears of it, as when a scheduler signals one process; with dropout."""
    flags = data_flags(tiny_data) | QUIET | {"train_iters": 4, "hidden_dropout": 0.1}
    whole = run_ranks(world_size, train_curve, tiny_run(**flags))[0]
    run = tiny_run(**flags, save=str(tmp_path), load=str(tmp_path))
    for curve, step in run_ranks(world_size, stopped_curve, run, number, rank, "step"):
        assert step == 2
        assert curve.losses == whole.losses[:2]
    assert latest_iteration(tmp_path) == 2
    assert run_ranks(world_size, train_curve, run)[0].losses == whole.losses[2:]


@pytest.mark.parametrize("moment", ["save", "evaluation"])
def test_signal_while_something_else_goes_on(moment: str, tiny_data: Path, tmp_path: Path) -> None:
    """It is finished first; a checkpoint is not written twice."""
    flags = QUIET | {"train_iters": 4, "save": str(tmp_path), "save_interval": 2, "eval_interval": 2, "eval_iters": 1}
    run = tiny_run(**data_flags(tiny_data) | flags)
    for _, step in run_ranks(2, stopped_curve, run, signal.SIGTERM, 1, moment):
        # The save of step 2 is over before ranks agree again, which is at the end of step 3.
        assert step == (3 if moment == "save" else 2)
    assert latest_iteration(tmp_path) == step


def restored_handlers(run: RunConfig) -> bool:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train_curve(run)
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    return before == after and signal.set_wakeup_fd(-1) == -1


def test_handlers_are_put_back(tiny_data: Path) -> None:
    assert run_ranks(1, restored_handlers, tiny_run(**data_flags(tiny_data), num_workers=2))[0]


def stop_with_slow_files(marker: Path) -> None:
    """The last rank gets a signal in its second step; closing the files of rank 0 takes a while, as an upload does."""
    from megatron_moe.training import loop
    from megatron_moe.training.reporting import Reporter

    train_step, close = loop.train_step, Reporter.__exit__
    steps = iter(range(10**6))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(steps) == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args, **kwargs)

    def slow_close(reporter: Reporter, *args: Any) -> None:
        close(reporter, *args)
        if os.environ["RANK"] == "0":
            time.sleep(3)
            marker.touch()

    loop.train_step, Reporter.__exit__ = interrupted, slow_close  # type: ignore[method-assign]


def test_no_rank_leaves_before_the_files_are_closed(tiny_data: Path, tmp_path: Path) -> None:
    """A launcher ends all ranks when one leaves with a code other than 0."""
    config = long_run(tiny_data, tmp_path, save=str(tmp_path / "run"))
    done = launch(2, "megatron_moe.pretrain", "--config", config, prepare=(stop_with_slow_files, tmp_path / "closed"))
    assert (tmp_path / "closed").exists()
    assert STOPPED_CODE in done.codes
    assert done.stderr == ""


# ---- real processes


def long_run(data: Path, folder: Path, **flags: Any) -> Path:
    """A config file of a run that would take hours."""
    folder.mkdir(parents=True, exist_ok=True)
    run = tiny_run(**data_flags(data) | QUIET | {"train_iters": 10**6, "log_interval": 1} | flags)
    save_run(run, folder / "long.yaml")
    return folder / "long.yaml"


@contextlib.contextmanager
def started(*words: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if condition():
            return
        if process.poll() is not None:
            break
        time.sleep(0.2)
    process.kill()
    raise AssertionError("".join(process.communicate()))


def has_steps(folder: Path) -> Callable[[], bool]:
    return lambda: (folder / "metrics.jsonl").exists() and "\n" in (folder / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_launcher_hands_the_signal_on_and_waits(number: int, tiny_data: Path, tmp_path: Path) -> None:
    """Exit code 75, no traceback, and a checkpoint of the last step that was printed."""
    config = long_run(tiny_data, tmp_path, save=str(tmp_path / "run"), expert_model_parallel_size=2)
    # A run that was told to stop is no failure to start again from.
    words = ("megatron_moe.torchrun", "--standalone", "--max-restarts", "1", "--nproc-per-node", "2")
    words += ("-m", "megatron_moe.pretrain")
    with started(*words, "--config", str(config)) as launcher:
        wait_for(has_steps(tmp_path / "run"), launcher)
        launcher.send_signal(number)
        out, err = launcher.communicate(timeout=120)
    assert launcher.returncode == STOPPED_CODE == 75
    assert err == ""
    step = latest_iteration(tmp_path / "run")
    assert out.splitlines()[-1] == f"stopped at step {step}: {signal.Signals(number).name}; --load goes on from here"


@pytest.mark.slow
def test_signal_to_all_processes_spares_the_loaders(tiny_data: Path, tmp_path: Path) -> None:
    """As Slurm does it: the trainer and its loader workers get SIGTERM at the same time."""
    config = long_run(tiny_data, tmp_path, save=str(tmp_path / "run"), num_workers=2)
    with started("megatron_moe.pretrain", "--config", str(config), start_new_session=True) as trainer:
        wait_for(has_steps(tmp_path / "run"), trainer)
        os.killpg(trainer.pid, signal.SIGTERM)
        _, err = trainer.communicate(timeout=120)
    assert trainer.returncode == STOPPED_CODE
    assert err == ""
    assert latest_iteration(tmp_path / "run") is not None


@pytest.mark.slow
def test_without_save_the_code_says_that_nothing_was_kept(tiny_data: Path, tmp_path: Path) -> None:
    config = long_run(tiny_data, tmp_path)
    with started("megatron_moe.pretrain", "--config", str(config)) as trainer:
        assert trainer.stdout is not None
        while not trainer.stdout.readline().startswith("step"):
            assert trainer.poll() is None
        trainer.send_signal(signal.SIGTERM)
        out, err = trainer.communicate(timeout=120)
    assert trainer.returncode == 128 + signal.SIGTERM
    assert err == ""
    assert out.splitlines()[-1].endswith(": SIGTERM; nothing is saved without --save")


@pytest.mark.slow
def test_second_interrupt_ends_it_at_once(tiny_data: Path, tmp_path: Path) -> None:
    """A step that never ends must not hold back someone who presses Ctrl-C twice."""
    script = tmp_path / "stuck.py"
    script.write_text(
        "import time\n"
        "from megatron_moe.runtime.signals import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    print('ready', flush=True)\n"
        "    while signals.received is None:\n"
        "        time.sleep(0.01)\n"
        "    print(signals.received.name, flush=True)\n"
        "    time.sleep(300)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as stuck:
        assert stuck.stdout is not None
        assert stuck.stdout.readline() == "ready\n"
        stuck.send_signal(signal.SIGINT)
        assert stuck.stdout.readline() == "SIGINT\n"
        stuck.send_signal(signal.SIGINT)
        assert stuck.wait(timeout=30) == 128 + signal.SIGINT


def stop_of_a_lost_run() -> None:
    from megatron_moe.runtime.signals import StopSignals

    with StopSignals(lost=lambda: True):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(300)


def test_signal_for_a_run_that_is_lost_does_not_wait_for_the_step(tmp_path: Path) -> None:
    """The launcher stops the ranks of a failed run with SIGTERM; they wait in a collective that never ends."""
    from tests.helpers.distributed import CONTEXT

    process = CONTEXT.Process(target=stop_of_a_lost_run)
    process.start()
    process.join(timeout=30)
    assert process.exitcode == 128 + signal.SIGTERM
