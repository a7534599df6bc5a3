"""A recorded step does the same again, in the same memory."""

import importlib.util
import threading

import keras
import pytest

if keras.config.backend() != "torch":
    pytest.skip("records steps of PyTorch", allow_module_level=True)
if importlib.util.find_spec("numba") is None:
    pytest.skip("needs numba", allow_module_level=True)

import torch

from keras_nlp_cache.generate.loops import torch_replay
from keras_nlp_cache.generate.loops.torch_capture import capture
from keras_nlp_cache.generate.loops.torch_capture import multiplies
from keras_nlp_cache.generate.loops.torch_fusing import fuse
from keras_nlp_cache.generate.loops.torch_step_kernels import kernel_of
from keras_nlp_cache.kernels import torch_call
from keras_nlp_cache.kernels import torch_threads


def random(*shape):
    return torch.randn(*shape)


def check(function, *args, calls=None, monkeypatch=None):
    """What is recorded is right when arguments are written to.

    Args:
        function: Returns a tensor, and may write to its arguments.
        *args: Tensors.
        calls: Optional int. How often kernels are called in a replay.
        monkeypatch: The fixture, if `calls` is given.
    """
    module = capture(function, *args)
    fuse(module, kernel_of)
    copies = [x.clone() for x in args]
    replay, output = torch_replay.record(module, copies)
    expected = [x.clone() for x in args]
    torch.testing.assert_close(output, function(*expected))
    for x, y in zip(copies, expected):
        torch.testing.assert_close(x, y)
    runs, run = [], torch_call.run

    def counted(jobs):
        runs.append(len(jobs))
        run(jobs)

    for _ in range(2):
        for x, y in zip(copies, expected):
            if x.is_floating_point():
                y.copy_(torch.randn(x.shape))
                x.copy_(y)
        if calls is not None:
            monkeypatch.setattr(torch_call, "run", counted)
        assert replay() is output
        torch.testing.assert_close(output, function(*expected))
        for x, y in zip(copies, expected):
            torch.testing.assert_close(x, y)
    if calls is not None:
        assert len(runs) == 2 * calls


def test_operators_kernels_and_views(monkeypatch):
    def call(x, y):
        z = (x + y).reshape(4, 6) + y.reshape(4, 6)
        first, second = torch.split(torch.tanh(z), 3, dim=-1)
        return torch.cat([second + first, first + second], -1) + z

    # Of halves, which are copied, it takes a call for each sum.
    check(call, random(2, 12), random(2, 12), calls=4, monkeypatch=monkeypatch)


def test_kernels_that_follow_each_other_are_one_call(monkeypatch):
    def call(x, y, cache, index):
        z = (x + y).reshape(1, 1, 24) + y.reshape(1, 1, 24)
        cache.index_copy_(1, index, z)
        return cache + z.reshape(24)

    cache, index = torch.zeros(1, 5, 24), torch.tensor([3])
    x = random(2, 12)
    check(call, x, x + 1, cache, index, calls=1, monkeypatch=monkeypatch)


def test_what_is_not_contiguous():
    def call(x, y):
        turned = x.transpose(0, 1)
        return turned + y + torch.exp(turned + y)

    check(call, random(5, 3), random(3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("index", [0, 2, 4])
def test_a_cache_is_written_to(dtype, index, monkeypatch):
    cache = torch.zeros(2, 3, 5, 4, dtype=dtype)

    def call(cache, index, x):
        cache.index_copy_(2, index, x[:, :, :1].to(dtype))
        # And read after that.
        return cache.to(torch.float32).sum(2) + x[:, :, 0]

    index = torch.tensor([index])
    check(call, cache, index, random(2, 3, 1, 4) * 9)


def test_several_places_and_other_axes_are_written_to():
    def call(cache, index, x):
        cache.index_copy_(0, index, x)
        cache.index_copy_(1, index[:1], x[:1].transpose(0, 1)[:5])
        return cache + 1

    check(call, random(5, 5), torch.tensor([1, 3]), random(2, 5))


def test_places_that_are_none_are_left_alone():
    def call(cache, index, x):
        return cache.index_copy_(0, index, x) + x

    cache, index = torch.zeros(3, 2), torch.tensor([1])
    module = capture(call, cache, index, torch.ones(1, 2))
    replay, _ = torch_replay.record(module, [cache, index, torch.ones(1, 2)])
    cache.zero_()
    for place in (-1, 3, 2**40):
        index.fill_(place)
        replay()
        assert not cache.any()


def test_a_function_that_returns_no_tensor_is_refused():
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.numel, (graph.placeholder("x"),)))
    module = torch.fx.GraphModule({}, graph)
    with pytest.raises(TypeError, match="return tensors. Received: int"):
        torch_replay.record(module, [random(2)])


def test_products_of_pytorch_are_found():
    x, matrix = random(2, 3), random(3, 4)
    assert multiplies(capture(lambda x, y: x @ y, x, matrix))
    assert multiplies(capture(torch.nn.functional.linear, x, matrix.T))
    assert not multiplies(capture(lambda x: x + x, x))


@pytest.fixture
def several_threads():
    if torch_threads._set_count() is None:
        pytest.skip("PyTorch has no threads of OpenMP here")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_threads_of_pytorch(several_threads):
    counts = []

    def count():
        counts.append((torch.get_num_threads(), torch_threads.thread_count()))

    with torch_threads.one_thread():
        count()
        # Another thread has all of them.
        thread = threading.Thread(target=count)
        thread.start()
        thread.join()
        with torch_threads.all_threads():
            count()
        count()
    count()
    assert counts == [(1, 3), (3, 3), (3, 3), (1, 3), (3, 3)]
    with pytest.raises(RuntimeError):
        with torch_threads.one_thread():
            raise RuntimeError
    with torch_threads.all_threads():
        assert torch.get_num_threads() == 3
    assert torch_threads.thread_count() == torch.get_num_threads() == 3
