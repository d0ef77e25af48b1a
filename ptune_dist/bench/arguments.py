"""The command-line arguments that the sides of a benchmark share."""

import argparse


def side_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of `CONFIG [key.path=value ...] --result FILE`; call its `parse_intermixed_args`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--result", required=True, help="the JSON file to write the measures to")
    return parser
