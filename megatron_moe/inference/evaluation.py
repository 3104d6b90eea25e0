"""Loss and perplexity of a model on whole token files, every token read once.

A file is one stream of tokens, as in training: documents follow each other, each closed by its end-of-document token.
It is cut into windows (`evaluation_data.py`), and a token is predicted from those before it in its window. (Training
shuffles documents and drops an incomplete last window; on the same windows the numbers are the same.) --eod-mask-loss
and --reset-position-ids hold as the run had them.

Shape legend: B = windows of a batch, S = --seq-length or the longest window's.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_moe.config.base import UserError
from megatron_moe.config.run import RunConfig
from megatron_moe.data.indexed import IndexedFile
from megatron_moe.inference.batching import pad_rows, plan_batches
from megatron_moe.inference.domains import file_domains
from megatron_moe.inference.evaluation_data import FileLoss, cut_windows
from megatron_moe.inference.model import InferenceModel


def evaluate_files(
    model: InferenceModel, files: Sequence[IndexedFile], *, micro_batch_size: int = 8, eval_iters: int | None = None
) -> list[FileLoss]:
    """Loss of every file; a collective over all ranks, with the same arguments on each.

    Args:
        model: a loaded model.
        files: of `open_data`.
        micro_batch_size: windows that a data-parallel replica works on at once.
        eval_iters: read only the first `eval_iters * micro_batch_size` windows. Default: all.

    Returns:
        On every rank, one result per file that was read.

    Raises:
        UserError: the loss is not finite, or no token counts.
    """
    run = model.saved.run
    domains = [file_domains(source, run.model) for source in files]
    known = [found for found in domains if found is not None] if run.model.num_domains is not None else None
    windows = cut_windows(files, run.model.seq_length)
    if eval_iters is not None:
        windows = windows[: eval_iters * micro_batch_size]
    lengths = [window.length for window in windows]
    totals = torch.zeros(len(files), 2, dtype=torch.float64, device=model.device)
    batches = plan_batches(lengths, micro_batch_size, model.replica, model.replicas)
    for batch in tqdm(batches, unit="batch", disable=None if model.is_main else True):
        members = [windows[index] for index in batch.indices]
        rows = [files[w.file].tokens[w.start : w.start + w.length] for w in members]
        ids_BS = pad_rows(rows, batch.rows, batch.longest)
        positions_BS, counts_BS = positions_and_mask(ids_BS[:, :-1], run, model.tokenizer.eod)
        domains_BS = None
        if known is not None:
            stretches = [known[w.file].stretch(w.start, w.length) for w in members]
            domains_BS = pad_rows(stretches, batch.rows, batch.longest)[:, :-1]
        losses_BS = model.token_losses(ids_BS[:, :-1], ids_BS[:, 1:], positions_BS, domains_BS)
        if losses_BS is None or not model.has_output:
            continue
        for row, window in enumerate(members):
            used_S = counts_BS[row, : window.length - 1].to(model.device)
            loss = losses_BS[row, : window.length - 1].double() * used_S
            totals[window.file] += torch.stack([loss.sum(), used_S.sum().double()])
    # One rank of each replica has added its part, the others zeros.
    dist.all_reduce(totals)
    read = {window.file for window in windows}
    return [_file_loss(files[index].prefix, *totals[index].tolist()) for index in sorted(read)]


def positions_and_mask(ids_BS: Tensor, run: RunConfig, eod: int) -> tuple[Tensor, Tensor]:
    """Positions [B, S] and which predictions count [B, S], as megatron-core's datasets have them.

    megatron/core/datasets/gpt_dataset.py:_get_ltor_masks_and_position_ids.
    """
    columns_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
    ends_BS = ids_BS == eod
    counts_BS = ~ends_BS if run.data.eod_mask_loss else torch.ones_like(ends_BS)
    if not run.data.reset_position_ids:
        return columns_BS, counts_BS
    starts_BS = torch.zeros_like(columns_BS)
    starts_BS[:, 1:] = torch.where(ends_BS[:, :-1], columns_BS[:, 1:], 0)
    return columns_BS - starts_BS.cummax(dim=1).values, counts_BS


def _file_loss(prefix: str, total: float, count: float) -> FileLoss:
    if count == 0:
        raise UserError(f"--data-path {prefix}: the run's --eod-mask-loss leaves no token to predict")
    loss = total / count
    if not torch.isfinite(torch.tensor(loss)):
        raise UserError(f"--data-path {prefix}: the loss is {loss}; are the weights damaged?")
    return FileLoss(prefix, loss, int(count))
