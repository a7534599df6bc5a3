"""A batch job on a Ray cluster gives the answers that it gives without."""

import json
import os
import pathlib
import signal
import sys

import keras
import pytest

from keras_nlp_cache.command_line import cli
from tests.families import FAMILIES
from tests.families import on_one_backend

pytestmark = on_one_backend("what Ray does is tried")

WORDS = "the quick brown fox jumps over the lazy dog".split()
# Of all lengths, so that many a batch has several.
PROMPTS = [
    " ".join(WORDS[: i % len(WORDS) + 1]) + "!" * (i // len(WORDS))
    for i in range(24)
]


@pytest.fixture
def cluster():
    """The address of a cluster of two machines with a CPU each."""
    reason = "Ray is not installed, see the extra `ray`"
    ray = pytest.importorskip("ray", reason=reason)
    from ray.cluster_utils import Cluster

    # A worker has the package and not its tests: `load_dying()` goes to it
    # with its code.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    machine = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**machine, "include_dashboard": False},
    )
    cluster.add_node(**machine)
    yield cluster.address
    cluster.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Dying:
    """A model whose process is killed, once, when it has answered something.

    Args:
        lm: A `CausalLM`.
        folder: Path. What happens is noted there.
    """

    def __init__(self, lm, folder):
        self.lm, self.folder = lm, folder

    def __getattr__(self, name):
        return getattr(self.lm, name)

    def generate_many(self, prompts, **options):
        (self.folder / f"worker {os.getpid()}").touch()
        answers = self.lm.generate_many(prompts, **options)
        yield next(answers)
        try:
            (self.folder / "death").touch(exist_ok=False)
        except FileExistsError:
            yield from answers
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def load_dying(args):
    """What a worker calls to load the model."""
    assert keras.config.backend() == "torch"
    return Dying(cli._compiled(args), pathlib.Path(args.output).parent)


def test_answers_are_those_of_one_process(cluster, tmp_path, monkeypatch):
    FAMILIES[0].text_lm().save_to_preset(tmp_path / "preset")
    input, alone, output = (tmp_path / x for x in ("in", "alone", "out"))
    input.write_text("\n".join(json.dumps({"prompt": x}) for x in PROMPTS))
    monkeypatch.chdir(tmp_path)
    command = ["generate", "--preset", "preset"]
    command += ["--max-new-tokens", "5", "--batch-size", "2"]
    command += ["--input", str(input), "--output"]
    assert cli.main([*command, str(alone)]) == 0
    # Begun by one process, and gone on with by others.
    expected = alone.read_text().splitlines(keepends=True)
    assert len(set(expected)) == len(PROMPTS)
    output.write_text("".join(expected[:3]))
    (tmp_path / "alone.job").rename(tmp_path / "out.job")
    monkeypatch.setattr(cli, "_compiled", load_dying)
    command += [str(output), "--ray", cluster, "--workers", "2"]
    assert cli.main(command) == 0
    answers = output.read_text().splitlines(keepends=True)
    assert answers[:3] == expected[:3] and sorted(answers) == sorted(expected)
    # Two, and one in place of the one that died.
    assert (tmp_path / "death").exists()
    assert len(list(tmp_path.glob("worker *"))) == 3
