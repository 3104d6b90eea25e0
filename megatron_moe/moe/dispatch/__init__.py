"""How tokens travel to the ranks of their experts and back: dispatchers, by the name that
`--moe-token-dispatcher-type` gives, and what they are made of.

They have upstream's interface (`megatron/core/transformer/moe/token_dispatcher.py:MoETokenDispatcher`).
"""
