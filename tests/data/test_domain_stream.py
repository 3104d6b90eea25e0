"""Streams where domains take turns: samples of one domain each, the right ones, for ever, and what is refused.

Documents are told apart by the only token id they consist of.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config.base import ConfigError
from megatron_moe.config.domain_placement import Turns, stream_part
from megatron_moe.config.run import RunConfig
from megatron_moe.data.datasets import build_data_iterator, build_datasets
from megatron_moe.data.domain_stream import DomainStream
from megatron_moe.data.indexed import open_indexed
from megatron_moe.data.sample_stream import change_of_data
from megatron_moe.data.tokenizer.load import load_tokenizer
from tests.data.test_domain_samples import DATA, run_on, write
from tests.helpers.tiny import tiny_run

SEQ = 24


GROUPED = DATA | {
    "num_domains": 3,
    "router": "random-routed",
    "moe_token_dispatcher_type": "grouped",
    "moe_domain_grouped": True,
    "num_experts": (6, 12),
    "split": "100",
    "seq_length": SEQ,
}


def grouped_on(*words: Path | str, **flags: Any) -> RunConfig:
    return tiny_run(**(GROUPED | flags), data_path=tuple(map(str, words)))


def stream_of(run: RunConfig) -> DomainStream:
    stream = build_datasets(run, load_tokenizer(run.data, 500), train=True).train
    assert isinstance(stream, DomainStream)
    return stream


@pytest.mark.parametrize("split", ["100", "60,40"])
def test_samples_are_of_one_domain_in_turn(tmp_path: Path, split: str) -> None:
    """In two epochs of a blend of two files, whole or a share of their documents."""
    domain_of = write(tmp_path, "one", 0) | write(tmp_path, "two", 120)
    run = grouped_on(tmp_path / "one", tmp_path / "two", split=split)
    stream = stream_of(run)
    for position in range(6 * max(stream.epoch_sizes)):
        sample = stream[position]
        assert set(sample["domains"].tolist()) == {position % 3}
        assert {domain_of[token] for token in sample["tokens"].tolist()} == {position % 3}
        assert domain_of[int(sample["labels"][-1])] == position % 3, "the last label belongs to the domain too"
        assert int(sample["samples"]) == position


def test_a_domain_has_the_samples_of_the_documents_it_is_made_of(tmp_path: Path) -> None:
    """As many samples as its tokens fill, each token once an epoch, and no order that depends on other domains."""
    domain_of = write(tmp_path, "one", 0)
    run = grouped_on(tmp_path / "one")
    stream = stream_of(run)
    parts = [identity.split(" ")[0] for identity in stream.identity["files"]]
    assert parts == ["a", "b", "c"]
    whole = build_datasets(run_on(tmp_path / "one"), load_tokenizer(run.data, 500), train=True).train
    assert whole is not None
    held = [0, 0, 0]
    epoch = whole._epochs[0]  # type: ignore[union-attr]
    for document in epoch.document_index:
        tokens = epoch.dataset[document]
        held[domain_of[int(tokens[0])]] += len(tokens)
    assert stream.epoch_sizes == [(tokens - 1) // SEQ for tokens in held]
    for domain, size in enumerate(stream.epoch_sizes):
        first, second = (
            sorted(tuple(stream[3 * number + domain]["tokens"].tolist()) for number in range(start, start + size))
            for start in (0, size)
        )
        assert first == second, "an epoch has all of the domain's samples once"


def test_shares_of_domains_are_shares_of_a_step(tmp_path: Path) -> None:
    write(tmp_path, "one", 0)
    stream = stream_of(grouped_on(tmp_path / "one", router_domain_shares=(3, 1, 2), global_batch_size=12))
    assert [int(stream[position]["domains"][0]) for position in range(12)] == [0, 0, 0, 1, 2, 2] * 2
    sizes = stream.epoch_sizes
    assert stream.describe() == (
        f"every step reads a 3 of 6 (an epoch is {sizes[0]} samples), b 1 of 6 (an epoch is {sizes[1]} samples), c "
        f"2 of 6 (an epoch is {sizes[2]} samples)"
    )
    places = [stream.locate(position) for position in range(60)]
    for domain, share in enumerate((3, 1, 2)):
        assert [number for owner, number in places if owner == domain] == list(range(share * 10))


def test_files_keep_their_shares_inside_a_domain(tmp_path: Path) -> None:
    """A file gives a domain its weight times the domain's share of its tokens."""
    domain_of = write(tmp_path, "one", 0) | write(tmp_path, "two", 120)
    stream = stream_of(grouped_on("0.25", tmp_path / "one", "0.75", tmp_path / "two"))
    files = [open_indexed(str(tmp_path / name)) for name in ("one", "two")]
    for domain in range(3):
        tokens = [
            sum(
                int(length)
                for length, document in zip(file.lengths, range(first, first + 120), strict=True)
                if domain_of[document] == domain
            )
            for file, first in zip(files, (0, 120), strict=True)
        ]
        expected = [
            weight * held / file.num_tokens for weight, held, file in zip((0.25, 0.75), tokens, files, strict=True)
        ]
        weights = stream.identity["weights"][2 * domain : 2 * domain + 2]
        assert weights == pytest.approx([value / sum(expected) for value in expected])
        own = [stream._streams[domain].locate(number).file for number in range(2000)]
        assert own.count(1) / 2000 == pytest.approx(weights[1], abs=2e-3)


