"""A table in a page of the documentation, between two comments, which a script here writes and checks."""

import argparse
import pathlib
import re
import sys

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"


def main(script, description, page, what, lines):
    """Parses --check, --write and --file, and does it.

    Args:
      script: the script's name.
      description: the text of --help.
      page: the page's file.
      what: what the table is of; the comments name it.
      lines: () → the table's lines.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="exit with 1 if the file's table is not up to date")
    action.add_argument("--write", action="store_true", help="write the table between the file's markers")
    parser.add_argument("--file", type=pathlib.Path, default=page)
    arguments = parser.parse_args()
    text, command = arguments.file.read_text(), f"python benchmarks/{script} --write"
    begin, end = f"<!-- {what}: {command} -->", f"<!-- end of {what} -->"
    place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(place.findall(text)) != 1:
        sys.exit(f"{arguments.file} must have one place for the table, from {begin} to {end}")
    new = place.sub(lambda _: "\n".join([begin, *lines(), end]), text)
    if arguments.write:
        arguments.file.write_text(new)
    elif new != text:
        sys.exit(f"the {what} in {arguments.file} are out of date: run {command}")
