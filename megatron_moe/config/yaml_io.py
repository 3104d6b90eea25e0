"""Config files: read with every key and type checked, written so that reading gives the same values back.

A file nests fields by section, like

    model:
      num_layers: 24
    moe:
      num_experts: [32, 32, 64]

Only the keys that are given are set. `config.yaml` in a run's directory holds all of them, with their help.
"""

import textwrap
from collections.abc import Hashable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from megatron_moe.config.base import ConfigError, disk_error
from megatron_moe.config.run import RunConfig
from megatron_moe.config.schema import nearest, run_sections, section_fields

Values = dict[str, dict[str, Any]]
"""Section name -> field name -> value: what a recipe, a file or the command line sets."""


_NO_WRAP = 10**9
# With every value and its help a config file has 30 KiB, with thousands of files in --data-path a few MiB:
# what a run has saved must be loaded again. PyYAML takes seconds for each MiB, brackets most.
_LARGEST_FILE = 8 * 1024 * 1024
_DEEPEST = 8
_LONGEST_NUMBER = 100
_SHOWN = 80
# Sections that runs of earlier versions did not save; a file cut short before one of them lacks later ones as well.
_NEWER_SECTIONS = ("routing",)
_KINDS = {"int": "integer", "str": "text", "float": "number"}


def load_run(path: str | Path) -> RunConfig:
    """The run that a config file describes; what it leaves out has its default.

    Raises:
        ConfigError: the file cannot be read, or a key or a value in it is wrong.
    """
    return build_run(load_values(path, run_sections(RunConfig)))


def load_saved_run(path: str | Path) -> RunConfig:
    """The run whose config file a checkpoint holds; it has every section, though perhaps not the newest and not the
    newest flags.

    Raises:
        ConfigError: as `load_run`, or the file was cut short.
    """
    values = load_values(path, run_sections(RunConfig))
    for name in run_sections(RunConfig):
        if name not in values and name not in _NEWER_SECTIONS:
            raise ConfigError(f"{path}: lacks the section {name}; it was cut short, restore it or load another step")
    return build_run(values)


def build_run(*layers: Values) -> RunConfig:
    """The run that results from layers of values, later ones going over earlier ones, field by field.

    Raises:
        ConfigError: a value, or a combination of values, is illegal.
    """
    sections = {}
    for name, section in run_sections(RunConfig).items():
        values: dict[str, Any] = {}
        for layer in layers:
            values.update(layer.get(name, {}))
        sections[name] = section(**values)
    return RunConfig(**sections)


def save_run(run: RunConfig, path: str | Path) -> None:
    """Write every value of a run, reusable with --config.

    Raises:
        UserError: it cannot be written, as on a full disk.
    """
    try:
        Path(path).write_text(dump_run(run), encoding="utf-8")
    except OSError as error:
        raise disk_error(str(path), error) from error


def dump_run(run: RunConfig) -> str:
    """Every value of a run as YAML, each under its help."""
    return dump_sections({name: getattr(run, name) for name in run_sections(RunConfig)})


def dump_sections(sections: Mapping[str, Any]) -> str:
    """Section instances by name as YAML, each value under its help."""
    lines = []
    for name, section in sections.items():
        lines.append(f"{name}:")
        for field, spec in section_fields(section.__class__).items():
            lines += [f"  # {line}" for line in textwrap.wrap(spec.help, width=106)]
            lines.append(f"  {_dump_field(field, getattr(section, field))}")
        lines.append("")
    return "\n".join(lines)


def load_values(path: str | Path, sections: Mapping[str, type]) -> Values:
    """The values that a config file sets, with their types checked.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or has an unknown key or a value of a wrong type.
    """
    return parse_values(read_yaml_text(path), str(path), sections)


