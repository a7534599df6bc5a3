"""A batch job on a Ray cluster: one model per worker, one file of answers."""

import contextlib
import errno
import json
import logging
import os
import re
import socket
import traceback

import keras

from keras_nlp_cache.batch_job import answering
from keras_nlp_cache.batch_job.job import open_job
from keras_nlp_cache.batch_job.job import settings

# Batches that a worker is given at a time. What it was given and has not
# returned is lost with it; at the end of each it waits for the longest answer.
_BATCHES = 4


def run_on_ray(
    load,
    input,
    output,
    *,
    address="local",
    workers=None,
    max_new_tokens=256,
    batch_size=16,
    stop_token_ids="auto",
    strip_prompt=True,
    chat_prompt=None,
    overwrite=False,
    progress=None,
    **options,
):
    """Does what `run()` does, with several copies of a model, on Ray Data.

    Each worker is an actor that loads the model once, and is given some
    batches of prompts at a time. One that dies is started again by Ray, and
    what it had is answered again. All answers go to one file on this machine,
    and a job may be begun with `run()` and gone on with here, or the other way
    round. Needs `pip install 'keras-nlp-cache[ray]'`, on all machines.

    Args:
        load: Function without arguments that returns the `CausalLM`, compiled
            as it is to generate. It is pickled, and called by each worker.
        input: As for `run()`, on this machine.
        output: As for `run()`, on this machine.
        address: str. Address of a cluster, as for `ray.init()`, or `"local"`
            to start one on this machine. Where Ray is initialized already,
            that cluster is used.
        workers: Optional int. How many. By default, one for each GPU of the
            cluster, or without any, one for each machine. Where there are
            GPUs for all, each worker has one.
        max_new_tokens: As for `run()`.
        batch_size: As for `run()`.
        stop_token_ids: As for `run()`.
        strip_prompt: As for `run()`.
        chat_prompt: As for `run()`. Called on this machine.
        overwrite: As for `run()`.
        progress: As for `run()`.
        **options: As for `run()`.

    Returns:
        A `Summary`.

    Raises:
        ImportError: If Ray is not installed.
        ConnectionError: If there is no cluster at `address`, or it fails.
        ValueError: If the cluster has no room for the workers, and for
            `run()`'s reasons.
        OSError: As for `run()`.
    """
    try:
        import ray
        import ray.data
    except ImportError as e:
        raise ImportError(
            "Expected Ray to be installed, to generate on a cluster. Run "
            "`pip install 'keras-nlp-cache[ray]'`."
        ) from e
    options = settings(max_new_tokens, stop_token_ids, strip_prompt, options)
    with open_job(input, output, chat_prompt, options, overwrite) as job:
        asked = list(job.unfinished())
        if asked:
            with _cluster(ray, address):
                _quiet(ray)
                workers, remote = _workers(ray, workers)
                per_block = min(
                    _BATCHES * batch_size, max(1, len(asked) // workers)
                )
                data = ray.data.from_items(
                    [
                        {"i": i, "asked": json.dumps(x.asked)}
                        for i, x in enumerate(asked)
                    ],
                    override_num_blocks=-(-len(asked) // per_block),
                )
                data = data.map_batches(
                    _Worker,
                    fn_constructor_args=(load,),
                    fn_kwargs={"batch_size": batch_size, **options},
                    batch_size=None,
                    compute=ray.data.ActorPoolStrategy(size=workers),
                    **remote,
                )
                job.write_all(_answered(ray, data, asked), progress)
    return job.summary()


class _Worker:
    """One model, in a process of its own.

    What it raises it returns: what Ray would make of it says little of it, and
    of a worker that cannot be made it would make another.
    """

    def __init__(self, load):
        self._load, self._lm = load, None

    def __call__(self, batch, **options):
        try:
            return self._answer(batch, **options)
        except Exception as e:
            e.add_note(f"On a worker:\n{traceback.format_exc()}")
            return {
                "i": [-1],
                "answer": [""],
                "model": [""],
                "raised": [_dump(e)],
            }

    def _answer(self, batch, **options):
        if self._lm is None:
            lm = self._load()
            self._model = json.dumps(answering.identity(lm))
            self._lm = lm
        answers = list(
            answering.answer_each(
                self._lm, map(json.loads, batch["asked"]), **options
            )
        )
        return {
            "i": [batch["i"][i] for i, _ in answers],
            "answer": [json.dumps(answer) for _, answer in answers],
            "model": [self._model] * len(answers),
            "raised": [b""] * len(answers),
        }


def _dump(e):
    """Pickles what was raised, or what it says if it cannot be pickled."""
    from ray import cloudpickle

    try:
        dumped = cloudpickle.dumps(e)
        cloudpickle.loads(dumped)
        return dumped
    except Exception:
        return cloudpickle.dumps(RuntimeError(f"{type(e).__name__}: {e}"))


def _answered(ray, data, asked):
    """Yields `(prompt, answer, model)` as workers return them."""
    # Ray may have a block answered twice if a machine is lost.
    done = set()
    try:
        # A block that is there is not to wait for the next.
        for block in data.iter_batches(batch_size=None, prefetch_batches=0):
            for i, answer, model, raised in zip(
                *(block[name] for name in ("i", "answer", "model", "raised"))
            ):
                if raised:
                    raise ray.cloudpickle.loads(raised)
                if i not in done:
                    done.add(i)
                    yield asked[i], json.loads(answer), json.loads(model)
    except ray.exceptions.RayError as e:
        (first, *_) = str(e).splitlines() or [type(e).__name__]
        raise ConnectionError(errno.ECONNABORTED, f"Ray: {first}") from e


@contextlib.contextmanager
def _cluster(ray, address):
    """Connects to a cluster, unless that was done before."""
    if ray.is_initialized():
        yield
        return
    if address == "local":
        # Nobody is asked whether Ray may send home what is used of it.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    elif place := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):
        # Ray would wait for minutes for a cluster that is not there.
        try:
            socket.create_connection(place.groups(), timeout=10).close()
        except OSError as e:
            raise ConnectionError(
                errno.ECONNREFUSED,
                f"expected a Ray cluster at {address}, received: {e}",
            ) from e
    ray.init(address=address, log_to_driver=False, logging_level="WARNING")
    try:
        yield
    finally:
        ray.shutdown()


def _workers(ray, workers):
    """How many workers there are to be, and what each of them needs."""
    resources = ray.cluster_resources()
    cpus, gpus = (int(resources.get(name, 0)) for name in ("CPU", "GPU"))
    if workers is None:
        workers = gpus or len([x for x in ray.nodes() if x["Alive"]])
    if workers > cpus:
        raise ValueError(
            "Expected a CPU of the cluster for each worker. Received: "
            f"{workers} workers, and a cluster with {cpus} CPUs. Ask for "
            "fewer workers, or add machines to the cluster."
        )
    remote = {
        "num_cpus": 1,
        "runtime_env": {"env_vars": {"KERAS_BACKEND": keras.config.backend()}},
    }
    if gpus >= workers:
        remote["num_gpus"] = 1
    return workers, remote


def _quiet(ray):
    """Has Ray Data report nothing but what is wrong. We show our own bar."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    for name in ("", "._internal.progress"):
        logging.getLogger(f"ray.data{name}").setLevel(
            logging.ERROR if name else logging.WARNING
        )
