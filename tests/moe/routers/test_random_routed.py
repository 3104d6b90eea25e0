"""`random-routed`: the domain decides on the group of experts, a fixed map on one of them; weight 1."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.routing import domain_groups
from megatron_moe.config.validate import validate
from tests.helpers.distributed import RankFailure, run_ranks
from tests.helpers.domains import NAMES, write_domain_data
from tests.helpers.equivalence import SMOOTH_ADAM
from tests.helpers.models import Trained, assemble, assert_close, start_model, train_and_gather
from tests.helpers.tiny import tiny_run
from tests.helpers.training import train_curve

FLAGS: dict[str, Any] = SMOOTH_ADAM | {
    "router": "random-routed",
    "num_domains": 3,
    "domain_embedding": True,
    "num_experts": (4, 8),
    "router_domain_shares": (2, 1, 1),
}


@pytest.fixture(scope="module")
def domain_data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_domain_data(tmp_path_factory.mktemp("domains"), tiny_data)


@pytest.fixture(scope="module")
def one_process(domain_data: dict[str, Any]) -> Trained:
    return run_ranks(1, train_and_gather, tiny_run(**domain_data, **FLAGS))[0]


def test_groups_are_neighbours_as_large_as_their_shares() -> None:
    assert domain_groups(8, 3, (2, 1, 1)) == [range(4), range(4, 6), range(6, 8)]
    assert domain_groups(8, 2, None) == [range(4), range(4, 8)]


def routed() -> dict[str, Any]:
    """What a router of 4 experts for two domains has, and makes of some tokens."""
    from megatron_moe.moe.inputs import pack_inputs, unpack_inputs
    from megatron_moe.moe.layer import moe_layers

    flags = {"router_domain_shares": (1, 3), "num_domains": 2, "num_experts": (4, 8)}
    (model,) = start_model(tiny_run(**FLAGS | flags, vocab_size=100))
    layer = moe_layers(model)[0]
    torch.manual_seed(0)
    tokens_BS, domains_BS = torch.randint(0, 100, (3, 8)), torch.randint(0, 2, (3, 8))
    layer.router.inputs = unpack_inputs(pack_inputs(tokens_BS, torch.arange(3), domains_BS=domains_BS))
    probs, chosen = layer.router(torch.randn(8, 3, 32, requires_grad=True))
    return {
        "tokens": tokens_BS.numpy(),
        "domains": domains_BS.numpy(),
        "probs": probs.numpy(),
        "chosen": chosen.numpy(),
        "load": layer.router.take_load().tolist(),
        "table": layer.router.token_map.numpy(),
        "rows": model.config.vocab_rows,
        "parameters": len(list(layer.router.parameters())),
        "gradient": probs.requires_grad,
    }


def test_a_token_goes_where_a_loop_sends_it() -> None:
    (found,) = run_ranks(1, routed)
    expected, load = np.zeros((24, 4)), np.zeros(4)
    for place in range(8):
        for row in range(3):
            token, domain = found["tokens"][row, place], found["domains"][row, place]
            expert = int(found["table"][domain * found["rows"] + token, 0])
            assert expert == 0 if domain == 0 else expert in (1, 2, 3)
            expected[place * 3 + row, expert] = 1
            load[expert] += 1
    np.testing.assert_array_equal(found["probs"], expected)
    np.testing.assert_array_equal(found["chosen"], expected == 1)
    assert found["load"] == [*load, 0, 0]
    assert found["parameters"] == 0
    assert not found["gradient"]


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "PP 2 interleaved x EP 2": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "expert_model_parallel_size": 2,
        },
    ),
    "TP 2 x CP 2": (4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_equal_one_process(layout: str, one_process: Trained, domain_data: dict[str, Any]) -> None:
    """Domains reach every stage and every part of a sequence, the routers and the embedding."""
    ranks, sizes = LAYOUTS[layout]
    results = run_ranks(ranks, train_and_gather, tiny_run(**domain_data, **FLAGS, **sizes))
    assert results[0].loads == one_process.loads
    assert results[0].losses == pytest.approx(one_process.losses, rel=2e-6)
    # Sums over ranks in another order, three steps long.
    whole = assemble([result.gradients for result in results])
    assert_close(whole, assemble([one_process.gradients]), relative=5e-5)
    assert (np.abs(whole["embedding.tokentype_embeddings.weight"]).max(axis=1) > 0).all()


def test_every_group_gets_its_domain_and_no_other(one_process: Trained, domain_data: dict[str, Any]) -> None:
    """Counted in the samples themselves: the last of three steps of 8 samples."""
    samples = run_ranks(1, last_step, tiny_run(**domain_data, **FLAGS))[0]
    tokens = np.bincount(samples.reshape(-1), minlength=3).tolist()
    assert min(tokens) > 10
    for layer, experts in ((2, 4), (4, 8)):
        load = one_process.loads[layer]
        assert [sum(load[e] for e in group) for group in domain_groups(experts, 3, (2, 1, 1))] == tokens


def last_step(run: Any) -> Any:
    from megatron_moe.data.datasets import build_datasets
    from megatron_moe.data.tokenizer.load import load_tokenizer, with_vocab_size

    tokenizer = load_tokenizer(run.data)
    stream = build_datasets(with_vocab_size(run, tokenizer), tokenizer, train=True).train
    assert stream is not None
    return np.stack([stream[number]["domains"].numpy() for number in range(16, 24)])


def everything_of_domains(folder: Path, valid: str) -> dict[str, Any]:
    """Scores, continuations and losses of a saved model."""
    from megatron_moe.inference.evaluation import evaluate_files
    from megatron_moe.inference.evaluation_data import open_data
    from megatron_moe.inference.generation import generate
    from megatron_moe.inference.model import load_for_inference
    from megatron_moe.inference.options import SamplingOptions
    from megatron_moe.inference.scoring import score_sequences

    model = load_for_inference(str(folder), tiny_run().parallel)
    texts = [
        model.tokenizer.encode(text) for text in ("北京的工程师", "因为天气很好，上海的老师", "工程师写完了一封信。")
    ]
    sampling = SamplingOptions(greedy=True)
    kinds = {}
    for domains in ([0, 1, 2], [2, 1, 2]):
        options: Any = {"max_new_tokens": 6, "domains": domains}
        cached = generate(model, texts, sampling, **options)
        assert cached == generate(model, texts, sampling, **options, kv_cache=False, micro_batch_size=1)
        kinds[domains[0]] = [row.tolist() for row in score_sequences(model, texts, 2, domains)]
    try:
        score_sequences(model, texts)
    except UserError as error:
        refused = str(error)
    (loss,) = evaluate_files(model, open_data([valid], model.vocab_size))
    # The same windows with domains worked out token by token.
    (file,) = open_data([valid], model.vocab_size)
    ids = np.repeat(np.load(f"{valid}.domains.npy").astype(int), file.lengths)
    total = 0.0
    for start in range(0, file.num_tokens - 1, 32):
        window = torch.from_numpy(file.tokens[start : start + 33].astype(np.int64))[None]
        domains_BS = torch.from_numpy(ids[start : start + 33])[None, :-1]
        losses = model.token_losses(window[:, :-1], window[:, 1:], domains_BS=domains_BS)
        assert losses is not None
        total += float(losses.double().sum())
    names = model.saved.run.model.domain_names
    return {
        "scores": kinds,
        "refused": refused,
        "loss": loss.loss,
        "by hand": total / (file.num_tokens - 1),
        "names": names,
    }


def test_a_saved_model_is_told_the_domain(domain_data: dict[str, Any], tmp_path: Path) -> None:
    flags = {"save": str(tmp_path), "init_method_std": 0.3, "max_position_embeddings": 48, "train_iters": 2}
    run_ranks(1, train_curve, tiny_run(**domain_data | FLAGS | flags))
    (found,) = run_ranks(1, everything_of_domains, tmp_path, domain_data["valid_data_path"][0])
    assert found["names"] == NAMES
    first, second = found["scores"][0], found["scores"][2]
    assert first[1:] == second[1:]
    assert max(abs(a - b) for a, b in zip(first[0], second[0], strict=True)) > 0.1
    assert "the model tells 3 apart" in found["refused"]
    # The same sums in batches of eight and one by one.
    assert found["loss"] == pytest.approx(found["by hand"], rel=1e-6)


def test_what_it_cannot_do_is_refused(domain_data: dict[str, Any], tmp_path: Path) -> None:
    base = {"router": "random-routed", "num_domains": 3, "num_experts": (6, 12)}
    for flags, problem in (
        ({"num_domains": None}, "--router random-routed: needs --num-domains"),
        ({"num_experts": (6, 8)}, "--num-domains 3: every layer's experts must be a multiple of 3, .* layer 4 has 8"),
        ({"router_domain_shares": (2, 3, 2)}, r"--router-domain-shares 2 3 2: .* a multiple of 7, .* layer 2 has 6"),
        ({"router_domain_shares": (2, 1)}, r"--router-domain-shares 2 1: must be 3 numbers of at least 1"),
        ({"moe_router_topk": 2}, "--moe-router-topk 2: must be 1 with --router random-routed"),
    ):
        with pytest.raises(ConfigError, match=problem):
            validate(tiny_run(**base | flags), 1)
    with pytest.raises(
        RankFailure, match=r"train.domains.npy: .* documents are of domain 2 \(forum\), but --num-domains"
    ):
        run_ranks(1, train_curve, tiny_run(**domain_data, **base | {"num_domains": 2}))
    for ending in ("bin", "idx"):
        shutil.copy(f"{domain_data['train_data_path'][0]}.{ending}", tmp_path / f"train.{ending}")
    bare = {"train_data_path": (str(tmp_path / "train"),)}
    with pytest.raises(
        RankFailure, match=r"no file .*train.domains.npy, which says the domain of each document; write"
    ):
        run_ranks(1, train_curve, tiny_run(**domain_data | bare, **base))
