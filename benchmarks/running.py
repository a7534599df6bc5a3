"""Systems under test as processes, and what they are asked to agree on."""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys

from benchmarks import models
from benchmarks.systems import ON_EACH_BACKEND
from benchmarks.systems import SYSTEMS


@dataclasses.dataclass(frozen=True)
class Precision:
    """What is computed with, and how weights are stored."""

    dtype: str
    quantize: str

    def __str__(self):
        if self.quantize == "none":
            return self.dtype
        if self.dtype == "float32":
            return self.quantize
        return f"{self.quantize}+{self.dtype}"


EXACT = Precision("float32", "none")


class Worker:
    """A system under test, as a process of `benchmarks.worker`.

    Attributes:
        name: str. A system, a backend if it has several, and a precision unless
            that is float32: `"ours-jax int8"`.
        precision: A `Precision`.
        tie: float. How close logits are of which rounding picks one.
        backend: str. Whose products it has, `""` if its own.
        agrees: bool. Whether it is to generate what others do.
    """

    def __init__(self, system, backend, precision, preset):
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        if backend:
            environment["KERAS_BACKEND"] = backend
        self.precision = precision
        self.tie = SYSTEMS[system].tie
        otherwise = SYSTEMS[system].generates_otherwise
        self.agrees = models.model_type(preset) not in otherwise
        # transformers' products are those of PyTorch, too.
        in_torch = system.startswith("transformers")
        self.backend = "torch" if in_torch else backend
        self.name = "-".join(x for x in (system, backend) if x)
        if precision != EXACT:
            self.name += f" {precision}"
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.worker"),
                *(system, preset, precision.dtype, precision.quantize),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, method, **kwargs):
        request = json.dumps({"method": method, **kwargs})
        print(request, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} died; what it said is above.")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def planned(args, systems=SYSTEMS):
    """What is to run: systems, on each backend, in each precision.

    What a system cannot store is left out, and said.

    Returns:
        A list of functions that start a `Worker`.
    """
    precisions = [
        Precision(dtype, quantize)
        for dtype in args.dtype
        for quantize in args.quantize
    ]
    found = []
    for system in args.systems:
        if system not in systems:
            continue
        backends = args.backends if system in ON_EACH_BACKEND else [""]
        for precision in precisions:
            if precision.quantize not in SYSTEMS[system].quantizations:
                print(f"{system} has no {precision}", file=sys.stderr)
                continue
            found += [
                functools.partial(Worker, system, x, precision, args.preset)
                for x in backends
            ]
    if not found:
        raise SystemExit(
            f"Expected systems of {list(systems)} that can store "
            f"{[str(x) for x in precisions]}. Received: {args.systems}."
        )
    return found


@contextlib.contextmanager
def workers(args, systems=SYSTEMS):
    """All that is to run, by name, at once, to be measured in turns."""
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(x()) for x in planned(args, systems)]
        yield {worker.name: worker for worker in running}


def check_tokens(answers, running, prompt):
    """Ends the program unless all generated the same in float32, ties aside.

    Elsewhere, systems round in ways of their own, and may go on differently.
    How often is counted, and `perplexity` says what it costs.

    Args:
        answers: Dictionary from names of workers to what they answered.
        running: Dictionary from names to workers.
        prompt: Dictionary of lists with an element for each row.

    Returns:
        A dictionary: how many `ties` there were, and for each other precision
        and each system that is known to go on otherwise, in how many rows
        systems did so than the first of them.
    """
    ties, differing, references = 0, {}, {}
    for name, answer in answers.items():
        precision, agrees = running[name].precision, running[name].agrees
        if agrees and precision not in references:
            references[precision] = name
        reference = references.get(precision, name)
        if reference == name:
            continue
        expected = answers[reference]["tokens"]
        for row, (x, y) in enumerate(zip(expected, answer["tokens"])):
            if x == y:
                continue
            if precision == EXACT and agrees:
                start = {key: values[row] for key, values in prompt.items()}
                _check_tie(running, reference, name, row, start, x, y)
                ties += 1
            else:
                key = str(precision) if agrees else name
                differing[key] = differing.get(key, 0) + 1
    return {"ties": ties, "differing_rows": differing}


def _check_tie(running, reference, name, row, start, expected, actual):
    """Ends the program unless two continuations part where logits are equal."""
    at = next(i for i, x in enumerate(expected) if x != actual[i])
    gap = running[reference].ask(
        "logit_gap",
        prompt={name: [x] for name, x in start.items()},
        after=expected[:at],
        candidates=[expected[at], actual[at]],
    )["gap"]
    if gap > max(running[x].tie for x in (reference, name)):
        raise SystemExit(
            f"No result: {reference} and {name} differ in row {row}, "
            f"token {at}, where logits are {gap:.2g} apart."
        )
