"""One system under test, in a process of its own.

Loads a model, then answers every line of JSON on standard input with one on
standard output. A request names a method of `System` and its arguments.
"""

import argparse
import json
import sys

import psutil

from benchmarks.systems import SYSTEMS


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("preset")
    parser.add_argument("dtype")
    parser.add_argument("quantize")
    args = parser.parse_args()

    results = sys.stdout
    sys.stdout = sys.stderr  # Whatever libraries print is no result.
    system = SYSTEMS[args.system](args.preset, args.dtype, args.quantize)
    system.loaded_mib = psutil.Process().memory_info().rss / 2**20
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(system, request.pop("method"))(**request)
        print(json.dumps(answer), file=results, flush=True)


if __name__ == "__main__":
    main()
