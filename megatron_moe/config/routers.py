"""The registry of routers: what `--router` may be, and which class stands for it. Names only; nothing is imported.

To add a router: one file in `moe/routers/` with one class (a subclass of `routers/base.py:CountingRouter`, or of
`topk.py:TopKRouter` to keep its gate and losses), one line here, and, if it has flags of its own, its fields and
`MEANINGLESS` entry in `config/routing.py`. docs/moe.md shows it step by step.
"""

from typing import TYPE_CHECKING, Literal

ROUTERS: dict[str, str] = {
    "topk": "topk.TopKRouter",
    "large-margin": "large_margin.LargeMarginRouter",
    "recycle": "recycle.RecycleRouter",
    "random-routed": "random_routed.RandomRoutedRouter",
    "hash": "hash.HashRouter",
    "base": "base_layers.BaseLayersRouter",
    "expert-choice": "expert_choice.ExpertChoiceRouter",
    "token-embedding": "token_embedding.TokenEmbeddingRouter",
}
"""`--router` -> file and class in `megatron_moe/moe/routers/`."""

if TYPE_CHECKING:
    type RouterName = str
else:
    RouterName = Literal[tuple(ROUTERS)]
