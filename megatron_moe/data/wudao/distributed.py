"""The same stages and tasks on Slurm, by datatrove's executor (rank n of a stage does task n), or on Ray.

Every machine must see the input and output folders under the same paths. What is done is known by the job's own
markers, so a job can be begun on one executor and finished on another.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.data.command_line import byte_progress
from megatron_moe.data.wudao.executors import TaskFailedError, locked, no_leftovers, task_label
from megatron_moe.data.wudao.job import STAGES, Job, StageName, load_job
from megatron_moe.data.wudao.stages import run_task, task_bytes

# So many array jobs for each worker, so that a slow one does not hold up the others.
_JOBS_PER_WORKER = 8
# Tasks pass nothing through Ray's object store; this is the least that it takes.
_OBJECT_STORE = 80 << 20


@dataclass(frozen=True)
class SlurmOptions:
    """How to ask Slurm for machines.

    Attributes:
        partition: of the cluster.
        time: limit of each array job.
        memory_gb: of each task; matching a band of 59 million documents needs 3.3.
        qos: quality of service; none by default.
        arguments: further flags of sbatch.
    """

    partition: str
    time: str = "24:00:00"
    memory_gb: int = 4
    qos: str = ""
    arguments: Mapping[str, str] = field(default_factory=dict)


def do_rank(output: str, stage: StageName, rank: int) -> None:
    """Do one task on whatever machine this is; an error is left where the one who waits for it finds it."""
    job = _job(output)
    os.chdir(job.settings.folder)
    error_file = _error_file(job, stage, rank)
    error_file.unlink(missing_ok=True)
    try:
        run_task(job, stage, rank, _ignore)
    except Exception as error:
        message = " ".join(str(error).split())
        user = isinstance(error, UserError)
        error_file.parent.mkdir(parents=True, exist_ok=True)
        error_file.write_text(json.dumps([user, message if user else f"{type(error).__name__}: {message}"]), "utf-8")
        raise


@functools.lru_cache(maxsize=1)
def _job(output: str) -> Job:
    return load_job(Path(output))


def _ignore(_: int) -> None:
    """Progress is seen by the tasks that are done."""


def _error_file(job: Job, stage: StageName, rank: int) -> Path:
    return job.work / "errors" / f"{stage}-{rank:06d}.json"


def _logs(job: Job, stage: StageName) -> str:
    return str(job.work / "logs" / stage)


def _require(package: str, flag: str) -> None:
    if importlib.util.find_spec(package) is None:
        extra = "data,ray" if package == "ray" else "data"
        raise UserError(f"--executor {flag}: needs the package {package}; pip install 'megatron_moe[{extra}]'")


def run_ray(job: Job, workers: int, address: str | None = None, progress: bool | None = None) -> None:
    """Do all that is left of a job on Ray.

    Not by datatrove's RayPipelineExecutor: it starts an actor, a placement group and a forked pool for every task
    (1.2 s each, where a task of Ray's own takes milliseconds and keeps the loaded recipe), it waits forever when the
    process of a task is killed, and only logs a task that fails.

    Args:
        job: a job that is saved.
        workers: tasks at a time.
        address: of a cluster; None starts Ray on this machine and ends it afterwards.
        progress: see `run_local`.

    Raises:
        UserError, TaskFailedError: see `run_local`.
    """
    _require("ray", "ray")
    # Ray would report its use to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    with locked(job), no_leftovers(job):
        _start_ray(ray, workers, address)
        try:
            # Tasks are deterministic and write under their final name at the end, so they can be tried again.
            task = ray.remote(num_cpus=1, max_retries=1)(do_rank)
            for stage in STAGES:
                if left := _left(job, stage):
                    _run_stage_on_ray(ray, task, job, stage, left, workers, progress)
        finally:
            ray.shutdown()


def _run_stage_on_ray(
    ray: Any, task: Any, job: Job, stage: StageName, left: list[int], workers: int, progress: bool | None
) -> None:
    sizes = {rank: task_bytes(job, stage, rank) for rank in left}
    queue = sorted(left, key=lambda rank: (sizes[rank], -rank))
    running: dict[Any, int] = {}
    with byte_progress(sum(sizes.values()), stage, progress) as bar:
        while queue or running:
            while queue and len(running) < workers:
                rank = queue.pop()
                running[task.remote(str(job.output), stage, rank)] = rank
            for done in ray.wait(list(running), num_returns=1)[0]:
                rank = running.pop(done)
                try:
                    ray.get(done)
                except (ray.exceptions.RayError, UserError) as error:
                    raise _failure(job, stage, rank) from error
                bar.update(sizes[rank])


def _start_ray(ray: Any, workers: int, address: str | None) -> None:
    try:
        if address:
            ray.init(address, log_to_driver=False, logging_level="warning")
        else:
            ray.init(
                num_cpus=workers,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="warning",
                object_store_memory=_OBJECT_STORE,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        place = f"--ray-address {address}" if address else "--executor ray"
        raise UserError(f"{place}: Ray cannot be started: {' '.join(str(error).split())[:200]}") from error


def _left(job: Job, stage: StageName) -> list[int]:
    return [rank for rank in range(job.stage_tasks(stage)) if not job.is_done(stage, rank)]


def _failure(job: Job, stage: StageName, rank: int) -> Exception:
    """What ended a task, as it has left it on the disk."""
    label = task_label(job, stage, rank)
    again = "start the same command again to go on from there"
    try:
        user, message = json.loads(_error_file(job, stage, rank).read_bytes())
    except FileNotFoundError:
        return TaskFailedError(f"{label}: its process was killed (out of memory?); {again}")
    return UserError(message) if user else TaskFailedError(f"{label}: {message}; {again}")


def submit_slurm(job: Job, workers: int, options: SlurmOptions) -> list[tuple[StageName, str]]:
    """Hand all that is left of a job to Slurm: an array job for each stage, waiting for the one before.

    Returns:
        The stages and the numbers of their (last) jobs.

    Raises:
        UserError: sbatch is missing or refuses.
    """
    _require("datatrove", "slurm")
    from datatrove.executor.slurm import SlurmPipelineExecutor

    from megatron_moe.data.wudao.pipeline_step import StageStep

    if not options.partition:
        raise ConfigError("--slurm-partition is missing: give the partition that --executor slurm shall use")
    previous: Any = None
    submitted: list[tuple[StageName, str]] = []
    try:
        for stage in STAGES:
            if not _left(job, stage):
                continue
            tasks = job.stage_tasks(stage)
            executor = SlurmPipelineExecutor(
                [StageStep(str(job.output), stage)],
                tasks=tasks,
                workers=workers,
                tasks_per_job=max(1, tasks // (workers * _JOBS_PER_WORKER)),
                time=options.time,
                partition=options.partition,
                mem_per_cpu_gb=options.memory_gb,
                qos=options.qos,
                job_name=f"clean-{stage}",
                sbatch_args=dict(options.arguments),
                env_command=_environment(),
                logging_dir=_logs(job, stage),
                depends=previous,
            )
            executor.run()
            submitted.append((stage, str(executor.job_id)))
            previous = executor
    except FileNotFoundError as error:
        raise UserError("--executor slurm: there is no sbatch here; run it on a login node of the cluster") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"--executor slurm: sbatch refuses the job (exit code {error.returncode})") from error
    return submitted


def _environment() -> str:
    """Shell commands that give a Slurm job this Python and this package."""
    package = Path(__file__).resolve().parents[3]
    # A name like python3 in a virtual environment is a link: its folder matters, not where it leads.
    return f'export PATH="{Path(sys.executable).parent}:$PATH" PYTHONPATH="{package}:$PYTHONPATH"'
