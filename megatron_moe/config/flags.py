"""The command line: an argparse parser made from the section dataclasses, so that a field is a flag.

`parse_run` is the training command line (defaults < --recipe < --config < flags); `parse_sections` serves the
other entry points, which bring their own dataclasses. Every mistake is a `ConfigError` of one line.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, NoReturn

from megatron_moe.config.aliases import translate
from megatron_moe.config.base import ConfigError, format_value
from megatron_moe.config.run import RunConfig
from megatron_moe.config.schema import NONE_WORD, FieldSpec, nearest, run_sections, section_fields
from megatron_moe.config.yaml_io import Values, build_run, load_recipe, load_values


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """Where values come from: defaults, then --recipe, then --config, then flags."""

    recipe: str | None = None
    """A packaged recipe by name."""
    config: str | None = None
    """A YAML file, such as the config.yaml of a run."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """How to start, apart from what to run."""

    dry_run: bool = False
    """Print the model, its parameters, the memory per rank and the layout, then stop."""
    world_size: int | None = None
    """With --dry-run: the number of processes to assume. Default: as many as were started."""
    debug: bool = False
    """Show a traceback with an error message."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How to start the entry points that do not train."""

    debug: bool = False
    """Show a traceback with an error message."""


def parse_run(
    argv: Sequence[str], *, prog: str, description: str, loaded: Callable[[Values], Values] | None = None
) -> tuple[RunConfig, LaunchOptions]:
    """The run and the launch options that a training command line describes.

    Args:
        argv: the words after the program's name.
        prog: the program as the user types it, `python -m megatron_moe.pretrain`.
        description: one line for --help.
        loaded: what the checkpoint that is loaded says of itself, asked with all that the user says; defaults give
            way to it.

    Raises:
        ConfigError: a flag, a value, a file or a combination is wrong.
    """
    sections = run_sections(RunConfig)
    model = "data/tokenizer/tokenizer.model"
    example = f"{prog} --recipe tiny-cpu --data-path data/train --tokenizer-model {model} --save runs/tiny"
    everything = {"start": StartingPoint, "launch": LaunchOptions, **sections}
    given = _parse(argv, everything, prog, description, example)
    start = StartingPoint(**given["start"])
    launch = LaunchOptions(**given["launch"])
    layers = []
    if start.recipe is not None:
        layers.append(load_recipe(start.recipe))
    if start.config is not None:
        layers.append(load_values(start.config, sections))
    if launch.world_size is not None and not (launch.dry_run and launch.world_size >= 1):
        raise ConfigError(f"--world-size {launch.world_size}: must be at least 1, and only goes with --dry-run")
    layers.append(given)
    said = {name: {key: value for layer in layers for key, value in layer.get(name, {}).items()} for name in sections}
    return build_run({} if loaded is None else loaded(said), *layers), launch


def parse_sections(
    argv: Sequence[str], sections: Mapping[str, type], *, prog: str, description: str, example: str = ""
) -> tuple[dict[str, Any], bool]:
    """Instances of `sections` by name from a command line, and whether --debug was given.

    A field without a default is a required flag.

    Args:
        argv: the words after the program's name.
        sections: dataclasses whose fields are the flags, by the name that heads their group in --help.
        prog: the program as the user types it.
        description: one line for --help.
        example: the command that --help begins with. Default: `prog` alone.

    Raises:
        ConfigError: a flag, a value or a combination is wrong, or a required flag is missing.
    """
    values = _parse(argv, {**sections, "launch": ServeOptions}, prog, description, example or prog)
    for name, section in sections.items():
        for spec in section_fields(section).values():
            if spec.default is MISSING and spec.name not in values[name]:
                raise ConfigError(f"{spec.flag}: is required: {spec.help}")
    return {name: section(**values[name]) for name, section in sections.items()}, values["launch"].get("debug", False)


