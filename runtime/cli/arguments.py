"""What all subcommands share: one-sentence errors, and dashes and underscores meaning the same in a flag."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import NoReturn

from heteromesh.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UserError instead of printing usage and exiting."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"heteromesh {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Every mistake in the arguments ends here."""
        raise UserError(f"{message} (see `{self.prog} --help`)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses with every `--snake_case` flag read as `--snake-case`."""
        return self.parse_args([_dashed(word) for word in argv])


def whole_number(least: int) -> Callable[[str], int]:
    """Returns an argparse type: whole numbers from `least` on."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least {least}")
        return int(text)

    return parse


def number(fits: Callable[[float], bool], rule: str) -> Callable[[str], float]:
    """Returns an argparse type: numbers that fit; `rule` says in words which do. No comparison holds for NaN."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} must be {rule}")
        return value

    return parse


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value
