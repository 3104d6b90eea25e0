"""A loaded model that computes logits and losses under any parallel layout.

    model = load_for_inference("runs/tiny")
    logits_BSV = model.logits([model.tokenizer.encode("北京")])

One process needs nothing else. Under torchrun every rank makes the same calls with the same arguments.

Shape legend: B = sequences, S = tokens of each, H = hidden size, V = vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.tensor_parallel.random import _MODEL_PARALLEL_RNG_TRACKER_NAME, get_cuda_rng_tracker
from torch import Tensor

from megatron_moe.checkpoint.layout import is_hugging_face
from megatron_moe.checkpoint.load import check_stored_size, load_model
from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.data.tokenizer.load import Tokenizer
from megatron_moe.inference.options import LoadOptions
from megatron_moe.inference.saved_model import SavedModel, open_checkpoint
from megatron_moe.model.gpt import build_model
from megatron_moe.model.transformer_config import DTYPES
from megatron_moe.moe.inputs import pack_inputs
from megatron_moe.runtime.distributed import environment_world_size, start


def load_for_inference(
    run_dir: str,
    parallel: ParallelConfig | None = None,
    *,
    iteration: int | None = None,
    eval_fp32: bool = False,
) -> "InferenceModel":
    """Load a checkpoint, and start the process groups if they are not started yet.

    Args:
        run_dir: a run's directory.
        parallel: layout over the processes. Default: one process holds the whole model.
        iteration: step of the checkpoint. Default: the latest.
        eval_fp32: compute in float32 instead of the run's precision.

    Raises:
        ConfigError: the layout does not fit.
        UserError: there is no such checkpoint, or it is damaged.
    """
    options = LoadOptions(load=run_dir, iteration=iteration, eval_fp32=eval_fp32)
    return load_saved(open_checkpoint(options, parallel or ParallelConfig(), environment_world_size()))


def load_saved(saved: SavedModel) -> "InferenceModel":
    """Build the model of an opened checkpoint and read its weights; every rank calls it.

    Raises:
        ConfigError: process groups of another layout are running.
        UserError: the checkpoint is damaged.
    """
    if dist.is_initialized():
        _check_running_layout(saved.run.parallel)
    else:
        start(saved.run.parallel, trains=False)
    generators = get_cuda_rng_tracker()
    if not generators.is_initialized():
        # megatron-core's own attention asks for its generator, though nothing is dropped here
        # (transformer/dot_product_attention.py:DotProductAttention.forward).
        generators.add(_MODEL_PARALLEL_RNG_TRACKER_NAME, saved.run.training.seed)
    # Without an interleaved pipeline a rank holds one chunk.
    if is_hugging_face(saved.folder):
        from megatron_moe.checkpoint.hf.loading import load_weights

        chunks: list[Any] = build_model(saved.run, inference=True, initialize=False)
        load_weights(saved.run, chunks, saved.folder)
    else:
        check_stored_size(saved.run, saved.folder)
        chunks = build_model(saved.run, inference=True, initialize=False)
        load_model(chunks, saved.folder)
    return InferenceModel(saved, chunks[0].eval())


def _check_running_layout(parallel: ParallelConfig) -> None:
    running = {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert-tensor": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    wanted = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "expert": parallel.expert_model_parallel_size,
        "expert-tensor": parallel.expert_tensor_size,
    }
    if running != wanted:
        raise ConfigError(f"parallel sizes {wanted}: this process runs with {running} already")


class InferenceModel:
    """This rank's part of a model, and how it works together with the other ranks'.

    Attributes:
        saved: where it came from.
        replica: this data-parallel replica's number.
        replicas: how many replicas there are.
        is_main: whether this rank (global rank 0) speaks and writes.
        has_output: whether this rank is the one of its replica that keeps results: on the last pipeline stage,
            tensor-parallel rank 0.
    """

    def __init__(self, saved: SavedModel, chunk: torch.nn.Module) -> None:
        self.saved = saved
        self.device = next(chunk.parameters()).device
        self.replica = parallel_state.get_data_parallel_rank()
        self.replicas = parallel_state.get_data_parallel_world_size()
        self.is_main = dist.get_rank() == 0
        self._chunk: Any = chunk
        self._first = parallel_state.is_pipeline_first_stage()
        self._last = parallel_state.is_pipeline_last_stage()
        self.has_output = self._last and parallel_state.get_tensor_model_parallel_rank() == 0
        self._group = parallel_state.get_model_parallel_group()
        # The group's ranks go through the tensor-parallel ranks of the first stage, then of the next.
        last_stage = parallel_state.get_pipeline_model_parallel_world_size() - 1
        first_of_last = last_stage * parallel_state.get_tensor_model_parallel_world_size()
        self._output_rank = dist.get_process_group_ranks(self._group)[first_of_last]

    @property
    def module(self) -> torch.nn.Module:
        """This rank's part of the model itself."""
        module: torch.nn.Module = self._chunk
        return module

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with."""
        return self.saved.tokenizer

    @property
    def vocab_size(self) -> int:
        """V: ids that texts may hold, without the rows that only pad the embedding."""
        return self.saved.vocab_size

    def logits(self, ids: Tensor | Sequence[Sequence[int]], domains_BS: Tensor | None = None) -> Tensor:
        """Logits of every next token; a collective over all ranks, with the same `ids` on each.

        Args:
            ids: [B, S], sequences of one length.
            domains_BS: [B, S] of every token, or [B, 1] of every sequence; a model with domains needs them.

        Returns:
            [B, S, V] float32 on this rank's device, on every rank.

        Raises:
            UserError: an id is not in the vocabulary, or a sequence is empty or too long.
        """
        ids_BS = torch.as_tensor(ids, dtype=torch.long, device=self.device)
        if ids_BS.ndim != 2 or ids_BS.shape[1] < 1 or ids_BS.shape[1] > self.saved.max_positions:
            shape = tuple(ids_BS.shape)
            raise UserError(f"ids of shape {shape}: must be [B, S] with S from 1 to {self.saved.max_positions}")
        if int(ids_BS.min()) < 0 or int(ids_BS.max()) >= self.vocab_size:
            raise UserError(f"ids from {int(ids_BS.min())} to {int(ids_BS.max())}: must be in 0..{self.vocab_size - 1}")
        output = self._forward(ids_BS, domains_BS=domains_BS, runtime_gather_output=True)
        logits_BSV = None if output is None else output[..., : self.vocab_size].float().contiguous()
        return self.share(logits_BSV, (*ids_BS.shape, self.vocab_size), torch.float32)

    def token_losses(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor | None = None,
        domains_BS: Tensor | None = None,
    ) -> Tensor | None:
        """Negative log-probability of every label, exactly as the training loss has it.

        The probabilities sum to 1 over the padded vocabulary: the rows that only pad the embedding take part, as in
        training, and hold next to nothing once a model has been trained a little.

        Args:
            ids_BS: [B, S], the same on every rank of this replica, and of the same shape on every replica.
            labels_BS: [B, S] the tokens that follow.
            positions_BS: [B, S]. Default: 0, 1, 2, ...
            domains_BS: as for `logits`.

        Returns:
            [B, S] nats, float32, on ranks of the last pipeline stage; None on the others.
        """
        ids_BS, labels_BS = ids_BS.to(self.device), labels_BS.to(self.device)
        return self._forward(ids_BS, positions_BS, domains_BS=domains_BS, labels=labels_BS)

    def next_logits(
        self, ids_BS: Tensor, context: StaticInferenceContext | None = None, domains_BS: Tensor | None = None
    ) -> Tensor | None:
        """Logits after the last token.

        Args:
            ids_BS: [B, S] the whole text; with a context what it has not seen yet: the beginning of the text in the
                first call, one token in every later one.
            context: keeps keys and values from call to call, see `new_context`.
            domains_BS: as for `logits`.

        Returns:
            [B, V] float32 on ranks of the last pipeline stage, without the rows that only pad the embedding; None on
            the others.
        """
        begin = 0 if context is None else context.sequence_len_offset
        # megatron-core masks nothing once there is a cache (attention.py:_adjust_key_value_for_inference).
        assert begin == 0 or ids_BS.shape[1] == 1
        positions_S = torch.arange(begin, begin + ids_BS.shape[1], device=self.device)
        output = self._forward(
            ids_BS.to(self.device),
            positions_S.expand_as(ids_BS),
            domains_BS=domains_BS,
            inference_context=context,
            output_processor=_last_logits,
        )
        if context is not None:
            context.increment_sequence_len_offset(ids_BS.shape[1])
        return None if output is None else output[:, : self.vocab_size].float()

    def new_context(self, rows: int, width: int) -> StaticInferenceContext:
        """Room for the keys and values of B = `rows` texts of up to S = `width` tokens."""
        return StaticInferenceContext(max_batch_size=rows, max_sequence_length=width)

    def share(self, value: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What the replica's output rank holds, on every rank of the replica.

        Args:
            value: the tensor on the output rank; ignored on the others.
            shape, dtype: of the tensor, known to all.
        """
        if self.has_output:
            assert value is not None
            result = value.contiguous()
        else:
            result = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        dist.broadcast(result, src=self._output_rank, group=self._group)
        return result

    @torch.no_grad()
    def _forward(
        self, ids_BS: Tensor, positions_BS: Tensor | None = None, domains_BS: Tensor | None = None, **options: Any
    ) -> Tensor | None:
        """Forward pass through all stages; the output on the last one."""
        domains = self.saved.run.model.num_domains
        if domains_BS is None and (domains or 1) > 1:
            raise UserError(f"domains: the model tells {domains} apart; give the domain of every text")
        if domains_BS is not None:
            domains_BS = domains_BS.to(self.device).expand_as(ids_BS)
        if positions_BS is None:
            positions_BS = torch.arange(ids_BS.shape[1], device=self.device).expand_as(ids_BS)
        if not self._first:
            self._chunk.set_input_tensor(self._receive(ids_BS.shape))
        rows_B = torch.arange(ids_BS.shape[0], device=self.device)
        # Routers are not told of `positions_BS`, which may start afresh within a row.
        context = options.get("inference_context")
        first_place = 0 if context is None else context.sequence_len_offset
        inputs = pack_inputs(ids_BS, rows_B, domains_BS=domains_BS, first_place=first_place)
        output = self._chunk(ids_BS, positions_BS.to(self.device), None, padding_mask=inputs, **options)
        if self._last:
            return output
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group=group)
        return None

    def _receive(self, shape: torch.Size) -> Tensor:
        """[S, B, H] from the stage before."""
        rows, width = shape
        run = self.saved.run
        hidden_SBH = torch.empty(
            width, rows, run.model.hidden_size, dtype=DTYPES[run.training.precision], device=self.device
        )
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.recv(hidden_SBH, parallel_state.get_pipeline_model_parallel_prev_rank(), group=group)
        return hidden_SBH


def _last_logits(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Tensor:
    """[B, V] over the padded vocabulary, from hidden states [S, B, H]: logits of other positions are not computed.

    megatron-core calls it in place of its own output layer (models/gpt/gpt_model.py:GPTModel._postprocess).
    """
    logits_1BV, _ = output_layer(hidden_states[-1:], weight=output_weight, runtime_gather_output=True)
    return logits_1BV[0]
