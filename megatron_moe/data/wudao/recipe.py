"""A recipe: the rules that clean a corpus, in order, with their options, read strictly from YAML."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_moe.config.base import UserError
from megatron_moe.data.dedup.config import Decontamination, NearDedup
from megatron_moe.data.wudao.document import Document
from megatron_moe.data.wudao.recipe_file import RecipeFile, read_recipe
from megatron_moe.data.wudao.record import Record
from megatron_moe.data.wudao.rules.base import Cleaner, Filter, Rule
from megatron_moe.data.wudao.rules.characters import ALWAYS, TRADITIONAL, View, kinds_table
from megatron_moe.data.wudao.rules.title import Title

# Text that is still changing after so many rounds was made to.
_MOST_ROUNDS = 8
UNSETTLED = "settle"
"""Reports call it a rule: the documents that go on changing."""


class Watch(Protocol):
    """Who is told what rules do; called only when something happens, so a rule that does nothing costs nothing."""

    def changed(self, rule: str, before: str, after: str) -> None:
        """A rule changed the text; told once for each rule and document."""

    def dropped(self, rule: str, reason: str, text: str) -> None:
        """A rule dropped the document."""


class _Cleaners:
    """Rules that change the text, in order, and which of them a text needs."""

    def __init__(self, rules: tuple[Cleaner, ...]) -> None:
        self.rules = rules
        self._plans: dict[int, list[tuple[int, Cleaner]]] = {}

    def plan(self, bits: int) -> list[tuple[int, Cleaner]]:
        """The rules, with their numbers, that have anything to do in a text with these kinds of characters."""
        plan = self._plans.get(bits)
        if plan is None:
            plan = [(number, rule) for number, rule in enumerate(self.rules) if rule.needs & bits]
            self._plans[bits] = plan
        return plan


@dataclass(frozen=True)
class Recipe:
    """The rules of a recipe, ready to be applied.

    Attributes:
        name: of the recipe.
        description: in a few words.
        rules: in order: those that change the text, those that drop documents, the title.
        record: what is written of a document.
        exact_dedup: whether equal documents are dropped.
        near_dedup: how nearly equal documents are found, None where they are not looked for.
        decontamination: the evaluation sets whose text no document may hold.
        settle: whether cleaning is repeated until nothing changes, so that cleaning twice equals cleaning once.
    """

    name: str
    description: str
    rules: tuple[Rule, ...]
    record: Record
    exact_dedup: bool = True
    near_dedup: NearDedup | None = None
    decontamination: Decontamination = dataclasses.field(default_factory=Decontamination)
    settle: bool = True

    @property
    def keep_fields(self) -> tuple[str, ...]:
        """Fields of the input that are written beside the text."""
        return self.record.keep

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides the output, down to what is in the word lists and evaluation files."""
        decided = {
            "rules": [rule.identity() for rule in self.rules],
            "record": dataclasses.asdict(self.record),
            "exact_dedup": self.exact_dedup,
            "near_dedup": None if self.near_dedup is None else self.near_dedup.as_dict(),
            # What is in the evaluation files counts, not where they lie.
            "decontamination": dataclasses.asdict(dataclasses.replace(self.decontamination, files=())),
            "evaluation_sets": [_digest(Path(name)) for name in self.decontamination.files],
            "settle": self.settle,
        }
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def _cleaners(self) -> _Cleaners:
        return _Cleaners(tuple(rule for rule in self.rules if isinstance(rule, Cleaner)))

    @functools.cached_property
    def _title_cleaners(self) -> _Cleaners:
        return _Cleaners(tuple(rule for rule in self._cleaners.rules if rule.titles))

    @functools.cached_property
    def _filters(self) -> tuple[Filter, ...]:
        return tuple(rule for rule in self.rules if isinstance(rule, Filter))

    @functools.cached_property
    def uses_views(self) -> bool:
        """Whether it is worth knowing the kinds of characters before the rules are called."""
        return bool(self._filters) or any(rule.needs != ALWAYS for rule in self._cleaners.rules)

    @functools.cached_property
    def _title(self) -> Title | None:
        return next((rule for rule in self.rules if isinstance(rule, Title)), None)

    def prepare(self) -> None:
        """Load tables, dictionaries, models and lists, so that mistakes show at once and the first document is fast.

        Raises:
            UserError: a file cannot be read or a package is missing.
        """
        kinds_table()
        for rule in self.rules:
            rule.prepare()

    def apply(self, document: Document, watch: Watch, view: View | None = None) -> bool:
        """Clean a document in place.

        Args:
            document: its text is replaced by the cleaned text.
            watch: is told what happens.
            view: of the document's text; with those that `views_of` makes of many short texts it is twice as fast.

        Returns:
            False if the document is dropped.
        """
        if not self.uses_views:
            view = View(document.text, ALWAYS)
        elif view is None:
            view = View(document.text)
        cleaned = self._cleaned(view, self._cleaners, watch)
        if cleaned is None:
            watch.dropped(UNSETTLED, f"still changes after {_MOST_ROUNDS} rounds", document.text)
            return False
        document.text = text = cleaned.text
        for rule in self._filters:
            reason = rule.reason(cleaned)
            if reason is not None:
                watch.dropped(rule.name, reason, text)
                return False
        if self._title is not None and document.title:
            joined = self._title.joined(self.clean_title(document.title), text)
            if joined != text:
                watch.changed(self._title.name, text, joined)
                document.text = joined
            document.title = ""
        return True

    def _cleaned(self, view: View, cleaners: _Cleaners, watch: Watch | None) -> View | None:
        """The text after these cleaners; None if it does not settle."""
        told: set[str] = set()
        # Rules from here on have seen the text as it is, and left it.
        settled_from = 0
        for _ in range(_MOST_ROUNDS):
            changed_at, untouched = -1, True
            plan, planned, place = cleaners.plan(view.bits), view.bits, 0
            while place < len(plan):
                number, rule = plan[place]
                if untouched and number >= settled_from > 0:
                    return view
                place += 1
                text = rule.clean_view(view)
                if text == view.text:
                    continue
                if watch is not None and rule.name not in told:
                    told.add(rule.name)
                    watch.changed(rule.name, view.text, text)
                view, untouched = rule.next_view(text, view), False
                # Which share of the text is traditional decides too, and any change of length moves it.
                if not rule.settled or view.bits & TRADITIONAL:
                    changed_at = number
                if view.bits & ~planned:
                    plan, planned = cleaners.plan(view.bits), view.bits
                    place = sum(other <= number for other, _ in plan)
            if changed_at < 0 or not self.settle:
                return view
            settled_from = changed_at + 1
        return None

    def clean_title(self, title: str) -> str:
        """A title after the rules for characters, on one line."""
        cleaned = self._cleaned(View(title), self._title_cleaners, None)
        return "" if cleaned is None else " ".join(cleaned.text.split())


def load_recipe(name_or_file: str, settings: Sequence[str] = ()) -> Recipe:
    """A recipe by its name, or from a YAML file.

    Args:
        name_or_file: `wudao-default`, `strict`, `pai`, or the path of a file.
        settings: changes: `length.least=50` sets an option, and adds the rule where it is missing; `language=off` takes
            a rule away, `title=on` adds it; `record.keep=[id]`, `near_dedup=off`, `decontamination.files=[a.jsonl]`.

    Raises:
        ConfigError: there is no such recipe, or a rule, an option or a value in it is wrong; the message names it.
    """
    return build_recipe(read_recipe(name_or_file, settings))


def build_recipe(file: RecipeFile) -> Recipe:
    """The recipe that a file describes, without the rules that do nothing."""
    return Recipe(
        name=file.name,
        description=file.description,
        rules=tuple(rule for rule in file.rules if not rule.idle),
        record=file.record,
        exact_dedup=file.exact_dedup,
        near_dedup=file.near_dedup,
        decontamination=file.decontamination,
        settle=file.settle,
    )


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"evaluation file {path}: cannot be read: {error.strerror or error}") from error
