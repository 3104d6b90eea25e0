"""Imported once by the fork server: what every rank of every test needs."""

from megatron_moe.runtime.quiet import silence_third_party_warnings

silence_third_party_warnings()

import megatron.core.dist_checkpointing  # noqa: E402
import megatron.core.models.gpt  # noqa: E402
import megatron.core.optimizer  # noqa: E402, F401
