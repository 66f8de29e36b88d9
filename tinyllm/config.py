"""Configurations are frozen dataclasses: one definition gives the defaults, the checks, the command-line options and the JSON.

    @dataclass(frozen=True)
    class OptimizerConfig:
        lr: float = setting(1e-3, "highest learning rate", minimum=0)

A field whose default is None means "decided by another setting", which its help names.
"""
import dataclasses
import difflib
import functools
import types
import typing


def setting(default, help: str, *, choices: tuple = (), minimum=None, maximum=None, metavar: str = "", several: bool = False):
    """A dataclass field with the text and the limits that the command line shows and `check` enforces.

    metavar : what its value is called in the help.     several : for tuples: `--data A B` gives two, else `--stop A --stop B` does.
    """
    limits = dict(choices=choices, minimum=minimum, maximum=maximum)
    return dataclasses.field(default=default, metadata=dict(help=help, metavar=metavar, several=several, **limits))


def again(config_class: type, name: str, default, help: str | None = None):
    """A setting of another class with another default, and with another text where that is given."""
    known = next(field for field in dataclasses.fields(config_class) if field.name == name).metadata
    return dataclasses.field(default=default, metadata=dict(known) | ({} if help is None else dict(help=help)))


def option_name(field_name: str) -> str:
    """How a field is called on the command line."""
    return "--" + field_name.replace("_", "-")


def value_type(config_class: type, field: dataclasses.Field) -> type:
    """The plain type of a field: int for `int` and for `int | None`; the element type for tuples."""
    kind = _type_hints(config_class)[field.name]
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind


_type_hints = functools.cache(typing.get_type_hints)  # it looks through all base classes, for each of hundreds of options


def check(config) -> None:
    """Raise ValueError, naming the option and what it takes, for the first value outside its choices or limits."""
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata
        if value is None or not limits:
            continue
        name = option_name(field.name)
        if limits["choices"] and value not in limits["choices"]:
            raise ValueError(f"{name} is {value!r}: it takes {', '.join(map(str, limits['choices']))}{suggestion(str(value), limits['choices'])}")
        if limits["minimum"] is not None and not value >= limits["minimum"]:
            raise ValueError(f"{name} is {value}: it must be at least {limits['minimum']}")
        if limits["maximum"] is not None and not value <= limits["maximum"]:
            raise ValueError(f"{name} is {value}: it must be at most {limits['maximum']}")


def from_dict(config_class: type, values: dict, where: str):
    """A config from a dictionary that was read from `where`; an unknown name is an error with a suggestion."""
    names = [f.name for f in dataclasses.fields(config_class)]
    for name in values:
        if name not in names:
            raise ValueError(f"{where}: unknown setting {name!r}{suggestion(name, names)}")
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def suggestion(word: str, known) -> str:
    """ "; did you mean …?" where a known word is close, else nothing."""
    close = difflib.get_close_matches(word, [str(k) for k in known], 1)
    return f"; did you mean {close[0]}?" if close else ""