class _Parser(argparse.ArgumentParser):
    """argparse without usage dumps: its own errors become ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class _Switch(argparse.BooleanOptionalAction):
    """--flag and --no-flag. argparse's own class takes every spelling that begins with --no- for the second, so that
    --no-load-optim would turn itself off."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        """Set the field: the first spelling is the one that turns it on."""
        setattr(namespace, self.dest, option_string == self.option_strings[0])


def _parser(prog: str, description: str, example: str, sections: Mapping[str, type]) -> _Parser:
    parser = _Parser(
        prog=prog,
        usage=argparse.SUPPRESS,
        description=f"Example:\n  {example}\n\n{description}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=8, width=110),
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
    )
    owners: dict[str, str] = {}
    for name, section in sections.items():
        group = parser.add_argument_group(f"{name} ({_first_sentence(section)})")
        for spec in section_fields(section).values():
            if spec.name in owners:
                raise TypeError(f"{spec.flag} is defined by both {owners[spec.name]} and {name}")
            owners[spec.name] = name
            _add_flag(group, spec)
    return parser


def _add_flag(group: Any, spec: FieldSpec) -> None:
    help_text = spec.help
    if spec.default is not None and spec.default is not MISSING and spec.default is not False:
        help_text += f" (default: {'on' if spec.default is True else format_value(spec.default)})"
    help_text = help_text.replace("%", "%%")
    if spec.scalar is bool and not spec.many:
        group.add_argument(spec.flag, action=_Switch, default=argparse.SUPPRESS, help=help_text)
        return
    words = {int: "N", float: "X", str: "TEXT"}
    metavar = "{" + ",".join(spec.choices) + "}" if spec.choices is not None else words[spec.scalar]
    group.add_argument(
        spec.flag,
        type=_item_parser(spec),
        nargs="+" if spec.many else None,
        metavar=metavar,
        default=argparse.SUPPRESS,
        help=help_text,
    )


def _item_parser(spec: FieldSpec) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if spec.optional and text == NONE_WORD:
            return None
        try:
            return spec.item_from_text(text)
        except ValueError as error:
            near = nearest(text, spec.choices or ())
            hint = f"; did you mean {near}?" if near else ""
            raise ConfigError(f"{spec.flag} {text}: must be {spec.legal}{hint}") from error

    return parse


def _parse(argv: Sequence[str], sections: Mapping[str, type], prog: str, description: str, example: str) -> Values:
    """The flags that were given, by section and field name. Aliases are translated first."""
    parser = _parser(prog, description, example, sections)
    specs = {name: spec for section in sections.values() for name, spec in section_fields(section).items()}
    switches = {spec.flag for spec in specs.values() if spec.scalar is bool and not spec.many}
    known = {spec.flag for spec in specs.values()} | {"--no-" + flag[2:] for flag in switches} | {"--help"}
    words = translate(argv, known)
    try:
        namespace, extra = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(_argument_error(error, specs)) from error
    if extra:
        raise ConfigError(_describe_extra(extra[0], words, known, switches))
    given = {name: _as_value(specs[name], value) for name, value in vars(namespace).items()}
    return {
        name: {field: given[field] for field in section_fields(section) if field in given}
        for name, section in sections.items()
    }


def _as_value(spec: FieldSpec, value: Any) -> Any:
    """What argparse collected as the field's value: a tuple where the field is one, None where it was
    unset."""
    if not spec.many:
        return value
    if None not in value:
        return tuple(value)
    if len(value) > 1:
        raise ConfigError(f"{spec.flag}: `{NONE_WORD}` unsets the flag and stands alone")
    return None


def _argument_error(error: argparse.ArgumentError, specs: Mapping[str, FieldSpec]) -> str:
    flag = (error.argument_name or "").split("/")[0]
    spec = specs[flag[2:].replace("-", "_")]
    if spec.scalar is bool:
        return f"{flag}: takes no value; {flag} turns it on, --no-{flag[2:]} off"
    count = "one or more values: " if spec.many else ""
    return f"{flag}: needs {count}{spec.legal}"


def _describe_extra(word: str, words: Sequence[str], known: set[str], switches: set[str]) -> str:
    """Why argparse could not place `word`: an unknown flag, or a value that belongs to none."""
    if not word.startswith("-") or word == "--":
        before = words[words.index(word) - 1] if word in words[1:] else ""
        if before in switches or before.startswith("--no-"):
            return f"{before} {word}: takes no value; {before} is a switch"
        return f"{word}: stands alone; a value follows its flag, and --help lists the flags"
    flag = word.split("=")[0]
    # Every flag begins with two dashes, so unlike flags are somewhat alike already.
    near = nearest("--" + flag.lstrip("-").replace("_", "-"), sorted(known), likeness=0.7)
    return f"{flag}: unknown flag; " + (f"did you mean {near}?" if near else "--help lists the flags")


def _first_sentence(section: type) -> str:
    return (section.__doc__ or section.__name__).split("\n")[0].split(". ")[0].rstrip(".")
