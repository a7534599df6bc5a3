"""Generation over several devices: the same tokens, a share of the cache."""

import json
import socket
import subprocess
import sys
import time

import keras
import pytest

from tests.families import DEEP
from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import random_tokens

if keras.config.backend() != "jax":
    pytest.skip("`keras.distribution` is JAX's", allow_module_level=True)


def test_tokens_and_shares():
    cases = [f"data:{family.name}" for family in DEEP] + [
        f"model:{family.name}"
        for family in DEEP
        if hasattr(family.ours("Backbone"), "get_layout_map")
    ]
    assert len(cases) > len(DEEP)
    cases.append("model:gemma2:int8")
    # How many devices there are is settled when JAX starts.
    process = subprocess.run(
        [sys.executable, "-m", "tests.distributed", *cases],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]


# Processes are the rows of a mesh, or there is one row over both.
PROCESSES = {
    "llama": dict(
        mesh=(1, 8),
        num_layers=1,
        num_query_heads=8,
        num_key_value_heads=8,
        vocabulary_size=96,
    ),
    "gemma2": dict(mesh=(2, 4), num_query_heads=8, num_key_value_heads=4),
}
LENGTHS, MAX_LENGTH = [5, 9], 12


def test_two_processes(tmp_path):
    cases, expected = [], []
    for family in FAMILIES:
        if family.name in PROCESSES:
            case, answers = _single_process(family, tmp_path)
            cases.append(case)
            expected.append(answers)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    _run_two(tmp_path)
    processes = [
        json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1)
    ]
    for case, answers, *found in zip(cases, expected, *processes):
        for one in found:
            assert {name: one[name] for name in answers} == answers
            assert "every process to generate from the same" in one["refused"]
        assert found[0]["seed"] == found[1]["seed"]
        _check_parts(case, *found)


def _single_process(family, folder):
    """Saves a model, and what it generates on one device."""
    arguments = dict(PROCESSES[family.name])
    mesh = arguments.pop("mesh")
    lm = family.task(family.backbone(**arguments))
    lm.compile(sampler="greedy")
    lm.save_to_preset(folder / family.prefix)
    mask = padding_mask(LENGTHS, MAX_LENGTH)
    token_ids = random_tokens(len(LENGTHS), MAX_LENGTH) % 90 + 1
    many = random_tokens(3, 9, seed=1) % 90 + 1
    many = [row[: 9 - i].tolist() for i, row in enumerate(many)]
    texts = lm.generate(
        {"token_ids": token_ids * mask, "padding_mask": mask},
        stop_token_ids=None,
    )
    answers = lm.generate_many(
        many,
        max_length=MAX_LENGTH,
        batch_size=len(LENGTHS),
        stop_token_ids=None,
    )
    case = {
        "prefix": family.prefix,
        "mesh": mesh,
        "prompts": [
            row[:length].tolist() for row, length in zip(token_ids, LENGTHS)
        ],
        "many": many,
        "max_length": MAX_LENGTH,
    }
    return case, {
        "texts": texts["token_ids"].tolist(),
        "many": [text.tolist() for _, text in sorted(answers)],
    }


def _run_two(folder, most_seconds=240):
    """Runs two processes to their end, or to that of one that fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    logs = [folder / f"{i}.txt" for i in (0, 1)]
    processes = []
    for i, log in enumerate(logs):
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        *("-m", "tests.distributed_process"),
                        *(address, str(i), str(folder)),
                    ],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        end = time.monotonic() + most_seconds
        # If one fails, the other waits for it.
        while time.monotonic() < end and not any(x.poll() for x in processes):
            if all(x.poll() == 0 for x in processes):
                return
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [log.read_text()[-3000:] for log in logs]
    raise AssertionError(
        "Expected two processes to end. They returned "
        f"{[x.returncode for x in processes]} within {most_seconds} s, and "
        "said:\n" + "\n=====\n".join(said)
    )


def _check_parts(case, *found):
    """Each device of each process holds its share, and no more."""
    rows, columns = case["mesh"]

    def check(arrays, count):
        for (size, *parts), (_, *others) in zip(*arrays, strict=True):
            parts = [*parts[0], *others[0]]
            assert len(parts) == 8
            assert {x for _, x in parts} == {size // count}
            assert len({tuple(begin) for begin, _ in parts}) == count

    weights = [x["weights"] for x in found]
    matrices = [x for x, y in weights[0].items() if len(y[1][0][0]) > 1]
    assert len(matrices) > 8
    check([[x[name] for name in matrices] for x in weights], rows * columns)
    for name, count in {
        "read": rows * columns,
        "decoded": rows * columns,
        # A single row is on the devices of each row of the mesh.
        "row": columns,
    }.items():
        check([x[name] for x in found], count)
