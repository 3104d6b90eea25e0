"""A stage as a step of a datatrove pipeline; a module of its own, since it needs datatrove to be imported."""

from typing import Any

from datatrove.pipeline.base import PipelineStep

from megatron_moe.data.wudao.distributed import do_rank
from megatron_moe.data.wudao.job import StageName


class StageStep(PipelineStep):
    """Does the task of a stage that has the number of the rank.

    Args:
        output: the job's folder.
        stage: which stage.
    """

    name = "clean_wudao"
    type = "stage"

    def __init__(self, output: str, stage: StageName) -> None:
        super().__init__()
        self.output = output
        self.stage = stage

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Do the task; documents do not pass between steps."""
        do_rank(self.output, self.stage, rank)
        return data
