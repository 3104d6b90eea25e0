"""Which programs serve an export, and what stands in their way. Pure.

Measured with tiny models in float32 on a CPU: vLLM 0.32 and llama.cpp of llama-cpp-python 0.3.36 gave the tokens and
log-probabilities of transformers for every class here, but for the models that are named below. SGLang was not run.
"""

from megatron_moe.checkpoint.hf.families.native import sums_to_one
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.layout import expert_layout

REMOTE_TYPE = "megatron_moe"
# SGLang 0.5.23, srt/models.
_SGLANG = frozenset({"mixtral", "qwen2_moe", "granitemoeshared", "glm4_moe"})
# vllm/model_executor/models: they take hidden_size / num_attention_heads, whatever head_dim says.
_VLLM_OWN_HEADS = frozenset({"qwen2", "qwen2_moe", "olmoe", "granitemoeshared"})
# llama.cpp's converter (conversion/base.py:get_vocab_base_pre) takes only byte-level vocabularies whose hash it knows.
_KNOWN_VOCABULARIES = frozenset({"qwen2_moe", "qwen3_moe", "glm4_moe", "olmoe", "deepseek_v3", "gpt2"})
YES = "yes"


def served_by(run: RunConfig, model_type: str) -> list[tuple[str, str]]:
    """Programs, and what each makes of the run's model as an export of this class: `yes...` or `no: why`."""
    if model_type == REMOTE_TYPE:
        return [
            ("transformers", f"{YES}, with `trust_remote_code=True`"),
            ("vLLM, SGLang", "no: vLLM's back end for code of a folder refuses it; SGLang has its own classes"),
            ("llama.cpp", "no: it runs no code of a folder"),
        ]
    return [
        ("transformers", f"{YES}, its own class"),
        ("vLLM", _vllm(run, model_type)),
        ("SGLang", f"{YES}, lists the class; not tried" if model_type in _SGLANG else "not tried"),
        ("llama.cpp", _llama_cpp(run, model_type)),
    ]


def _vllm(run: RunConfig, model_type: str) -> str:
    model = run.model
    if model_type in _VLLM_OWN_HEADS and model.head_dim * model.num_attention_heads != model.hidden_size:
        return f"no: takes heads of hidden size / heads for granted, the model's have {model.head_dim} channels"
    if model_type == "deepseek_v3":
        return f"{YES}; on a CPU with custom_ops -rotary_embedding, or it rotates wrongly"
    return YES


def _llama_cpp(run: RunConfig, model_type: str) -> str:
    model, sums = run.model, run.moe.num_experts is not None and sums_to_one(run)
    if model_type in ("qwen2_moe", "olmoe") and sums:
        return "no: takes it for granted that the weights of a token's experts do not sum to 1"
    if model_type == "qwen3_moe" and not sums:
        return "no: takes it for granted that the weights of a token's experts sum to 1"
    if model_type == "qwen2_moe" and 0 in expert_layout(run).experts_per_layer:
        return "no: its converter knows no dense layers in this class"
    if model_type == "olmoe" and model.query_groups != model.num_attention_heads:
        return "no: takes as many key/value heads as heads for granted"
    if model_type == "gpt2" and not model.gelu_tanh:
        return "no: computes GELU by tanh (--gelu-tanh)"
    if model_type in _KNOWN_VOCABULARIES:
        return f"{YES}, but its converter asks for a published byte-level vocabulary; SentencePiece's it refuses here"
    return YES