def read_yaml_text(path: str | Path) -> str:
    """The text of a config file.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, or is too large to be one.
    """
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(_LARGEST_FILE + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    if len(content) > _LARGEST_FILE:
        raise ConfigError(f"{path}: is larger than {_LARGEST_FILE >> 20} MiB, so it is no config file")
    return text


def recipe_names() -> list[str]:
    """Names that --recipe takes, sorted."""
    folder = resources.files("megatron_moe.config") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_recipe(name: str) -> Values:
    """The values that a packaged recipe sets.

    Raises:
        ConfigError: there is no recipe of that name; the message lists them.
    """
    names = recipe_names()
    if name not in names:
        near = nearest(name, names)
        hint = f"did you mean {near}? " if near else ""
        raise ConfigError(f"--recipe {name}: unknown; {hint}There are: {', '.join(names)}")
    text = (resources.files("megatron_moe.config") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return parse_values(text, f"recipe {name}", run_sections(RunConfig))


def parse_values(text: str, source: str, sections: Mapping[str, type]) -> Values:
    """The values that YAML text sets; `source` names it in errors.

    Raises:
        ConfigError: not YAML, an unknown or repeated key, or a value of a wrong type.
    """
    values: Values = {}
    for name, body in _mapping(parse_yaml(text, source), source, "the file").items():
        if name not in sections:
            raise ConfigError(f"{source}: {_one_line(name)}: unknown section; {_suggest_section(name, sections)}")
        values[name] = parse_section(body, f"{source}: {name}", sections[name])
    return values


def parse_yaml(text: str, source: str) -> Any:
    """What YAML text stands for; repeated keys, aliases and what only means harm are errors.

    Raises:
        ConfigError: it is not YAML; the message names `source` and the line.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}{_yaml_problem(error)}") from error
    except (ValueError, OverflowError) as error:
        # Of PyYAML's scanner, for characters and versions that are none.
        raise ConfigError(f"{source}: not YAML: {_one_line(error)}") from error


def parse_section(body: Any, source: str, section: type) -> dict[str, Any]:
    """The values that a parsed mapping sets of a section, with keys and types checked.

    Raises:
        ConfigError: an unknown key (with the nearest known one), or a value of a wrong type.
    """
    fields = section_fields(section)
    values = {}
    for key, value in _mapping(body, source, "a section").items():
        if key not in fields:
            near = nearest(str(key), fields)
            hint = f"did you mean {near}?" if near else f"the section has {', '.join(fields)}"
            raise ConfigError(f"{source}.{_one_line(key)}: unknown key; {hint}")
        spec = fields[key]
        try:
            values[key] = spec.value_from_yaml(value)
        except ValueError as error:
            legal = f"a list of {spec.legal}" if spec.many else spec.legal
            quote = " (in quotes)" if spec.legal == "text" else ""
            shown = "null" if value is None else _one_line(value)
            raise ConfigError(f"{source}.{key}: {shown}: must be {legal}{quote}") from error
    return values


def _yaml_problem(error: yaml.YAMLError) -> str:
    """PyYAML's several lines in one: where, and what."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f", line {error.problem_mark.line + 1}: {_one_line(error.problem)}"
    return f": {_one_line(error)}"


def _one_line(value: Any) -> str:
    """Something from a file, as a message can show it."""
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _suggest_section(name: Any, sections: Mapping[str, type]) -> str:
    """What a key that is no section could have meant: a field at the wrong level, or a section spelled
    wrong."""
    for section_name, section in sections.items():
        if name in section_fields(section):
            return f"it belongs under {section_name}:"
    near = nearest(str(name), sections)
    return f"did you mean {near}?" if near else f"sections are {', '.join(sections)}"


def _mapping(value: Any, source: str, what: str) -> dict[Any, Any]:
    """`value` as a mapping; nothing at all counts as an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: {what} must be a mapping (key: value), not {type(value).__name__}")
    return value


def _dump_field(name: str, value: Any) -> str:
    """`name: value` on one line."""
    if isinstance(value, tuple):
        return f"{name}: {_dump(list(value), default_flow_style=True)}"
    return _dump({name: value}, default_flow_style=False)


def _dump(value: Any, *, default_flow_style: bool) -> str:
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=default_flow_style, allow_unicode=True, width=_NO_WRAP
    )
    return text.rstrip("\n")


class _Dumper(yaml.SafeDumper):
    """The safe dumper, but text with line breaks or control characters is quoted and escaped.

    PyYAML folds some of it into lines that do not come back as they were, such as a lone U+0085.
    """


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, but a repeated key is an error: PyYAML takes the last one without a word.

    A few lines of aliases can stand for gigabytes, brackets exhaust Python's stack, and a long number takes hours to
    convert: all are errors here.
    """

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not used here; write it out", mark)
        if self._depth > _DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "nested too deeply", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode):
            kind = node.tag.rpartition(":")[2]
            if kind in ("int", "float") and len(node.value) > _LONGEST_NUMBER:
                problem = f"a number of {len(node.value)} characters"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            try:
                # Half of a surrogate pair cannot be printed, nor be in a file's name.
                node.value.encode("utf-8")
                return super().construct_object(node, deep)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                problem = f"{_one_line(ascii(node.value))} is no {_KINDS.get(kind, kind)}"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error
        return super().construct_object(node, deep)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # the base class reports it
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key} given twice", key_node.start_mark)
            seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping
