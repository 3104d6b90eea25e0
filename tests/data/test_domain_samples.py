"""The domain of every token of a sample: documents are told apart by the only token id they consist of."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe.config.base import UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.data.datasets import build_data_iterator, build_datasets, with_domain_names
from megatron_moe.data.preprocess import Preprocessing, preprocess
from megatron_moe.data.sample_stream import SampleStream
from megatron_moe.data.tokenizer.load import load_tokenizer
from tests.helpers.tiny import tiny_run

KINDS = ("a", "b", "c")
DATA = {"tokenizer_type": "NullTokenizer", "vocab_size": 500}


def write(folder: Path, name: str, first: int, kinds: tuple[str, ...] = KINDS) -> dict[int, int]:
    """A pair of 120 documents, each of one id from `first` on, in up to three sequences; the domain of every id."""
    rng = random.Random(first)
    domain_of, lines = {}, []
    for index in range(first, first + 120):
        kind = rng.choice(kinds)
        domain_of[index] = kinds.index(kind)
        text = "\n".join(" ".join([str(index)] * rng.choice([1, 3, 40])) for _ in range(rng.choice([1, 3])))
        lines.append(json.dumps({"text": text, "kind": kind}) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines))
    job = Preprocessing(
        data=DataConfig(tokenizer_type="NullTokenizer"),
        vocab_size=500,
        append_eod=False,
        split_sentences=True,
        domain_key="kind",
        domains=kinds,
    )
    preprocess([folder / f"{name}.jsonl"], folder / name, job)
    return domain_of


def stream_of(run: RunConfig) -> SampleStream:
    stream = build_datasets(run, load_tokenizer(run.data, 500), train=True).train
    assert stream is not None
    return stream


def run_on(*prefixes: Path, domains: int | None = 3, split: str = "100") -> RunConfig:
    uses = {"num_domains": domains, "domain_embedding": True} if domains else {}
    return tiny_run(**DATA, data_path=tuple(map(str, prefixes)), split=split, seq_length=24, **uses)


@pytest.mark.parametrize("split", ["100", "40,60"])
def test_a_token_has_the_domain_of_its_document(tmp_path: Path, split: str) -> None:
    """In two epochs of a blend of two files, whole or a share of their documents."""
    domain_of = write(tmp_path, "one", 0) | write(tmp_path, "two", 120)
    stream = stream_of(run_on(tmp_path / "one", tmp_path / "two", split=split))
    look_up = torch.tensor([domain_of[index] for index in range(240)])
    several = 0
    for number in range(2 * sum(stream.epoch_sizes)):
        sample = stream[number]
        assert sample["domains"].dtype == torch.int64
        torch.testing.assert_close(sample["domains"], look_up[sample["tokens"]], rtol=0, atol=0)
        several += len(set(sample["domains"].tolist())) > 1
    assert several > 20, "samples of more than one document are among them"


def test_batches_carry_them_and_others_do_not_change(tmp_path: Path) -> None:
    write(tmp_path, "one", 0)
    with_domains = stream_of(run_on(tmp_path / "one"))
    without = stream_of(run_on(tmp_path / "one", domains=None))
    sizes = {"consumed_samples": 5, "micro_batch_size": 3, "dp_rank": 0, "dp_size": 1}
    for workers in (0, 1):
        batch = next(build_data_iterator(with_domains, **sizes, num_workers=workers))
        plain = next(build_data_iterator(without, **sizes))
        assert batch["domains"].shape == (3, 24)
        assert torch.equal(batch["domains"][1], with_domains[6]["domains"])
        del batch["domains"]
        assert {name: tensor.tolist() for name, tensor in batch.items()} == {
            name: tensor.tolist() for name, tensor in plain.items()
        }
    assert with_domains.identity == without.identity | {"domains": list(KINDS)}


def test_names_come_from_the_data_and_must_agree(tmp_path: Path) -> None:
    write(tmp_path, "one", 0)
    write(tmp_path, "two", 120, ("a", "c", "b"))
    run = run_on(tmp_path / "one")
    named = with_domain_names(run, stream_of(run))
    assert named.model.domain_names == KINDS
    assert with_domain_names(named, stream_of(named)) is named
    with pytest.raises(UserError, match=r"--domain-names a b c: the token files have a c b"):
        with_domain_names(named, stream_of(run_on(tmp_path / "two")))
    with pytest.raises(
        UserError, match=r"--data-path .*two: its domains are a, c, b, those of .*one a, b, c; make both"
    ):
        stream_of(run_on(tmp_path / "one", tmp_path / "two"))
    with pytest.raises(
        UserError, match=r"one.domains.npy: \d+ documents are of domain 2 \(c\), but --num-domains is 2"
    ):
        stream_of(run_on(tmp_path / "one", domains=2))
    ids = np.load(tmp_path / "one.domains.npy")
    np.save(tmp_path / "one.domains.npy", ids[:-1])
    with pytest.raises(UserError, match=r"one.domains.npy has 119 documents, the pair 120"):
        stream_of(run_on(tmp_path / "one"))
