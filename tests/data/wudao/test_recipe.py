"""Recipes: read strictly, changed by settings, fingerprinted; applied they settle, and say what they do."""

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.data.wudao.document import Document
from megatron_moe.data.wudao.recipe import UNSETTLED, Recipe, load_recipe
from megatron_moe.data.wudao.recipe_file import recipe_names
from megatron_moe.data.wudao.rules import RULES, Cleaner
from megatron_moe.data.wudao.rules.characters import View, views_of
from tests.data.chinese_text import documents
from tests.data.wudao.rules.text import PROSE, dirty_text


class Notes:
    """A watch that remembers."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, str, str]] = []
        self.drops: list[tuple[str, str, str]] = []

    def changed(self, rule: str, before: str, after: str) -> None:
        self.changes.append((rule, before, after))

    def dropped(self, rule: str, reason: str, text: str) -> None:
        self.drops.append((rule, reason, text))


def _applied(recipe: Recipe, text: str, title: str = "") -> str | None:
    document = Document(text, title)
    return document.text if recipe.apply(document, Notes()) else None


def _written(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_packaged_recipes() -> None:
    assert recipe_names() == ["pai", "strict", "wudao-default"]
    default = load_recipe("wudao-default")
    assert default.exact_dedup
    assert default.near_dedup is not None
    assert default.keep_fields == ("id", "uniqueKey", "titleUkey", "dataType")
    # Without word lists two rules have nothing to do.
    used = {rule.name for rule in default.rules} | {"advertising", "sensitive_words", "pai", "title"}
    assert used == {rule.name for rule in RULES}
    assert not load_recipe("pai").exact_dedup
    assert load_recipe("pai").near_dedup is None


@pytest.mark.parametrize("kind", PROSE)
def test_clean_prose_comes_out_unchanged(kind: str) -> None:
    notes = Notes()
    document = Document(PROSE[kind])
    assert load_recipe("wudao-default").apply(document, notes), notes.drops
    assert document.text == PROSE[kind]
    assert notes.changes == []


def test_the_made_corpus_comes_out_unchanged() -> None:
    recipe = load_recipe("wudao-default")
    for text in documents(300):
        assert _applied(recipe, text) == text


DIRTY = (
    "<p>　　臺灣的國語和繁體字，，在這裡有很多很多！！！！！！</p>\r\n首頁 | 上一頁\x00\n"
    "&nbsp;聯繫我們：a@b.com，電話13800138000，網址http://a.com/b。\n最後一句沒有說完，因為它被截斷"
)


def test_dirty_text_comes_out_clean() -> None:
    notes = Notes()
    document = Document(DIRTY)
    assert load_recipe("wudao-default").apply(document, notes)
    assert document.text == "台湾的国语和繁体字，在这里有很多很多！！！\n\n联系我们：[邮箱]，电话[电话]，网址。"
    names = [name for name, _, _ in notes.changes]
    assert len(names) == len(set(names))
    assert {"html", "control", "simplified", "emails", "phones", "urls", "whitespace", "short_paragraphs"} <= set(names)
    assert notes.changes[0][1] == DIRTY


@pytest.mark.parametrize("name", ["wudao-default", "strict"])
@given(text=dirty_text(40))
@settings(max_examples=400, deadline=None)
def test_twice_is_once(name: str, text: str) -> None:
    recipe = load_recipe(name, ["length=off", "han_ratio=off", "line_length=off", "language=off", "repeated_lines=off"])
    once = _applied(recipe, text)
    if once is not None:
        notes = Notes()
        again = Document(once)
        assert recipe.apply(again, notes)
        assert (again.text, notes.changes) == (once, [])


@pytest.mark.parametrize("name", ["wudao-default", "strict"])
@given(text=dirty_text(40))
@settings(max_examples=200, deadline=None)
def test_what_is_kept_would_be_kept_again(name: str, text: str) -> None:
    recipe = load_recipe(name, ["length.least=1"])
    once = _applied(recipe, text)
    assert once is None or _applied(recipe, once) == once


@given(text=dirty_text(40))
@settings(max_examples=300, deadline=None)
def test_nothing_is_left_for_any_rule(text: str) -> None:
    """Settling rests on promises of the rules (`adds`, `settled`, `needs`): here every rule has a last look."""
    recipe = load_recipe("wudao-default", ["length.least=0", "han_ratio=off", "line_length=off", "language=off"])
    once = _applied(recipe, text)
    if once is not None:
        for rule in recipe.rules:
            if isinstance(rule, Cleaner):
                assert rule.clean(once) == once, rule.name


@given(text=dirty_text())
@settings(max_examples=200, deadline=None)
def test_a_given_view_changes_nothing(text: str) -> None:
    recipe = load_recipe("wudao-default", ["length.least=1"])
    one, other = Document(text), Document(text)
    notes, others = Notes(), Notes()
    assert recipe.apply(one, notes) == recipe.apply(other, others, views_of([text])[0])
    assert (one, notes.changes, notes.drops) == (other, others.changes, others.drops)


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        # Each was left half-cleaned at some time: what one rule does gives work to one before or after it.
        ("“谁？”\n  ...第一章　总则\n第一条\ue000", "“谁？”\n第一条"),
        ("正文是这样的 \t）完", "正文是这样的）完"),
        ("　浣犲ソ", "你好"),
        ("正文在这里。\nbody{a:b}　", "正文在这里。"),
        ("13800<b>138000</b>", "[电话]"),
        ("微信號：&nbsp;abc_123", "微信号：[微信号]"),
        ("！&#32;！&#32;！&#32;！", "！！！"),
    ],
)
def test_rules_that_give_each_other_work(dirty: str, clean: str) -> None:
    recipe = load_recipe("wudao-default", ["length=off", "han_ratio=off", "line_length=off", "language=off"])
    assert _applied(recipe, dirty) == clean
    assert _applied(recipe, clean) == clean


def test_a_text_that_never_settles_is_dropped() -> None:
    class Swap(Cleaner):
        """甲 and 乙 forever."""

        name = "swap"
        source = "this test"

        def clean(self, text: str) -> str:
            return text.translate({ord("甲"): "乙", ord("乙"): "甲"})

    default = load_recipe("wudao-default")
    recipe = Recipe("x", "", (Swap(),), default.record)
    notes = Notes()
    assert not recipe.apply(Document("甲"), notes)
    assert notes.drops == [(UNSETTLED, "still changes after 8 rounds", "甲")]
    once = Recipe("x", "", (Swap(),), default.record, settle=False)
    assert _applied(once, "甲") == "乙"


def test_dropped_documents_are_told_with_the_reason() -> None:
    notes = Notes()
    assert not load_recipe("wudao-default").apply(Document("短"), notes)
    assert notes.drops == [("length", "1 characters, fewer than 10", "短")]


def test_titles_are_kept_or_joined() -> None:
    recipe = load_recipe("wudao-default")
    document = Document(PROSE["verse"], "静夜思", {"id": 7, "other": 8})
    assert recipe.apply(document, Notes())
    assert recipe.record.of(document) == {"text": PROSE["verse"], "title": "静夜思", "id": 7}

    joined = load_recipe("wudao-default", ["title=on"])
    document = Document(PROSE["law"], "<b>示範法</b> ", {"id": 7})
    assert joined.apply(document, Notes())
    assert joined.record.of(document) == {"text": "示范法\n" + PROSE["law"], "id": 7}
    assert _applied(joined, document.text, "示範法") == document.text
    assert _applied(joined, PROSE["law"]) == PROSE["law"]


def test_settings_change_recipes() -> None:
    recipe = load_recipe(
        "wudao-default",
        ["length.least=50", "language=off", "record.keep=[id, url]", "near_dedup.threshold=0.9", "exact_dedup=off"],
    )
    rules = {rule.name: rule for rule in recipe.rules}
    assert "language" not in rules
    assert rules["length"].least == 50  # type: ignore[attr-defined]
    assert recipe.record.keep == ("id", "url")
    assert recipe.near_dedup is not None
    assert recipe.near_dedup.threshold == 0.9
    assert not recipe.exact_dedup
    assert load_recipe("wudao-default", ["near_dedup=off"]).near_dedup is None
    assert load_recipe("pai", ["near_dedup=on"]).near_dedup is not None
    order = [rule.name for rule in load_recipe("pai", ["html=on", "length.least=3", "control=on"]).rules]
    assert order == ["pai", "control", "html", "length"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("wudao", [], "--recipe wudao: no such file or name; There are: pai, strict, wudao-default"),
        ("wudao-defualt", [], "--recipe wudao-defualt: no such file or name; did you mean wudao-default? There are"),
        ("pai", ["lenght.least=3"], "lenght.least=3: lenght: unknown rule; did you mean length?"),
        ("pai", ["length.leest=3"], "recipe pai: length.leest: unknown key; did you mean least?"),
        ("pai", ["length.least=many"], "recipe pai: length.least: many: must be an integer"),
        ("pai", ["length.least=-1"], "recipe pai: length.least -1: must be at least 0"),
        ("pai", ["length"], "length: must be RULE.OPTION=VALUE, RULE=on or RULE=off"),
        ("pai", ["length=3"], "length=3: must be on or off, or name an option: length.OPTION=VALUE"),
        ("pai", ["settle.x=3"], "settle.x=3: settle has no options; give settle=on or settle=off"),
        ("pai", ["record.keep=[text]"], "recipe pai: record: text is written twice; give each field a name of its own"),
        ("pai", ["near_dedup.bands=0"], "recipe pai: near_dedup: bands 0: must be at least 1"),
        ("pai", ["han_ratio.least=2"], "recipe pai: han_ratio.least 2.0: must be between 0 and 1"),
    ],
)
def test_wrong_settings_are_one_line(name: str, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(name, changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [control, contrl]", "contrl: unknown rule; did you mean control?"),
        ("rules: [control, control]", "rules: control: given twice"),
        ("rules: [length, control]", "rules: length drops documents; move it below all rules that change the text"),
        ("rules: [title, length]", "rules: title joins the title; move it below all rules that change the text"),
        ("rule: [control]", "rule: unknown key; did you mean rules?"),
        ("rules: control", "rules: must be a list of rules"),
        ("description: x", "rules: must be a list of rules"),
        ("rules: [control: {private_use: drop}]", "control.private_use: drop: must be one of remove, keep"),
        ("rules: [control: 3]", "control: must be a mapping (key: value), not int"),
        ("rules: [[control]]", "must be the name of a rule"),
        ("rules: [control: {}, control: {}]", "rules: control: given twice"),
        ("settle: maybe\nrules: []", "settle: maybe: must be true or false"),
        ("rules: [", "line 1: "),
        ("- a", "must be a mapping (key: value), not list"),
        ("record: {fields: []}\nrules: []", "record.fields: unknown key"),
        ("near_dedup: {rows: x}\nrules: []", "near_dedup.rows: x: must be an integer"),
        ("decontamination: {ngram: 0}\nrules: []", "decontamination: ngram 0: must be between 1 and 64"),
    ],
)
def test_wrong_files_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = _written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    path = _written(tmp_path, "description: mine\nrules:\n  - control\n  - length: {least: 2}\n  - title\n")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.description) == ("mine", "mine")
    assert _applied(recipe, "甲\x00乙", "题") == "题\n甲乙"
    assert _applied(recipe, "甲\x00") is None
    assert recipe.record.of(Document("甲", "题", {"id": 1})) == {"text": "甲"}


def test_the_fingerprint_follows_what_decides(tmp_path: Path) -> None:
    base = load_recipe("wudao-default").fingerprint
    assert base == load_recipe("wudao-default").fingerprint
    seen = {base}
    for change in (
        "length.least=11", "language=off", "title=on", "record.keep=[]", "record.text=content", "near_dedup=off",
        "near_dedup.seed=2", "exact_dedup=off", "settle=off", "decontamination.ngram=8",
    ):  # fmt: skip
        fingerprint = load_recipe("wudao-default", [change]).fingerprint
        assert fingerprint not in seen, change
        seen.add(fingerprint)
    for kind in ("advertising.file", "decontamination.files"):
        files = [tmp_path / name for name in ("one", "two", "three")]
        for file, word in zip(files, ("甲", "甲", "乙"), strict=True):
            file.write_text(word, encoding="utf-8")
        values = [f"[{file}]" if kind.endswith("s") else str(file) for file in files]
        one, same, other = (load_recipe("wudao-default", [f"{kind}={value}"]).fingerprint for value in values)
        assert one == same != other
        assert one not in seen
    missing = load_recipe("wudao-default", ["advertising.file=/missing/list"])
    with pytest.raises(UserError, match="word list /missing/list: cannot be read"):
        missing.prepare()
    with pytest.raises(UserError, match="evaluation file /missing/a: cannot be read"):
        _ = load_recipe("wudao-default", ["decontamination.files=[/missing/a]"]).fingerprint


def test_recipes_go_to_other_processes() -> None:
    recipe = load_recipe("strict", ["title=on"])
    recipe.prepare()
    _applied(recipe, DIRTY)
    again = pickle.loads(pickle.dumps(recipe))
    assert again == recipe
    assert again.fingerprint == recipe.fingerprint
    assert _applied(again, DIRTY) == _applied(recipe, DIRTY)
    assert View(DIRTY).text == DIRTY
