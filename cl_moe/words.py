"""The words of a command line: flags, keys and values, as Hydra reads them. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from cl_moe.errors import InputError

_FLAGS_WITH_VALUE = (
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p"),
    *("--cfg", "-c", "--experimental-rerun"),
)
_EARLIER = ("resume", "branch", "distill", "reproduce")  # keys that name an earlier run
_INFO = ("--info", "-i")  # their value may be left out


def quoted(text: str) -> str:
    """A text as one value of an override."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def value_of(arguments: Iterable[str], key: str) -> str | None:
    """The last value given to a key, without its quotes; None for none and for null.

    Raises:
        InputError: an empty value, or several.
    """
    given = [word for word in arguments if key_of(word) == key and "=" in word]
    if not given:
        return None
    text = given[-1].partition("=")[2]
    name = text.rpartition("@")[0] if key in ("branch", "distill") and "@" in text else text
    if key in _EARLIER and name and name.lower() != "null" and Path(name).is_dir():
        return text  # with characters that mean something to Hydra, maybe
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException:
        return text.strip("'\"")
    if override.is_sweep_override():
        raise InputError(got=given[-1], allowed=f"one value; a sweep is over other keys than {key}", key=key)
    value = override.value()
    if value is None:
        return None
    if value == "":
        raise InputError(got=given[-1], allowed="a value, or null for none", key=key)
    return value if isinstance(value, str) else text  # a run id may look like a number


def uri_of(arguments: Iterable[str]) -> list[str]:
    """The store given, in a list; an empty one without."""
    uri = value_of(arguments, "tracking.uri")
    return [] if uri is None else [uri]


def split_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's own flags, each with the value that follows it; and the others.

    Flags shall stand first: Hydra refuses arguments on both sides of one.
    """
    flags, others = list[str](), list[str]()
    for before, word, after in zip(["", *arguments], arguments, [*arguments[1:], ""], strict=False):
        if word in _INFO and (not after or "=" in after or after.startswith("-")):
            flags.append("--info=all")  # what it means, and takes no other argument for its value
        elif word.startswith("-") or before in _FLAGS_WITH_VALUE or (before in _INFO and "=" not in word):
            flags.append(word)
        else:
            others.append(word)
    return flags, others


def with_config_dir(flags: list[str], *stored: str | None) -> list[str]:
    """The flags, with the configuration folder of an earlier command unless they name one."""
    if any(flag.startswith(("--config-dir", "-cd")) for flag in flags):
        return flags
    return [*flags, *(f"--config-dir={path.removeprefix('file://')}" for path in stored if path)]


def is_sweep(arguments: Iterable[str]) -> bool:
    """Whether a command makes many runs."""
    return any(word in ("-m", "--multirun", "hydra.mode=MULTIRUN") for word in arguments)


def key_of(argument: str) -> str:
    """``growth.events`` of ``++growth.events={2:4}``."""
    return argument.partition("=")[0].lstrip("+~")


def is_under(key: str, places: Iterable[str]) -> bool:
    """Whether a key is one of the places, or stands below one of them."""
    return any(key == place or key.startswith((f"{place}.", f"{place}/")) for place in places)


def without(words: Iterable[str], *keys: str) -> list[str]:
    """The words that give no value to any of the keys."""
    return [word for word in words if key_of(word) not in keys]
