"""Builds the series of patches: for reviewers, for editing, from edits.

python patches/build.py --format-patch OUT
python patches/build.py --work DIR [--project keras-hub]
python patches/build.py --store DIR --project keras-hub
python patches/build.py --check
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

from series import DoesNotApply
from series import export
from series import SERIES


def main(argv=None):
    """Parses arguments and does what they ask; returns an exit status."""
    parser = argparse.ArgumentParser(
        description="Builds the series of patches for upstream."
    )
    parser.add_argument(
        "--project",
        choices=sorted(SERIES),
        action="append",
        help="which series; all of them by default",
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--format-patch",
        metavar="OUT",
        type=pathlib.Path,
        help="write the series with context, as `git am` takes it",
    )
    action.add_argument(
        "--work",
        metavar="DIR",
        type=pathlib.Path,
        help="make a repository per project, with a commit per patch",
    )
    action.add_argument(
        "--store",
        metavar="DIR",
        type=pathlib.Path,
        help="keep the commits of such a repository as the series",
    )
    action.add_argument(
        "--generate",
        metavar="DIR",
        type=pathlib.Path,
        help="write what is generated from the package into such a repository",
    )
    action.add_argument(
        "--check",
        action="store_true",
        help="fail if a patch holds another module than the package",
    )
    args = parser.parse_args(argv)
    chosen = [SERIES[x] for x in args.project or sorted(SERIES)]
    if (args.store or args.generate) and len(chosen) != 1:
        parser.error("expected one --project with --store or --generate")
    try:
        return _act(args, chosen)
    except DoesNotApply as e:
        print(e, file=sys.stderr)
    except subprocess.CalledProcessError as e:
        print(f"{' '.join(e.cmd)}\n{e.stderr}", file=sys.stderr)
    return 1


def _act(args, chosen):
    for series in chosen:
        if args.check:
            if stale := series.stale():
                print(
                    f"{series.project}: stale: {', '.join(stale)}. Write them "
                    "anew with --work, --generate, `git rebase` and --store.",
                    file=sys.stderr,
                )
                return 1
        elif args.store:
            series.store(args.store)
            print(f"{len(series.patches)} patches in {series.folder}")
        elif args.generate:
            for path, text in series.generated.items():
                file = args.generate / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
                print(file)
        elif args.work:
            print(series.tree(args.work / series.project))
        else:
            out = args.format_patch / series.project
            with tempfile.TemporaryDirectory() as folder:
                tree = series.tree(pathlib.Path(folder) / "tree")
                export(tree, out)
            print(f"{len(list(out.glob('*.patch')))} patches in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
