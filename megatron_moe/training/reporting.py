"""What a run writes while it trains: metrics.jsonl, expert_load.jsonl, TensorBoard, and a line on the screen.

Only rank 0 writes. A resumed run cuts the files back to the step it resumes from, so no step appears twice.
"""

import contextlib
import json
import math
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from megatron_moe.config.base import ConfigError, UserError, disk_error
from megatron_moe.config.run import RunConfig
from megatron_moe.data.rows import parse_row
from megatron_moe.moe.load import LayerLoad, scalars

METRICS_FILE = "metrics.jsonl"
LOAD_FILE = "expert_load.jsonl"


class Reporter:
    """Writes a run's files and screen output; a context manager that closes them.

    Args:
        run: flags; without --save only the screen is written to.
        first_step: steps already done by the run that is resumed.
        total_steps: for the progress bar.
        active: whether this process reports at all (rank 0).
    """

    def __init__(self, run: RunConfig, *, first_step: int, total_steps: int, active: bool) -> None:
        self._files: dict[str, Any] = {}
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._bar: tqdm | None = None
        self._active = active
        self._total = total_steps
        if not active:
            return
        if run.checkpoint.save is not None:
            folder = Path(run.checkpoint.save)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for name in (METRICS_FILE, LOAD_FILE):
                    truncate_after(folder / name, first_step)
                    self._files[name] = (folder / name).open("a", encoding="utf-8")
            except FileExistsError as error:
                raise UserError(f"--save {folder}: is a file; give a folder") from error
            except OSError as error:
                raise disk_error(f"--save {folder}", error) from error
            if run.logging.tensorboard:
                # Importing TensorBoard takes a second; runs without a directory do not need it.
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        if run.logging.wandb_project is not None:
            self._wandb = _start_wandb(run)
        show = run.logging.progress == "on" or (run.logging.progress == "auto" and sys.stderr.isatty())
        if show:
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """A line on the screen, above the progress bar."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update(1)

    def step(self, metrics: dict[str, Any], loads: list[LayerLoad]) -> None:
        """Report a logged step.

        Args:
            metrics: `step` and named numbers, as metrics.jsonl holds them.
            loads: one entry per MoE layer.
        """
        if not self._active:
            return
        self._write(METRICS_FILE, metrics)
        for load in loads:
            self._write(LOAD_FILE, {"step": metrics["step"]} | load.row())
        self._scalars(metrics, scalars(loads))
        self.say(describe_step(metrics, self._total))

    def evaluation(self, step: int, loss: float, perplexity: float) -> None:
        """Report an evaluation during training as a line of metrics.jsonl of its own."""
        if not self._active:
            return
        row = {"step": step, "eval_lm_loss": loss, "eval_perplexity": perplexity}
        self._write(METRICS_FILE, row)
        self._scalars(row, {})
        self.say(f"{_step_of(step, self._total)} | evaluation: loss {loss:.4f}, perplexity {perplexity:.2f}")

    def _write(self, name: str, row: dict[str, Any]) -> None:
        file = self._files.get(name)
        if file is not None:
            # JSON knows no NaN: readers other than Python's would refuse the file.
            finite = {name: None if _is_nonfinite(value) else value for name, value in row.items()}
            try:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
                file.flush()
            except OSError as error:
                # Closing tries once more what is left in its buffer; what went wrong is said below.
                with contextlib.suppress(OSError):
                    file.close()
                raise disk_error(file.name, error) from error

    def _scalars(self, metrics: dict[str, Any], extra: dict[str, float]) -> None:
        step = metrics["step"]
        values = {name: value for name, value in metrics.items() if name != "step"} | extra
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        for file in self._files.values():
            file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def describe_step(metrics: dict[str, Any], total: int) -> str:
    """The line of a step that a person reads."""
    parts = [
        _step_of(metrics["step"], total),
        f"loss {metrics['lm_loss']:.4f}",
    ]
    if "moe_aux_loss" in metrics:
        parts.append(f"aux {metrics['moe_aux_loss']:.3f}")
    parts += [
        f"grad norm {metrics['grad_norm']:.3f}",
        f"lr {metrics['lr']:.2e}",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
        f"{metrics['step_seconds']:.2f} s",
    ]
    if metrics.get("skipped"):
        lost = [name for name in ("lm_loss", "grad_norm") if _is_nonfinite(metrics[name])]
        why = "not finite" if lost else f"overflow, loss scale {metrics['loss_scale']:.0f}"
        parts.append(f"SKIPPED ({why}); {metrics['skipped_steps']} so far")
    return " | ".join(parts)


def _is_nonfinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _step_of(step: int, total: int) -> str:
    return f"step {step:>{len(str(total))}}/{total}"


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that a killed run left half-written."""
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n") or parse_row(line, path, number)["step"] > step:
            break
        kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)


def _start_wandb(run: RunConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"--wandb-project {run.logging.wandb_project}: Weights & Biases is not installed; pip install wandb"
        ) from error
    name = run.logging.wandb_name or (Path(run.checkpoint.save).name if run.checkpoint.save else None)
    return wandb.init(project=run.logging.wandb_project, name=name)
