"""Types of options, and helpers that several commands use."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

from tyro.conf import arg, subcommand
from tyro.constructors import PrimitiveConstructorSpec

from awnet.files import expanded
from awnet.text import visible

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


def number(text: str) -> float:
    """A number or a fraction: ``0.03``, ``8/255``."""
    numerator, _, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator) if denominator else float(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"expected a number or a fraction such as 8/255, got {text!r}") from None


# The empty hint suppresses "(default: None)"; the help text of these options names the default in words.
Maybe = Annotated[T | None, arg(help_behavior_hint="")]
Several = Annotated[tuple[T, ...], arg(help_behavior_hint="")]
_NUMBER = PrimitiveConstructorSpec[Any](
    nargs=1,
    metavar="NUMBER",
    instance_from_str=lambda texts: number(texts[0]),
    is_instance=lambda value: value is None or isinstance(value, float),
    str_from_instance=lambda value: [str(value)],
)
Number = Annotated[float | None, _NUMBER, arg(help_behavior_hint="")]
Fraction = Annotated[float, _NUMBER]


@dataclass(kw_only=True)
class ImportOption:
    user_module: Annotated[str | None, arg(name="import", metavar="CODE", help_behavior_hint="")] = None
    """Python file or module to import first: its code may register models (awnet.models.register_model)."""

    def import_user_module(self) -> None:
        """Imports what ``--import`` names, if anything."""
        if self.user_module is not None:
            from awnet.models.user_code import import_code

            import_code(self.user_module)


# option → the placeholder for its value in the help, instead of its type
_PLACEHOLDERS = {
    "attack": "ATTACK",
    "attacks": "ATTACK [ATTACK ...]",
    "authors": "TEXT",
    "backend": "BACKEND",
    "cases": "CASE [CASE ...]",
    "compare_with": "RUN [RUN ...]",
    "data": "DATASET",
    "data_dir": "FOLDER",
    "device": "DEVICE",
    "evaluation": "NAME",
    "files": "FILE ...",
    "footnote": "TEXT",
    "init_from": "RUN",
    "link": "URL",
    "model": "MODEL",
    "model_options": "NAME=VALUE [NAME=VALUE ...]",
    "name": "NAME",
    "providers": "PROVIDER [PROVIDER ...]",
    "recipe": "RECIPE",
    "recipe_options": "NAME=VALUE [NAME=VALUE ...]",
    "reports": "REPORT REPORT ...",
    "results": "FOLDER",
    "runs": "RUN ...",
    "mean": "MEAN [MEAN ...]",
    "seeds": "SEED SEED [SEED ...]",
    "shape": "SHAPE [SHAPE ...]",
    "teachers": "TEACHER [TEACHER]",
    "source": "MODEL",
    "std": "STD [STD ...]",
    "surrogates": "MODEL [MODEL ...]",
    "title": "TEXT",
    "url": "URL",
    "venue": "TEXT",
    "weights": "FILE",
    "what": "EXPERIMENT",
}


def with_placeholders(command: Any) -> Any:
    """Annotates the options of the class ``command`` with placeholders: ``--model MODEL``, not ``STR``."""
    annotated: Any = Annotated
    if command not in _with_placeholders:
        _with_placeholders.add(command)
        hints = get_type_hints(command, include_extras=True)
        for name in hints.keys() & _PLACEHOLDERS.keys():
            command.__annotations__[name] = annotated[hints[name], arg(metavar=_PLACEHOLDERS[name])]
    return command


_with_placeholders: set[Any] = set()


def subcommands(commands: Mapping[str, Any]) -> Any:
    """The union of classes of commands by name, for tyro to choose from."""
    annotated: Any = Annotated
    return reduce(or_, (annotated[command, subcommand(name)] for name, command in commands.items()))


def command_group(about: str, commands: Mapping[str, Any]) -> Any:
    """The class of a command that only has subcommands, by name; ``about`` is its help."""
    namespace = {"__doc__": about, "run": lambda self, console: self.command.run(console)}
    return make_dataclass("Group", [("command", subcommands(commands))], namespace=namespace)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raises FileExistsError if ``path`` exists, unless it may be overwritten."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another file, or replace it with --overwrite")


def parse_options(pairs: Sequence[str], flag: str) -> dict[str, Any]:
    """``("lr=0.05", "eps=8/255", "milestones=75,90", "flip=true")`` as a dict of Python values."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise ValueError(f"{flag} takes NAME=VALUE, got {pair!r}")
        options[name.replace("-", "_")] = _value(text)
    return options


def _value(text: str) -> Any:
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    if "," in text:
        return tuple(_value(part) for part in text.split(",") if part)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        try:
            return number(text)
        except ValueError:
            return text


def expand_paths(options: T) -> T:
    """A copy of a command's options with ``~`` expanded in every path, also in tuples and subcommands."""
    if isinstance(options, Path):
        return expanded(options)  # type: ignore[return-value]
    if isinstance(options, tuple):
        return tuple(map(expand_paths, options))  # type: ignore[return-value]
    if is_dataclass(options) and not isinstance(options, type):
        values = {field.name: getattr(options, field.name) for field in fields(options) if field.init}
        return replace(options, **{name: expand_paths(value) for name, value in values.items()})
    return options


def print_text(console: Console, text: str) -> None:
    """Prints ``text`` without rich's markup or line breaks, and with control characters escaped."""
    console.print(visible(text), markup=False, soft_wrap=True)