@pytest.mark.parametrize("ranks", [1, 3, 6])
def test_ranks_of_every_layout_read_the_same_steps(tmp_path: Path, ranks: int) -> None:
    """Through the iterators that training uses; resumed after two steps."""
    write(tmp_path, "one", 0)
    run = grouped_on(tmp_path / "one", expert_model_parallel_size=ranks)
    stream = stream_of(run)
    step = 12
    for consumed in (0, 2 * step):
        read = []
        for replica in range(ranks):
            part = stream_part(run, replica, ranks)
            batches = build_data_iterator(
                stream,
                consumed_samples=consumed,
                micro_batch_size=2,
                dp_rank=part.index,
                dp_size=part.count,
                turns=part.turns,
            )
            own = list(itertools.islice(batches, step // ranks // 2))
            read += [int(number) for batch in own for number in batch["samples"]]
            domains = {int(domain) for batch in own for domain in batch["domains"].unique()}
            assert domains == ({0, 1, 2} if ranks == 1 else {replica * 3 // ranks})
        assert sorted(read) == list(range(consumed, consumed + step))


def test_without_the_flag_the_order_is_what_it_was() -> None:
    assert [Turns().number(Turns().begin(5) + place) for place in range(4)] == [5, 6, 7, 8]


def test_other_data_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path, "one", 0)
    run = grouped_on(tmp_path / "one")
    stream = stream_of(run)
    plain = build_datasets(run_on(tmp_path / "one"), load_tokenizer(run.data, 500), train=True).train
    other = stream_of(grouped_on(tmp_path / "one", router_domain_shares=(2, 1, 1), num_experts=(8, 16)))
    assert plain is not None
    assert change_of_data(stream.identity, stream_of(run).identity) is None
    assert change_of_data(plain.identity, stream.identity) is not None
    assert change_of_data(stream.identity, plain.identity) is not None
    assert change_of_data(stream.identity, other.identity) == "shares of domains (1 before, 2 now)"


def test_a_domain_without_enough_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "one", 0, ("a", "b"))
    with pytest.raises(ConfigError) as error:
        stream_of(grouped_on(tmp_path / "one"))
    assert str(error.value) == (
        "--moe-domain-grouped: the training part of the token files has no text of domain 2; all --num-domains 3 need "
        "some"
    )
    with pytest.raises(
        ConfigError,
        match=r"--seq-length 4000: the training part of .*one holds only \d+ tokens of domain a "
        r"\(--moe-domain-grouped\), a sample takes 4001; give a larger share in --split, more text or "
        r"a shorter --seq-length",
    ):
        stream_of(grouped_on(tmp_path / "one", num_domains=2, seq_length=4000))
