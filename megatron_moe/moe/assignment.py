"""Balanced assignment of tokens to experts: equal shares for all, with a sum of scores that is close to the largest.

The problem that BASE layers solve in training (Lewis et al. 2021), by an auction (Bertsekas and Castanon, The auction
algorithm for the transportation problem, 1989). Tokens bid for a place at the expert where their score less the
expert's price is best; an expert keeps its highest bids, and its price is the lowest of them. Where the experts do not
divide the tokens, spare bidders that score 0 everywhere fill up the places, at most one at each expert.

Shape legend: M = tokens, E = experts, C = places of an expert (M / E rounded up), P = bidders (M tokens, then E * C - M
spare ones), U = bidders without a place.
"""

import torch
from torch import Tensor

PRECISION = 1e-2
"""Default of `balanced_assignment(precision=)`."""
_FIRST = 0.25
_FASTER = 0.2
_LARGEST = 1e30


@torch.no_grad()
def balanced_assignment(scores_ME: Tensor, precision: float = PRECISION) -> Tensor:
    """The expert of every token: each expert gets floor(M / E) or ceil(M / E) of them.

    The sum of the chosen scores is at most `M' * precision * (largest score - smallest score)` below the largest sum
    that any such assignment has, M' being M rounded up to a multiple of E: a token loses no more than `precision` of
    the range of scores on average.

    The same scores give the same experts on every rank. A NaN counts as 0, so that a step which is skipped for it
    comes to its end.

    Args:
        scores_ME: [M, E], any M and E from 1.
        precision: of the bids, relative to the range of scores.

    Returns:
        [M] int64.
    """
    scores_ME = scores_ME.detach().double().nan_to_num(0.0, _LARGEST, -_LARGEST).clamp(-_LARGEST, _LARGEST)
    tokens, experts = scores_ME.shape
    spread = float(scores_ME.max() - scores_ME.min()) if tokens else 0.0
    if experts == 1 or spread == 0.0:
        # Nothing to choose between: dealt out in turn.
        return torch.arange(tokens, device=scores_ME.device) % experts
    auction = _Auction((scores_ME - scores_ME.min()) / spread)
    step = _FIRST
    while step > precision:
        auction.run(step)
        step *= _FASTER
    auction.run(precision)
    return auction.expert_P[:tokens]


class _Auction:
    """Prices last from one run to the next, with smaller steps of bids (scaling): wars over single places stay short.

    Args:
        scores_ME: between 0 and 1.
    """

    def __init__(self, scores_ME: Tensor) -> None:
        tokens, experts = scores_ME.shape
        self._tokens, self._experts, self._places = tokens, experts, -(-tokens // experts)
        spare = experts * self._places - tokens
        self._score_ME = scores_ME
        self._price_E = scores_ME.new_zeros(experts)
        self.expert_P = torch.full((tokens + spare,), -1, device=scores_ME.device)

    def run(self, step: float) -> None:
        """Assign every bidder, raising bids by `step` at least.

        It ends: whoever bids raises a price by `step` or more, and nobody bids for an expert whose price has risen
        by more than scores differ while another still has a free place.
        """
        experts, places = self._experts, self._places
        self.expert_P.fill_(-1)
        # Who holds the places of each expert, and with which bids; -1: nobody, at the price with which the run began.
        owner_EC = torch.full((experts, places), -1, device=self._price_E.device)
        bid_EC = self._price_E[:, None].repeat(1, places)
        while (waiting_U := (self.expert_P < 0).nonzero()[:, 0]).numel():
            chosen_U, bid_U = self._bids(waiting_U, owner_EC, bid_EC, step)
            self._settle(waiting_U, chosen_U, bid_U, owner_EC, bid_EC)
        self._price_E = bid_EC.amin(dim=1)

    def _bids(self, waiting_U: Tensor, owner_EC: Tensor, bid_EC: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Where everyone without a place bids, and what: as much as makes the second best as good, and `step`."""
        price_E = bid_EC.amin(dim=1)
        tokens_U = waiting_U[waiting_U < self._tokens]
        value_UE = self._score_ME[tokens_U] - price_E
        best_U, chosen_U = value_UE.max(dim=1)
        second_U = value_UE.scatter(1, chosen_U[:, None], -torch.inf).amax(dim=1)
        bid_U = price_E[chosen_U] + best_U - second_U + step
        count = waiting_U.numel() - tokens_U.numel()
        if count:
            # A spare bidder takes the place of an expert's spare bidder if there is one. All are alike, so each bids
            # for another of the cheapest experts what the cheapest of the rest costs.
            spare_EC = owner_EC >= self._tokens
            held_E = bid_EC.where(spare_EC, -torch.inf).amax(dim=1)
            cost_E, cheapest_E = held_E.where(spare_EC.any(dim=1), price_E).sort(stable=True)
            chosen_U = torch.cat([chosen_U, cheapest_E[:count]])
            bid_U = torch.cat([bid_U, (cost_E[count] + step).expand(count)])
        return chosen_U, bid_U

    def _settle(self, waiting_U: Tensor, chosen_U: Tensor, bid_U: Tensor, owner_EC: Tensor, bid_EC: Tensor) -> None:
        """Give the places of every expert to its highest bidders, of equal ones to those that hold them already."""
        experts, places = owner_EC.shape
        outbid_E = chosen_U[waiting_U >= self._tokens]
        if outbid_E.numel():
            rows_RC = owner_EC[outbid_E]
            bid_EC[outbid_E] = bid_EC[outbid_E].where(rows_RC < self._tokens, -torch.inf)
        # By expert, and by bid within an expert; no more of each expert's than it has places.
        order_U = bid_U.sort(descending=True, stable=True).indices
        order_U = order_U[chosen_U[order_U].sort(stable=True).indices]
        chosen_U, bid_U, waiting_U = chosen_U[order_U], bid_U[order_U], waiting_U[order_U]
        count_E = torch.bincount(chosen_U, minlength=experts)
        rank_U = torch.arange(chosen_U.numel(), device=chosen_U.device) - (count_E.cumsum(0) - count_E)[chosen_U]
        keep_U = rank_U < places
        chosen_U, bid_U, waiting_U, rank_U = chosen_U[keep_U], bid_U[keep_U], waiting_U[keep_U], rank_U[keep_U]
        rows_R, row_U = chosen_U.unique(return_inverse=True)
        width = places + int(rank_U.max()) + 1
        bids_RW = bid_EC.new_full((rows_R.numel(), width), -torch.inf)
        owners_RW = owner_EC.new_full(bids_RW.shape, -1)
        bids_RW[:, :places], owners_RW[:, :places] = bid_EC[rows_R], owner_EC[rows_R]
        bids_RW[row_U, places + rank_U], owners_RW[row_U, places + rank_U] = bid_U, waiting_U
        bids_RW, order_RW = bids_RW.sort(dim=1, descending=True, stable=True)
        owners_RW = owners_RW.gather(1, order_RW)
        bid_EC[rows_R], owner_EC[rows_R] = bids_RW[:, :places], owners_RW[:, :places]
        lost_RW = owners_RW[:, places:]
        self.expert_P[lost_RW[lost_RW >= 0]] = -1
        won_RC = owners_RW[:, :places]
        self.expert_P[won_RC[won_RC >= 0]] = rows_R[:, None].expand_as(won_RC)[won_RC >= 0]
