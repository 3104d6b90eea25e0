"""What our model computes with the weights of a foreign checkpoint, put together by its map."""

import torch

from megatron_moe.checkpoint.foreign.model import ForeignModel
from tests.helpers.foreign_checkpoints import Classic

IDS = torch.tensor([5, 17, 99, 3, 3, 42, 64, 11, 7, 118, 0, 23])


def our_logits(opened: list[ForeignModel]) -> list[torch.Tensor]:
    """Runs on a rank of its own: our model with the weights that a foreign checkpoint's map gives it."""
    from megatron_moe.checkpoint.convert.blocks import Box
    from megatron_moe.checkpoint.convert.coverage import check_side
    from megatron_moe.checkpoint.convert.engine import Targets, assemble
    from megatron_moe.config.yaml_io import build_run
    from megatron_moe.model.gpt import build_model
    from megatron_moe.runtime.distributed import start
    from tests.helpers.models import sharded_tensors

    results = []
    torch.set_grad_enabled(False)
    for number, foreign in enumerate(opened):
        run = build_run(foreign.sections)
        if not number:
            start(run.parallel, run.virtual_stages)
        model = build_model(run, inference=True)
        targets, shapes = Targets(foreign.blocks, "ours"), {}
        for entry in sharded_tensors(model):
            key, place = entry.key, tuple(entry.global_offset)
            size = (1,) * entry.prepend_axis_num + tuple(entry.local_shape)
            whole = tuple(entry.global_shape)
            if key.startswith("decoder.layers.") and not key.split(".")[2].isdigit():
                key = key.replace("decoder.layers.", f"decoder.layers.{place[0]}.")
                place, size, whole = place[1:], size[1:], whole[1:]
            shapes[key] = whole
            part = assemble(targets, Box(key, place, size), foreign.source, entry.data.dtype)
            entry.data.copy_(part.view(entry.data.shape))
        check_side(foreign.blocks, "ours", shapes, "our model")
        positions = torch.arange(len(IDS))[None]
        output = model[0](input_ids=IDS[None], position_ids=positions, attention_mask=None)
        results.append(output[0].float())
    return results


def largest_difference(model: Classic, weights: dict[str, torch.Tensor], ours: torch.Tensor) -> float:
    expected = model.logits(weights, IDS)
    return float((ours[:, : model.vocab] - expected).abs().max())
