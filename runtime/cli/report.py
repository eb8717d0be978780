"""`heteromesh report`: a run as one HTML page, or as one JSON document. Never imports torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from heteromesh.errors import UserError
from heteromesh.planner.files import written_whole
from heteromesh.runtime.cli.arguments import Parser
from heteromesh.runtime.cli.terminal import say
from heteromesh.runtime.report.report_facts import read_facts
from heteromesh.runtime.report.report_page import page, text

NAME = "report.html"


def main(argv: Sequence[str]) -> int:
    """Writes the page and says where; with --json prints the facts instead. Returns the exit code."""
    parser = Parser(
        "report", "Shows a run as one HTML page: steps against their plan, ranks, members, delays, diagnoses."
    )
    parser.add_argument("directory", type=Path, metavar="RUN_DIR")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"the page (default: RUN_DIR/{NAME})")
    parser.add_argument("--json", action="store_true", help="one JSON document and nothing else; a page only with -o")
    args = parser.parse(argv)
    facts = read_facts(args.directory)
    output = args.output or (None if args.json else args.directory / NAME)
    if output is not None:
        write(output, page(facts))
    if args.json:
        print(json.dumps(asdict(facts), allow_nan=False, default=str))
    else:
        say(f"Report   {output}: {text(facts)}")
    return 0


def write(path: Path, content: str) -> None:
    """Writes all of it or nothing. Raises UserError."""
    if path.is_dir():
        raise UserError(f"report {path} is a directory: name a file")
    try:
        with written_whole(path) as part:
            part.write_text(content, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"report {path} can't be written ({error.strerror}): name another file with -o") from None
