"""What each rule of a recipe costs on given texts, in processor time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe.data.wudao.document import Document
from megatron_moe.data.wudao.recipe import Recipe
from megatron_moe.data.wudao.rules.base import Cleaner, Filter
from megatron_moe.data.wudao.rules.characters import views_of


@dataclass(frozen=True)
class RuleCost:
    """The cost of one rule over all texts.

    Attributes:
        rule: its name; `kinds` is the look-up that decides which rules are called, `whole recipe` all together.
        seconds: processor time.
        calls: documents for which it was called at all.
        changed: documents that it changed or dropped.
    """

    rule: str
    seconds: float
    calls: int
    changed: int


class _Silent:
    def changed(self, rule: str, before: str, after: str) -> None:
        """Ignore it."""

    def dropped(self, rule: str, reason: str, text: str) -> None:
        """Ignore it."""


def profile_recipe(recipe: Recipe, texts: Sequence[str]) -> list[RuleCost]:
    """The cost of each rule on what the rules before it left of the texts, and of the whole recipe.

    A rule is timed over all texts at once, so the clock costs nothing; rounds after the first are only in the whole.
    """
    recipe.prepare()
    costs = []
    start = time.process_time()
    views = views_of(texts)
    costs.append(RuleCost("kinds", time.process_time() - start, len(views), 0))
    for rule in recipe.rules:
        if isinstance(rule, Cleaner):
            needs = rule.needs
            called = [index for index, view in enumerate(views) if view.bits & needs]
            given = [views[index] for index in called]
            start = time.process_time()
            results = [rule.clean_view(view) for view in given]
            seconds = time.process_time() - start
            changed = 0
            for index, result in zip(called, results, strict=True):
                if result != views[index].text:
                    changed += 1
                    views[index] = rule.next_view(result, views[index])
            costs.append(RuleCost(rule.name, seconds, len(called), changed))
        elif isinstance(rule, Filter):
            start = time.process_time()
            reasons = [rule.reason(view) for view in views]
            seconds = time.process_time() - start
            costs.append(RuleCost(rule.name, seconds, len(views), sum(reason is not None for reason in reasons)))
            views = [view for view, reason in zip(views, reasons, strict=True) if reason is None]
    documents = [Document(text) for text in texts]
    watch = _Silent()
    start = time.process_time()
    kept = sum(recipe.apply(document, watch, view) for document, view in zip(documents, views_of(texts), strict=True))
    costs.append(RuleCost("whole recipe", time.process_time() - start, len(documents), len(documents) - kept))
    return costs


def cost_table(costs: Sequence[RuleCost], texts: Sequence[str]) -> str:
    """The costs as a Markdown table, with MB of UTF-8 for each second of one core."""
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    lines = ["| rule | MB/s | us a document | called | changed or dropped |", "|---|---:|---:|---:|---:|"]
    for cost in costs:
        rate = size / max(cost.seconds, 1e-9) / 1e6
        each = cost.seconds / max(1, len(texts)) * 1e6
        lines.append(f"| {cost.rule} | {rate:,.0f} | {each:.2f} | {cost.calls:,} | {cost.changed:,} |")
    return "\n".join(lines)
