"""Flags of generate, score and evaluate, apart from the parallel sizes (`config/parallel.py`). No torch here."""

from dataclasses import dataclass

from megatron_moe.config.base import ConfigError, require, require_positive


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Which weights are used, and in which precision."""

    load: str
    """A run's directory (its --save), whose checkpoint may have been written under any parallel layout, or a folder of
    Hugging Face."""
    iteration: int | None = None
    """Step of the checkpoint. Default: the latest."""
    eval_fp32: bool = False
    """Compute in float32. Default: the precision of the run."""

    def __post_init__(self) -> None:
        require(self.iteration is None or self.iteration >= 0, "iteration", self.iteration, "at least 0")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen."""

    greedy: bool = False
    """Always take the most probable token, like --temperature 0."""
    temperature: float | None = None
    """Divides the logits; below 1 sharpens, above 1 flattens, 0 is --greedy. Default: 1."""
    top_k: int | None = None
    """Choose among this many most probable tokens. Default: among all."""
    top_p: float | None = None
    """Choose among the fewest most probable tokens that have this much probability together. Default: all."""
    seed: int = 1234
    """Seed of the choice. A sample depends on it, its prompt's number and its own number, not on the batch or
    the parallel layout."""

    def __post_init__(self) -> None:
        temperature, top_k, top_p = self.temperature, self.top_k, self.top_p
        require(temperature is None or temperature >= 0.0, "temperature", temperature, "at least 0")
        require_positive(self, "top_k")
        require(top_p is None or 0.0 < top_p <= 1.0, "top_p", top_p, "greater than 0 and at most 1")
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        if self.greedy and temperature:
            raise ConfigError(f"--temperature {temperature}: does not go with --greedy")
        for name, value in (("--top-k", top_k), ("--top-p", top_p)):
            if self.is_greedy and value is not None:
                raise ConfigError(f"{name} {value}: does not go with --greedy (or --temperature 0)")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn at random."""
        return self.greedy or self.temperature == 0.0

    @property
    def divisor(self) -> float:
        """The temperature after the default is applied; only for sampling."""
        return 1.0 if self.temperature is None else self.temperature


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What is continued, and where to."""

    prompt: tuple[str, ...] | None = None
    """Texts to continue. An empty one starts a new document."""
    prompt_file: str | None = None
    """File of prompts instead: JSON Lines with a field `text` if its name ends in .jsonl (or .jsonl.gz),
    otherwise one prompt a line."""
    output: str | None = None
    """Write JSON Lines (prompt, sample, text, ids, finish_reason) to this file instead of the screen."""
    max_new_tokens: int = 64
    """Stop after this many tokens, if no end of document came before."""
    num_samples: int = 1
    """Continuations of each prompt."""
    domain: str | None = None
    """Name or number of the texts' domain, for a model that knows domains; a field `domain` in a .jsonl file of prompts
    comes before it."""
    micro_batch_size: int = 8
    """Sequences a data-parallel replica works on at once."""
    kv_cache: bool = True
    """Keep keys and values of earlier tokens. Without it every token computes the whole text again, with the
    same result: a check, not a way to work."""

    def __post_init__(self) -> None:
        require_positive(self, "max_new_tokens", "num_samples", "micro_batch_size")
        if (self.prompt is None) == (self.prompt_file is None):
            raise ConfigError("--prompt or --prompt-file: give one of them")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What is scored, and where to."""

    input: str
    """JSON Lines, every line with a field `text` or a field `ids` (.jsonl, .jsonl.gz)."""
    output: str
    """JSON Lines: ids, logprobs, sum, mean, perplexity; one line for every line of the input, in order."""
    domain: str | None = None
    """Name or number of the texts' domain, for a model that knows domains; a field `domain` of a line comes before
    it."""
    micro_batch_size: int = 8
    """Sequences a data-parallel replica works on at once."""

    def __post_init__(self) -> None:
        require_positive(self, "micro_batch_size")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What is evaluated."""

    data_path: tuple[str, ...]
    """Prefixes of .bin/.idx pairs (tools/preprocess_data.py writes them). Every token is read once, in
    sequences of the run's --seq-length; there are no weights."""
    eval_iters: int | None = None
    """Stop after this many batches of --micro-batch-size sequences. Default: read everything."""
    micro_batch_size: int = 8
    """Sequences a data-parallel replica works on at once."""
    output: str | None = None
    """Write the result to this file as JSON as well."""

    def __post_init__(self) -> None:
        require_positive(self, "eval_iters", "micro_batch_size")
