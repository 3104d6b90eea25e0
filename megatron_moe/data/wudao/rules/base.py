"""What a rule is: a frozen dataclass of options that changes a text (`Cleaner`) or rejects a document (`Filter`)."""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_moe.config.base import ConfigError
from megatron_moe.data.wudao.rules.characters import ALWAYS, View


@dataclass(frozen=True)
class Rule(ABC):
    """One step of a recipe. Its fields are its options; the text under a field explains it.

    Class attributes:
        name: what recipes and reports call it.
        version: counts changes of what the rule does, so that old results are not mistaken for new ones.
        source: where the rule and its defaults come from.
        destroys: what it takes from clean text, for those who must decide; empty for nothing known.
        needs: kinds of characters (see `characters`) without any of which the rule does nothing.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    source: ClassVar[str]
    destroys: ClassVar[str] = ""
    needs: ClassVar[int] = ALWAYS

    def prepare(self) -> None:  # noqa: B027 (most rules need nothing)
        """Load what the rule works with, so that a mistake shows before the work begins."""

    @property
    def idle(self) -> bool:
        """Whether the rule can do nothing with these options, so a recipe may leave it out."""
        return False

    def identity(self) -> dict[str, Any]:
        """All that decides the rule's result: its options, and digests of files and versions of libraries it uses."""
        return {"rule": self.name, "version": self.version, "options": dataclasses.asdict(self)}

    def require(self, condition: bool, option: str, legal: str) -> None:
        """Raise `ConfigError` that names the option, its value and the legal range unless `condition` holds."""
        if not condition:
            raise ConfigError(f"{self.name}.{option} {getattr(self, option)}: must be {legal}")

    def require_share(self, *options: str) -> None:
        """Each of these options must lie between 0 and 1."""
        for option in options:
            self.require(0.0 <= getattr(self, option) <= 1.0, option, "between 0 and 1")

    def require_count(self, *options: str) -> None:
        """Each of these options must be at least 0."""
        for option in options:
            self.require(getattr(self, option) >= 0, option, "at least 0")


@dataclass(frozen=True)
class Cleaner(Rule):
    """A rule that changes the text.

    Class attributes:
        titles: whether it also makes sense on a title that is joined to the text.
        adds: whether what it writes may be of kinds that the text did not have.
        settled: whether what it does can give neither itself nor a rule before it anything new to do.
    """

    titles: ClassVar[bool] = False
    adds: ClassVar[bool] = True
    settled: ClassVar[bool] = False

    @abstractmethod
    def clean(self, text: str) -> str:
        """The text without what the rule is against; the same text where there is nothing of it."""

    def clean_view(self, view: View) -> str:
        """The same, with what is known of the text."""
        return self.clean(view.text)

    def next_view(self, text: str, view: View) -> View:
        """The view of the text that became of another."""
        return View(text) if self.adds else View(text, view.bits)


@dataclass(frozen=True)
class Filter(Rule):
    """A rule that keeps or drops the document as a whole, after all cleaners."""

    @abstractmethod
    def reason(self, view: View) -> str | None:
        """Why the document is dropped, with the number that decided; None when it is kept."""
