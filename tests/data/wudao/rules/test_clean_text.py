"""What every rule must keep to: clean text stays as it is, gates never hide work, and nothing is done twice."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.data.wudao.recipe import load_recipe
from megatron_moe.data.wudao.rules import RULES, Cleaner, Filter, Rule
from megatron_moe.data.wudao.rules.characters import HAN, View, views_of
from tests.data.chinese_text import documents
from tests.data.wudao.rules.text import DIRT, PROSE, dirty_text

CLEANERS = [rule for rule in load_recipe("wudao-default").rules if isinstance(rule, Cleaner)]


def _strict_cleaners() -> Iterator[Cleaner]:
    for rule in load_recipe("strict").rules:
        if isinstance(rule, Cleaner) and rule not in CLEANERS:
            yield rule


ALL_BITS = (1 << 18) - 1
ALL_CLEANERS = [*CLEANERS, *_strict_cleaners()]


@pytest.mark.parametrize("rule", CLEANERS, ids=lambda rule: rule.name)
@pytest.mark.parametrize("kind", PROSE)
def test_rules_leave_clean_prose(rule: Cleaner, kind: str) -> None:
    assert rule.clean(PROSE[kind]) == PROSE[kind]


@pytest.mark.parametrize("rule", CLEANERS, ids=lambda rule: rule.name)
def test_rules_leave_the_made_corpus(rule: Cleaner) -> None:
    for text in documents(200):
        assert rule.clean(text) == text


@pytest.mark.parametrize("rule", ALL_CLEANERS, ids=lambda rule: rule.name)
@given(text=dirty_text())
@settings(max_examples=120, deadline=None)
def test_a_rule_that_is_not_needed_would_do_nothing(rule: Cleaner, text: str) -> None:
    view = View(text)
    if not view.bits & rule.needs:  # the recipe would not call it
        assert rule.clean(text) == text
    assert rule.clean_view(view) == rule.clean(text)
    # Bits of what other rules have removed since do no harm.
    assert rule.clean_view(View(text, ALL_BITS)) == rule.clean(text)
    assert rule.clean_view(View("", ALL_BITS)) == ""


@pytest.mark.parametrize("rule", ALL_CLEANERS, ids=lambda rule: rule.name)
@given(text=dirty_text())
@settings(max_examples=120, deadline=None)
def test_the_view_after_a_rule_knows_all_that_the_text_holds(rule: Cleaner, text: str) -> None:
    view = View(text)
    cleaned = rule.clean_view(view)
    if cleaned == text:
        return
    after, fresh = rule.next_view(cleaned, view), View(cleaned)
    assert after.text == cleaned
    assert after.bits & fresh.bits == fresh.bits
    assert after.han == fresh.han


@pytest.mark.parametrize("rule", [rule for rule in ALL_CLEANERS if rule.settled], ids=lambda rule: rule.name)
@given(text=dirty_text())
@settings(max_examples=120, deadline=None)
def test_a_settled_rule_is_done_at_once(rule: Cleaner, text: str) -> None:
    once = rule.clean(text)
    assert rule.clean(once) == once


@given(st.lists(dirty_text(6), max_size=300))
@settings(max_examples=40, deadline=None)
def test_views_of_a_batch_are_those_of_each_text(texts: list[str]) -> None:
    for view, text in zip(views_of([*texts, *PROSE.values(), ""]), [*texts, *PROSE.values(), ""], strict=True):
        one = View(text)
        assert (view.text, view.bits, view.han) == (text, one.bits, one.han)
        assert np.array_equal(view.kinds, one.kinds)
        assert view.han == view.count(HAN)


def test_the_dirt_gives_every_rule_work() -> None:
    for rule in CLEANERS:
        assert any(rule.clean(f"正文\n{piece}\n正文") != f"正文\n{piece}\n正文" for piece in DIRT), rule.name


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rules_document_themselves(rule: type[Rule]) -> None:
    assert rule.__doc__
    assert rule.source
    assert issubclass(rule, Cleaner | Filter) or rule.name == "title"
    assert dataclasses.is_dataclass(rule)
