"""What the first call of a process costs: traces, compilations, a folder."""

import contextvars
import gc
import os
import subprocess
import sys
import textwrap
import threading

import keras
import numpy as np
import pytest

from keras_nlp_cache import compile_cache
from keras_nlp_cache import device
from keras_nlp_cache import memory
from keras_nlp_cache.attention.blockwise import block_size
from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.generate.loops import generation
from keras_nlp_cache.generate.loops.alike import describe
from keras_nlp_cache.generate.loops.meanwhile import meanwhile
from keras_nlp_cache.generate.loops.meanwhile import proceed
from keras_nlp_cache.models import Llama3Backbone
from keras_nlp_cache.models import Llama3CausalLM

BACKEND = keras.config.backend()
MODEL = """
from keras_nlp_cache.command_line import few_imports
with few_imports.importing():
    import keras
    import numpy as np
    from keras_nlp_cache.models import Llama3Backbone, Llama3CausalLM

lm = Llama3CausalLM(
    Llama3Backbone(
        vocabulary_size=32,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
    ),
    preprocessor=None,
)
lm.compile(sampler="greedy")
"""
GENERATE = """
prompt = {"token_ids": np.array([[3, 4, 0, 0]])}
prompt["padding_mask"] = prompt["token_ids"] > 0
lm.generate(prompt, stop_token_ids=None)
"""


def model(layers):
    backbone = Llama3Backbone(
        vocabulary_size=32,
        num_layers=layers,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
        dropout=0.1,
    )
    return Llama3CausalLM(backbone, preprocessor=None)


def traced(lm, monkeypatch):
    """How often attention was traced for a call."""
    count = 0
    attend = CachedAttention.attend_through

    def attend_through(self, *args):
        nonlocal count
        count += 1
        return attend(self, *args)

    lm.compile(sampler="greedy")
    prompt = {"token_ids": [[3, 4, 0, 0]], "padding_mask": [[1, 1, 0, 0]]}
    prompt = {k: keras.ops.convert_to_numpy(v) for k, v in prompt.items()}
    with monkeypatch.context() as patch:
        patch.setattr(CachedAttention, "attend_through", attend_through)
        lm.generate(prompt, stop_token_ids=None)
    return count


@pytest.mark.skipif(
    BACKEND == "torch", reason="prompts are not traced, and steps elsewhere"
)
def test_blocks_that_are_alike_are_traced_once(monkeypatch):
    lm = model(4)
    counted = traced(lm, monkeypatch)
    assert counted == traced(model(1), monkeypatch)
    blocks = lm.backbone.transformer_layers
    blocks[1]._self_attention_layer._inv_norm_factor = 0.5
    lm = Llama3CausalLM(lm.backbone, preprocessor=None)
    assert traced(lm, monkeypatch) == 2 * counted


def test_blocks_are_alike_if_all_they_hold_is():
    blocks = model(2).backbone.transformer_layers
    variables, description = describe(blocks[0])
    others, told = describe(blocks[1])
    assert description == told
    assert {x.path for x in variables} >= {x.path for x in blocks[0].variables}
    assert [x.shape for x in variables] == [x.shape for x in others]
    for layer, name, value in (
        (blocks[1], "layer_norm_epsilon", 0.1),
        (blocks[1]._feedforward_layernorm, "epsilon", 0.1),
        (blocks[1]._self_attention_layer, "call", lambda x: x),
        (blocks[1], "activation", keras.activations.relu),
        (blocks[1]._feedforward_gate_dense, "lora_alpha", 2),
    ):
        before = getattr(layer, name)
        setattr(layer, name, value)
        assert describe(blocks[1])[1] != description, name
        setattr(layer, name, before)

    class Mine(keras.layers.Dense):
        def call(self, x):
            return super().call(x) * float(self.name[-1])

    for block in blocks:
        block._feedforward_gate_dense.__class__ = Mine
    assert describe(blocks[0])[1] != describe(blocks[1])[1]


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch compiles nothing")
@pytest.mark.parametrize("sampler", ["greedy", "top_k"])
def test_steps_are_prepared_in_another_thread_and_only_there(
    sampler, monkeypatch
):
    lm, threads = model(2), []
    step = generation.decode_step

    def decode_step(*args):
        threads.append(threading.current_thread())
        return step(*args)

    monkeypatch.setattr(generation, "decode_step", decode_step)
    lm.compile(sampler=sampler)
    prompt = {"token_ids": np.array([[3, 4, 5, 0, 0]])}
    prompt["padding_mask"] = prompt["token_ids"] > 0
    for _ in range(2):
        lm.generate(prompt, stop_token_ids=None)
    # Keras looks at what a loop's body returns, and then traces it.
    assert 0 < len(threads) <= 2
    assert threading.current_thread() not in threads
    assert lm.generation_loop.compilations == 2


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch compiles nothing")
def test_what_fails_while_it_is_prepared_is_raised(monkeypatch):
    def decode_step(*args):
        raise ArithmeticError("in a step")

    monkeypatch.setattr(generation, "decode_step", decode_step)
    lm = model(1)
    lm.compile(sampler="greedy")
    prompt = {"token_ids": np.array([[3, 4, 0]])}
    prompt["padding_mask"] = prompt["token_ids"] > 0
    with pytest.raises(ArithmeticError, match="in a step"):
        lm.generate(prompt, stop_token_ids=None)


