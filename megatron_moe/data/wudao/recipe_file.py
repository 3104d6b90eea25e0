"""Recipe files: read with every key, rule, option and type checked, then changed as the command line asks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_moe.config.base import ConfigError
from megatron_moe.config.schema import nearest
from megatron_moe.config.yaml_io import parse_section, parse_yaml, read_yaml_text
from megatron_moe.data.dedup.config import Decontamination, NearDedup
from megatron_moe.data.wudao.record import Record
from megatron_moe.data.wudao.rules import RULES
from megatron_moe.data.wudao.rules.base import Cleaner, Filter, Rule

_KINDS: dict[str, type[Rule]] = {rule.name: rule for rule in RULES}
_KEYS = ("description", "record", "exact_dedup", "near_dedup", "decontamination", "settle", "rules")
_SWITCHES = ("exact_dedup", "settle")
_SECTIONS: dict[str, type] = {"record": Record, "near_dedup": NearDedup, "decontamination": Decontamination}


@dataclass
class RecipeFile:
    """What a recipe file says, parsed and built."""

    name: str
    description: str = ""
    record: Record = field(default_factory=Record)
    exact_dedup: bool = True
    near_dedup: NearDedup | None = None
    decontamination: Decontamination = field(default_factory=Decontamination)
    settle: bool = True
    rules: tuple[Rule, ...] = ()


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files("megatron_moe.data.wudao") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_recipe(name_or_file: str, settings: Sequence[str] = ()) -> RecipeFile:
    """Read a recipe and apply settings such as `length.least=50` to it.

    Raises:
        ConfigError: what is wrong in it, in one line.
    """
    names = recipe_names()
    if name_or_file in names:
        path = resources.files("megatron_moe.data.wudao") / "recipes" / f"{name_or_file}.yaml"
        source, text = f"recipe {name_or_file}", path.read_text(encoding="utf-8")
    elif Path(name_or_file).is_file():
        source, text = name_or_file, read_yaml_text(name_or_file)
    else:
        near = nearest(name_or_file, names)
        hint = f"did you mean {near}? " if near else ""
        raise ConfigError(f"--recipe {name_or_file}: no such file or name; {hint}There are: {', '.join(names)}")
    body = _mapping(parse_yaml(text, source), source)
    for key in body:
        _known(key, _KEYS, source, "key")
    parts = {name: value for name, value in body.items() if name != "rules"}
    options = _rule_options(body.get("rules"), source)
    for setting in settings:
        _apply_setting(setting, parts, options)
    return _build(Path(name_or_file).stem, source, parts, options)


def _rule_options(entries: Any, source: str) -> dict[str, Mapping[Any, Any]]:
    """Options as given, by rule, in the file's order."""
    if not isinstance(entries, list):
        raise ConfigError(f"{source}: rules: must be a list of rules (- name, or - name: options)")
    options: dict[str, Mapping[Any, Any]] = {}
    for entry in entries:
        if isinstance(entry, dict) and len(entry) == 1:
            name, given = next(iter(entry.items()))
        else:
            name, given = entry, None
        if not isinstance(name, str):
            raise ConfigError(f"{source}: rules: {name}: must be the name of a rule, or one name with its options")
        _known(name, _KINDS, source, "rule")
        if name in options:
            raise ConfigError(f"{source}: rules: {name}: given twice")
        options[name] = _mapping(given, f"{source}: {name}")
    return options


