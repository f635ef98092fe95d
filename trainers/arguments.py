"""Command line and YAML configuration, shared by every script."""

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser


def parse_arguments(
    *dataclass_types: type, argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """Fill one instance of each dataclass from the command line and from YAML files.

    `--config file.yaml`, or `--config file.yaml:section` for one section of it (may be given several times, later
    files win), is turned into flags that are read *before* those of the command line, so a flag always wins over the
    files. The detour through flags is what gives YAML values
    their types: YAML 1.1 reads `learning_rate: 1e-4` as a string. Lists become several values, mappings JSON, `null`
    leaves the default. Flags are never abbreviated: what is unique today is ambiguous tomorrow.

    Args:
        dataclass_types: `TrainingArguments` subclasses and plain dataclasses; their field names must differ.
        argv: the arguments without the program's name; `sys.argv[1:]` when None.
        description: first paragraph of `--help`, normally the script's docstring.

    Returns:
        One instance per dataclass, in order.

    Raises:
        SystemExit: with a message on stderr and exit code 2, for an unknown flag or YAML key (names the nearest known
            ones), an unreadable file, or a value that a dataclass refuses. `--help` exits with 0.
    """
    parser = _Parser(dataclass_types, description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE.yaml[:SECTION]",
        help="YAML file of these options; flags win over it.",
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog=parser.prog)
    config_parser.add_argument("--config", action="append", default=[])
    files = config_parser.parse_known_args(argv)[0].config

    namespace, unknown = parser.parse_known_args(_config_to_argv(parser, files) + argv)
    if unknown:
        parser.error(_describe_unknown(unknown, _flags(parser)))
    values = vars(namespace)
    instances = []
    for dataclass_type in dataclass_types:
        names = [field.name for field in dataclasses.fields(dataclass_type) if field.init]
        try:
            instances.append(dataclass_type(**{name: values[name] for name in names}))
        except ValueError as error:
            parser.error(str(error))
    return tuple(instances)


def split_words(values: Iterable[Any]) -> list[str]:
    """The values of a flag that takes a list, written with commas or spaces; each once."""
    return list(dict.fromkeys(part.strip() for value in values for part in str(value).split(",") if part.strip()))


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first: 150 lines of TrainingArguments, with the message scrolled away
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        raise SystemExit(2)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the commands of a script's docstring on their own lines and shows defaults."""


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    # the spelling with dashes and the `--no_x` complements exist too, but one name per option makes better suggestions
    return [action.option_strings[0] for action in parser._actions if action.option_strings]


def _describe_unknown(unknown: Sequence[str], flags: Iterable[str]) -> str:
    messages = []
    after_flag = False  # the value of an unknown flag needs no complaint of its own
    for argument in unknown:
        if argument.startswith("-"):
            name = argument.split("=", 1)[0]
            messages.append(f"unknown flag {name}" + _suggest("--" + name.lstrip("-").replace("-", "_"), flags))
        elif not after_flag:
            messages.append(f"unexpected value {argument!r}: it belongs to no flag")
        after_flag = argument.startswith("-") and "=" not in argument
    return "; ".join(messages)


def _suggest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(matches)}?)" if matches else " (see --help for the known ones)"


def _config_to_argv(parser: _Parser, files: Iterable[str]) -> list[str]:
    """Turn YAML files into flags; what no flag can say becomes a default of `parser`."""
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    known = {flag.removeprefix("--") for flag in _flags(parser)} - {"-h", "config"}
    settings: dict[str, tuple[Any, str]] = {}
    for path in files:
        content = _read_config(parser, path)
        for key, value in content.items():
            name = str(key).replace("-", "_")
            if name not in known and isinstance(value, dict):
                sections = [f"{path}:{section}" for section, lines in content.items() if isinstance(lines, dict)]
                parser.error(f"{path}: {str(key)!r} is a section and no flag: name a section: {' or '.join(sections)}")
            if name not in known:
                parser.error(f"{path}: unknown key {str(key)!r}" + _suggest(name, known))
            settings[name] = (value, path)

    arguments: list[str] = []
    for name, (value, path) in settings.items():
        action = actions[f"--{name}"]
        if value is None:
            continue
        if isinstance(value, list) and value and action.nargs == "+":
            arguments += [f"--{name}", *(_to_text(item) for item in value)]
        elif isinstance(value, list) and (action.nargs == "+" or action.type is str):
            # an empty list, or a field that takes a string or a list (report_to): a flag can say neither
            parser.set_defaults(**{action.dest: value})
        elif isinstance(value, list):
            parser.error(f"{path}: {name} takes one value, got the list {value}")
        else:
            # one word, so that a value that begins with a dash (-1e-4, or text) is not taken for a flag
            arguments.append(f"--{name}={_to_text(value)}")
    return arguments


def _read_config(parser: _Parser, source: str) -> dict[Any, Any]:
    path, section = source, None
    if not Path(source).expanduser().exists() and ":" in source:
        path, section = source.rsplit(":", 1)
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"cannot read --config {path}: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"{path} is not valid YAML: {error}")
    if content is not None and not isinstance(content, dict):
        parser.error(f"{path} must hold `name: value` lines, found a {type(content).__name__}")
    content = content or {}
    if section is not None:
        sections = [name for name, value in content.items() if isinstance(value, dict)]
        if section not in sections:
            parser.error(f"{path} has no section {section!r}: it has {', '.join(map(str, sections)) or 'none'}")
        content = content[section]
    return content


def _to_text(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
