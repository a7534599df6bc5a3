"""With `jax_enable_x64`, Python's integers are wider than ours."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

if keras.config.backend() != "jax":
    pytest.skip("an option of JAX", allow_module_level=True)


def test_all_ways_to_generate():
    """In a process of its own, for the option holds for all of it."""
    subprocess.run(
        [sys.executable, "-m", "tests.test_wide_integers"],
        check=True,
        env={**os.environ, "JAX_ENABLE_X64": "1"},
    )


def main():
    import tempfile

    import jax

    from tests.families import FAMILIES
    from tests.families import random_tokens
    from tests.families import to_numpy

    assert jax.config.jax_enable_x64
    for family, modes in (
        (FAMILIES[0], [False]),
        (FAMILIES[3], [True, False]),
    ):
        lm = family.text_lm()
        # Compiled, both are traced. Operation by operation, one says it.
        for run_eagerly in modes:
            lm.compile(sampler="greedy", run_eagerly=run_eagerly)
            session = lm.start_session()
            answer = session.send("the fox", 4, None)
            expected = lm.generate("the fox", stop_token_ids=None)
            assert expected.startswith("the fox" + answer)
            length = len(session.token_ids)
            pieces = lm.stream("the fox", 4, None)
            assert answer == "".join(pieces)
        drafted = lm.generate(
            "the fox", stop_token_ids=None, assistant_model=lm
        )
        assert drafted == expected
        other = session.fork()
        with tempfile.TemporaryDirectory() as folder:
            session.save(f"{folder}/talk.safetensors")
            loaded = lm.start_session(f"{folder}/talk.safetensors")
        answers = {x.send("a", 4, None) for x in (session, other, loaded)}
        assert len(answers) == 1 and len(session.token_ids) > length + 4
        lm.compile(sampler="top_k")
        lm.generate("the fox")
    # A cache that is read in blocks.
    lm.compile(sampler="greedy")
    prompt = random_tokens(1, 5) % 16
    loop = lm.generation_loop
    short, long = (
        loop.decode(loop.prefill(prompt, np.ones_like(prompt), slots), 9)
        for slots in (32, 1024)
    )
    np.testing.assert_array_equal(
        to_numpy(short.token_ids)[:, :9], to_numpy(long.token_ids)[:, :9]
    )


if __name__ == "__main__":
    main()
