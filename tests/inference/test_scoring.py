"""Scores equal a plain log_softmax over a forward pass; batches change nothing; evaluation is scoring of windows."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_moe.config.data import DataConfig
from megatron_moe.inference.evaluation_data import cut_windows
from megatron_moe.inference.score_file import score_row
from megatron_moe.runtime import allocator
from tests.helpers.distributed import run_ranks
from tests.inference.conftest import train
from tests.inference.on_ranks import load, plain_scores, windows_by_score


def test_scores_are_the_log_softmax_of_the_logits(checkpoint: Path) -> None:
    ((plain, alone, batched),) = run_ranks(1, plain_scores, checkpoint)
    for expected, one, many in zip(plain, alone, batched, strict=True):
        assert one == pytest.approx(expected, abs=1e-5)
        assert many == pytest.approx(one, abs=1e-5)


def test_half_precision_checkpoint_in_fp32(tmp_path: Path, tiny_data: Path) -> None:
    run_dir = train(tmp_path / "run", tiny_data, bf16=True)
    ((_, half, _),) = run_ranks(1, plain_scores, run_dir)
    ((plain, full, _),) = run_ranks(1, _plain_scores_fp32, run_dir)
    for expected, exact, rough in zip(plain, full, half, strict=True):
        assert exact == pytest.approx(expected, abs=1e-5)
        # bfloat16 has 8 bits: logits of magnitude 10 are off by a few hundredths.
        assert rough == pytest.approx(exact, abs=0.5)
        assert rough != exact


def _plain_scores_fp32(run_dir: Path) -> tuple:
    return plain_scores(run_dir, eval_fp32=True)


def keeps_memory(run_dir: Path | None) -> bool:
    """A rank that loads a checkpoint to score it, or that starts in order to train."""
    from megatron_moe.config.parallel import ParallelConfig
    from megatron_moe.runtime import allocator
    from megatron_moe.runtime.distributed import start

    if run_dir is None:
        start(ParallelConfig(device="cpu"))
    else:
        load(run_dir)
    return allocator._kept


def test_memory_is_kept_from_step_to_step_of_training_only(checkpoint: Path) -> None:
    """Batches to score have sizes of their own: kept memory would grow from one to the next."""
    assert run_ranks(1, keeps_memory, checkpoint) == [False]
    assert run_ranks(1, keeps_memory, None) == [allocator.is_glibc() and allocator.users_choice() is None]


def test_evaluation_is_the_mean_over_scored_windows(checkpoint: Path, tiny_data: Path) -> None:
    ((loss, tokens, scored_loss, scored),) = run_ranks(1, windows_by_score, checkpoint, tiny_data)
    size = (tiny_data / "valid.bin").stat().st_size // 2
    assert tokens == scored == size - 1, "every token but the first is predicted once"
    assert loss == pytest.approx(scored_loss, rel=1e-6)


def test_score_row_adds_up() -> None:
    row = score_row(np.array([5, 6, 7], np.int32), np.array([-1.0, -3.0], np.float32))
    assert row == {
        "ids": [5, 6, 7],
        "logprobs": [-1.0, -3.0],
        "sum": -4.0,
        "mean": -2.0,
        "perplexity": pytest.approx(np.exp(2.0)),
    }


def test_windows_cover_every_token_once() -> None:
    files = [SimpleNamespace(num_tokens=count) for count in (11, 2, 9)]
    windows = cut_windows(files, 4)  # type: ignore[arg-type]
    assert [(w.file, w.start, w.length) for w in windows] == [
        *((0, 0, 5), (0, 4, 5), (0, 8, 3)),
        (1, 0, 2),
        *((2, 0, 5), (2, 4, 5)),
    ]


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_positions_and_mask_are_those_of_the_training_data(reset: bool, mask: bool) -> None:
    import torch
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    from megatron_moe.inference.evaluation import positions_and_mask

    eod = 9
    run = SimpleNamespace(data=DataConfig(reset_position_ids=reset, eod_mask_loss=mask))
    ids_BS = torch.tensor([[1, 2, 9, 3, 4, 9, 9, 5], [9, 1, 1, 1, 1, 1, 1, 9], [1, 2, 3, 4, 5, 6, 7, 8]])
    positions_BS, counts_BS = positions_and_mask(ids_BS, run, eod)  # type: ignore[arg-type]
    for row, ids_S in enumerate(ids_BS):
        _, loss_mask, position_ids = _get_ltor_masks_and_position_ids(ids_S, eod, reset, False, mask, False)
        assert positions_BS[row].tolist() == position_ids.tolist()
        assert counts_BS[row].float().tolist() == loss_mask.tolist()