def test_meanwhile_ends_with_its_scope_and_tells_what_went_wrong():
    variable = contextvars.ContextVar("variable", default="outside")
    variable.set("inside")
    seen = []
    with meanwhile(lambda: seen.append(variable.get())):
        pass
    assert seen == ["inside"]
    with meanwhile(lambda: seen.append("called"), waits=True):
        seen.append("before")
        proceed()
    with meanwhile(lambda: seen.append("called"), waits=True):
        seen.append("at the end")
    assert seen == ["inside", "before", "called", "at the end", "called"]
    with pytest.raises(ZeroDivisionError), meanwhile(lambda: 1 / 0):
        pass
    with pytest.raises(KeyError), meanwhile(lambda: 1 / 0):
        raise KeyError("the scope's own")


@pytest.mark.skipif(BACKEND != "jax", reason="JAX says what it compiles")
def test_a_second_process_compiles_nothing(tmp_path):
    program = textwrap.dedent(MODEL) + textwrap.dedent("""
        import collections
        import jax
        events = collections.Counter()
        jax.monitoring.register_event_listener(
            lambda name, **kwargs: events.update([name])
        )
    """)
    program += GENERATE + textwrap.dedent("""
        names = ("cache_misses", "cache_hits")
        print(*(events["/jax/compilation_cache/" + x] for x in names))
        """)
    environment = {
        **os.environ,
        "KERAS_NLP_CACHE_HOME": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    # As the suite sets it.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    seen = []
    for _ in range(2):
        output = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        seen.append(tuple(map(int, output.split()[-2:])))
    (misses, _), second = seen
    assert misses > 0
    assert second == (0, misses)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="names are TensorFlow's")
def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    program = """
import keras_nlp_cache.compile_cache
keras_nlp_cache.compile_cache.for_programs()
"""
    environment = {**os.environ, "KERAS_NLP_CACHE_HOME": str(tmp_path)}
    environment.pop("TF_XLA_FLAGS", None)
    found = []
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-c", program + MODEL + GENERATE],
            env=environment,
            capture_output=True,
            check=True,
        )
        found.append({x.name for x in tmp_path.rglob("xla_compile_cache*")})
    assert found[0] == found[1] != set()


def test_nothing_is_collected_while_the_first_call_is_traced(monkeypatch):
    enabled = []
    step = generation.decode_step

    def decode_step(*args):
        enabled.append(gc.isenabled())
        return step(*args)

    monkeypatch.setattr(generation, "decode_step", decode_step)
    if BACKEND == "torch":
        from keras_nlp_cache.generate.loops import torch_loop

        monkeypatch.setattr(torch_loop, "decode_step", decode_step)
    lm = model(1)
    lm.compile(sampler="greedy")
    prompt = {"token_ids": np.array([[3, 4, 0, 0]])}
    prompt["padding_mask"] = prompt["token_ids"] > 0
    lm.generate(prompt, stop_token_ids=None)
    assert enabled and not any(enabled)
    assert gc.isenabled()


def test_memory_of_zeros_is_not_copied(monkeypatch):
    made = []
    own = memory.aligned

    def aligned(*args):
        made.append(own(*args))
        return made[-1]

    monkeypatch.setattr(memory, "aligned", aligned)
    x = keras.ops.convert_to_tensor(
        memory.untouched_zeros((512, 512), "float32")
    )
    assert x.shape == (512, 512) and not keras.ops.any(x)
    # Who writes into the one sees it in the other.
    made[0][1, 2] = 5
    assert keras.ops.convert_to_numpy(x)[1, 2] == 5


@pytest.mark.skipif(BACKEND != "jax", reason="the folder is JAX's")
def test_a_folder_of_a_user_is_left_as_it_is(monkeypatch, tmp_path):
    import jax

    monkeypatch.setenv("KERAS_NLP_CACHE_HOME", str(tmp_path))
    names = [
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    try:
        jax.config.update(names[0], str(tmp_path / "mine"))
        compile_cache.for_jax()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
        jax.config.update(names[0], None)
        with monkeypatch.context() as patch:
            patch.setenv("KERAS_NLP_CACHE_COMPILED", "0")
            compile_cache.for_jax()
        assert jax.config.jax_compilation_cache_dir is None
        compile_cache.for_jax()
        assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_flags_of_a_user_are_left_as_they_are(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_NLP_CACHE_HOME", str(tmp_path))
    flag = "--tf_xla_persistent_cache_directory"
    monkeypatch.setenv("TF_XLA_FLAGS", f"{flag}=mine")
    compile_cache.for_programs()
    assert os.environ["TF_XLA_FLAGS"] == f"{flag}=mine"
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_clustering_debug")
    with monkeypatch.context() as patch:
        patch.setenv("KERAS_NLP_CACHE_COMPILED", "0")
        compile_cache.for_programs()
    assert os.environ["TF_XLA_FLAGS"] == "--tf_xla_clustering_debug"
    monkeypatch.setattr(compile_cache, "MOST_BYTES", 150)
    folder = tmp_path / "compiled" / "tensorflow" / "older"
    folder.mkdir(parents=True)
    for name, hours in (("old", 50), ("older", 60), ("new", 0)):
        (folder / name).write_bytes(b"x" * 100)
        status = (folder / name).stat().st_mtime - 3600 * hours
        os.utime(folder / name, (status, status))
    compile_cache.for_programs()
    first, second = os.environ["TF_XLA_FLAGS"].split()
    assert first == "--tf_xla_clustering_debug"
    assert second.startswith(f"{flag}={tmp_path}")
    assert [x.name for x in folder.iterdir()] == ["new"]


def test_constants_can_be_set():
    assert device.constants() == device.TABLE[device.kind()]
    try:
        device.set_constants(small_block=64, most_blocks=8)
        assert block_size(256, 1) == 64
    finally:
        device.set_constants()
    assert block_size(256, 1) == device.constants().small_block
    for values in ({"chunk": 2}, {"small_block": 0}, {"small_block": True}):
        with pytest.raises(ValueError, match="Expected"):
            device.set_constants(**values)