def _apply_setting(setting: str, parts: dict[str, Any], options: dict[str, Mapping[Any, Any]]) -> None:
    """Change parsed YAML as one `name=value` or `name.option=value` asks."""
    target, equals, text = setting.partition("=")
    name, dot, option = target.partition(".")
    if not equals:
        raise ConfigError(f"{setting}: must be RULE.OPTION=VALUE, RULE=on or RULE=off")
    _known(name, [*_SWITCHES, *_SECTIONS, *_KINDS], setting, "rule")
    value = parse_yaml(text, setting)
    # PyYAML reads on and off as true and false.
    if not dot and not isinstance(value, bool):
        raise ConfigError(f"{setting}: must be on or off, or name an option: {name}.OPTION=VALUE")
    if name in _SWITCHES:
        if dot:
            raise ConfigError(f"{setting}: {name} has no options; give {name}=on or {name}=off")
        parts[name] = value
    elif name in _SECTIONS:
        if dot:
            parts[name] = {**_mapping(parts.get(name) or None, setting), option: value}
        elif not value:
            parts[name] = None
        else:
            parts[name] = parts.get(name) or {}
    elif not dot and not value:
        options.pop(name, None)
    else:
        if name not in options:
            _insert(name, options)
        if dot:
            options[name] = {**options[name], option: value}


def _insert(name: str, options: dict[str, Mapping[Any, Any]]) -> None:
    """Add a rule where the list of all rules has it."""
    order = list(_KINDS)
    place = next((other for other in options if order.index(other) > order.index(name)), None)
    items = list(options.items())
    options.clear()
    for other, given in items:
        if other == place:
            options[name] = {}
        options[other] = given
    options.setdefault(name, {})


def _build(name: str, source: str, parts: Mapping[str, Any], options: Mapping[str, Mapping[Any, Any]]) -> RecipeFile:
    """Check types and build the parts."""
    file = RecipeFile(name)
    description = parts.get("description", "")
    if not isinstance(description, str):
        raise ConfigError(f"{source}: description: must be text")
    file.description = description
    for switch in _SWITCHES:
        value = parts.get(switch, True)
        if not isinstance(value, bool):
            raise ConfigError(f"{source}: {switch}: {value}: must be true or false")
        setattr(file, switch, value)
    file.record = _record(parts.get("record"), source)
    if parts.get("near_dedup") is not None:
        file.near_dedup = _built(NearDedup, parts["near_dedup"], f"{source}: near_dedup")
    file.decontamination = _built(Decontamination, parts.get("decontamination"), f"{source}: decontamination")
    rules = [_built(_KINDS[name], given, f"{source}: {name}") for name, given in options.items()]
    ranks = [0 if isinstance(rule, Cleaner) else 1 if isinstance(rule, Filter) else 2 for rule in rules]
    for rank, following, rule in zip(ranks, ranks[1:], rules, strict=False):
        if following < rank:
            what = "drops documents" if rank == 1 else "joins the title"
            raise ConfigError(f"{source}: rules: {rule.name} {what}; move it below all rules that change the text")
    file.rules = tuple(rules)
    return file


def _record(body: Any, source: str) -> Record:
    given = dict(_mapping(body, f"{source}: record"))
    constants = given.pop("constants", None)
    given = parse_section(given, f"{source}: record", _RecordNames)
    named = {str(key): value for key, value in _mapping(constants, f"{source}: record.constants").items()}
    return _named(f"{source}", Record, {**given, "constants": named})


@dataclass(frozen=True)
class _RecordNames:
    """The fields of `Record` with a simple type."""

    text: str = "text"
    title: str = ""
    keep: tuple[str, ...] = ()


def _built(kind: type, body: Any, source: str) -> Any:
    return _named(source, kind, parse_section(_mapping(body, source), source, kind))


def _named(source: str, kind: type, values: Mapping[str, Any]) -> Any:
    """An instance; what its own checks find is said with the source."""
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{source.split(': ')[0]}: {error}") from error


def _mapping(value: Any, source: str) -> Mapping[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: must be a mapping (key: value), not {type(value).__name__}")
    return value


def _known(word: Any, words: Sequence[str] | Mapping[str, Any], source: str, what: str) -> None:
    if word in words:
        return
    near = nearest(str(word), words)
    hint = f"did you mean {near}?" if near else f"there are {', '.join(words)}"
    raise ConfigError(f"{source}: {str(word)[:80]}: unknown {what}; {hint}")
