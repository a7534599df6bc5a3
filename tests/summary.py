"""One table of several runs of the suite.

    python -m tests.summary jax.xml torch.xml

Each file is what `pytest --junitxml` wrote; its name says what was run. Below
the table stand why tests were skipped, and in which files the seconds went. The
exit status is 1 if a test failed, or if a file is missing that is not
`--optional`.
"""

import argparse
import ast
import collections
import pathlib
import sys
from xml.etree import ElementTree

from tabulate import tabulate

HEADERS = ("run", "passed", "failed", "skipped", "minutes")


def summarize(path):
    """A row of the table, and why tests were skipped.

    Args:
        path: Path of a file that pytest wrote.

    Returns:
        `(row, reasons)`, where `reasons` counts the tests by reason. The row of
        a run that wrote no file has no numbers.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return (path.stem, None, None, None, None), collections.Counter()
    cases = list(ElementTree.parse(path).iter("testcase"))
    skips = [case.find("skipped") for case in cases]
    reasons = collections.Counter(
        _reason(skip) for skip in skips if skip is not None
    )
    failed = sum(
        case.find("failure") is not None or case.find("error") is not None
        for case in cases
    )
    skipped = reasons.total()
    (suite,) = ElementTree.parse(path).iter("testsuite")
    minutes = float(suite.get("time")) / 60
    passed = len(cases) - failed - skipped
    return (path.stem, passed, failed, skipped, minutes), reasons


def slowest(path, count=5):
    """Files of tests that took longest.

    Args:
        path: Path of a file that pytest wrote.
        count: int. How many at most.

    Returns:
        List of pairs of a file's name and seconds, the longest first. None for
        a run that wrote no file.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    seconds = collections.Counter()
    for case in ElementTree.parse(path).iter("testcase"):
        # A test in a class has the name of the class after the file's.
        names = case.get("classname", "").split(".")
        files = [name for name in names if name.startswith("test_")]
        seconds[files[0] if files else names[-1]] += float(case.get("time", 0))
    return seconds.most_common(count)


def _reason(skip):
    if skip.get("message") == "collection skipped":
        # A whole file: the text is a tuple `(path, line, reason)`.
        return ast.literal_eval(skip.text)[2].removeprefix("Skipped: ")
    return skip.get("message")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", help="what pytest wrote")
    parser.add_argument(
        "--optional",
        nargs="*",
        default=[],
        help="the same, of tests that may have been deselected",
    )
    args = parser.parse_args(argv)
    present = [path for path in args.optional if pathlib.Path(path).exists()]
    paths = [*args.paths, *present]
    rows, notes = [], []
    for path in paths:
        row, reasons = summarize(path)
        rows.append(row)
        notes += [
            f"{row[0]} skipped {count}: {reason}"
            for reason, count in reasons.items()
        ]
    for path in paths:
        files = [f"{name} {time:.0f} s" for name, time in slowest(path)]
        if files:
            notes.append(
                f"{pathlib.Path(path).stem} longest: {', '.join(files)}"
            )
    print(tabulate(rows, HEADERS, floatfmt=".1f", missingval="did not run"))
    print("", *notes, sep="\n")
    return int(any(row[2] != 0 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
