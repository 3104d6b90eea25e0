"""Fixed maps: what they depend on, how even they are."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe.config.base import UserError
from megatron_moe.moe.token_map import draw_balanced, draw_uniform, read_counts

# How often the tokens of a text occur, nearly: the second half as often as its rank says, no more than chance allows.
ZIPF = (20_000 / torch.arange(1, 3001)).long()


def test_a_map_is_that_of_its_keys() -> None:
    for draw in (lambda *keys: draw_uniform(500, 8, *keys), lambda *keys: draw_balanced(ZIPF[:500], 8, *keys)):
        first = draw(1, 2)
        assert torch.equal(first, draw(1, 2))
        # Another seed, layer or domain: about one in eight agrees by chance.
        for keys in ((2, 2), (1, 3), (1, 2, 0)):
            assert 0.05 < (first == draw(*keys)).float().mean() < 0.25
    # A token id's expert does not depend on how many others there are.
    assert torch.equal(draw_uniform(900, 8, 1, 2)[:500], draw_uniform(500, 8, 1, 2))


@pytest.mark.parametrize("experts", [3, 8, 64])
def test_uniform_maps_give_every_expert_as_many_ids(experts: int) -> None:
    """Chi-square of the ids of each expert, for every one of three different experts of an id."""
    ids, topk = 40_000, 3
    drawn = draw_uniform(ids, experts, 7, 1, topk=topk)
    assert drawn.dtype == torch.int32
    assert int(drawn.min()) == 0
    assert int(drawn.max()) == experts - 1
    ordered = drawn.sort(dim=1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all(), "an id's experts differ"
    for place in range(topk):
        counts = torch.bincount(drawn[:, place], minlength=experts).double()
        chi_square = float(((counts - ids / experts) ** 2 / (ids / experts)).sum())
        # Mean and variance of chi-square are its degrees of freedom and twice them; five deviations.
        free = experts - 1
        assert chi_square < free + 5 * (2 * free) ** 0.5


@pytest.mark.parametrize(("experts", "topk"), [(4, 1), (16, 1), (16, 2), (8, 8)])
def test_balanced_maps_differ_by_the_most_frequent_id_at_most(experts: int, topk: int) -> None:
    map_VK = draw_balanced(ZIPF, experts, 3, 1, topk=topk).long()
    load = torch.zeros(experts, dtype=torch.long).index_add(0, map_VK.reshape(-1), ZIPF.repeat_interleave(topk))
    assert int(load.sum()) == topk * int(ZIPF.sum())
    assert int(load.max() - load.min()) <= int(ZIPF.max())
    # The bound holds for any text; in this one the rare ids fill what the frequent ones leave.
    if experts * int(ZIPF.max()) < topk * int(ZIPF.sum()):
        assert int(load.max() - load.min()) <= 50
    ordered = map_VK.sort(dim=1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all(), "an id's experts differ"


def test_balanced_maps_of_two_layers_put_different_ids_together() -> None:
    """The most frequent ids too: in exact order of their counts, pairs of neighbours would meet in every layer."""

    def together(layer: int) -> torch.Tensor:
        expert_V = draw_balanced(ZIPF[:64], 8, 3, layer)[:, 0]
        return expert_V[:, None] == expert_V[None, :]

    pairs = torch.triu(torch.ones(64, 64, dtype=torch.bool), diagonal=1)
    both = (together(1) & together(2))[pairs].float().mean()
    assert both < 2 / 8**2


def test_ids_that_do_not_occur_are_spread_by_number() -> None:
    counts = ZIPF.clone()
    counts[1000:] = 0
    drawn = draw_balanced(counts, 4, 3, 1)[1000:, 0]
    assert torch.bincount(drawn, minlength=4).min() > 400


def test_counts_are_read_and_checked(tmp_path: Path) -> None:
    def written(values: object) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npy"
        np.save(path, np.array(values))
        return str(path)

    assert read_counts(written([3, 1, 0]), 5, None).tolist() == [3, 1, 0, 0, 0]
    by_domain = written([[3, 1, 0], [0, 2, 2]])
    assert read_counts(by_domain, 4, None).tolist() == [3, 3, 2, 0]
    assert read_counts(by_domain, 4, 3).tolist() == [[3, 1, 0, 0], [0, 2, 2, 0], [0, 0, 0, 0]]
    (tmp_path / "text.npy").write_text("1 2 3")
    for file, problem in (
        (str(tmp_path / "none.npy"), "no such file"),
        (str(tmp_path / "text.npy"), "no array of numbers"),
        (written([0.5]), "must hold one integer for each token id"),
        (written([1, 2, 3]), "holds counts of 3 token ids, the vocabulary has 2"),
        (written([1, -2]), "holds numbers that are no counts"),
        (written([0, 0]), "says that no token id occurs"),
        (written(np.array([1, 1 << 63], np.uint64)), "holds numbers that are no counts"),
    ):
        with pytest.raises(UserError, match=f"--router-token-counts .*{problem}"):
            read_counts(file, 2, None)
    with (tmp_path / "long.npy").open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<i8", "fortran_order": False, "shape": (10**15,)})
    with pytest.raises(UserError, match="announces more numbers than there is memory"):
        read_counts(str(tmp_path / "long.npy"), 2, None)
    with pytest.raises(UserError, match="holds 2 domains; --num-domains is 1"):
        read_counts(written([[3, 1, 0], [0, 2, 2]]), 4, 1)
