"""Models in use for long: threads, processes, memory, interrupts, changes, graphs, forward passes at odd times.

The numbers in the names are those of issue 15.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from networks import with_statistics
from surgery_models import BLOCKS, CHANNELS
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import effnet_ops
from effnet_ops import layers, optimize_for_inference, replace_layers, restore_layers
from effnet_ops.models import ArchitectureSpec, ScaledSpec, StageSpec

STAGES = (StageSpec(1, 3, 1, 1, 8), StageSpec(2, 5, 2, 4, 16), StageSpec(1, 3, 2, 6, 24))
SPEC = ScaledSpec(ArchitectureSpec(STAGES, stem_channels=8, head_channels=32))


def own() -> nn.Module:
    return with_statistics(effnet_ops.create_model(SPEC, num_classes=5, drop_rate=0.0, drop_path_rate=0.0), 32)


def replaced() -> nn.Module:
    model = with_statistics(timm.create_model("test_efficientnet", num_classes=5), 32)
    assert replace_layers(model).replaced
    return model


def optimized() -> nn.Module:
    return optimize_for_inference(own())


MODELS: dict[str, Callable[[], nn.Module]] = {"own": own, "replaced": replaced, "optimized": optimized}
TRAINABLE = ("own", "replaced")
BLOCK_MODULES: dict[str, Callable[[], nn.Module]] = {
    "MBConv": lambda: layers.MBConv(CHANNELS, CHANNELS).double().eval(),
    **{name: BLOCKS[name] for name in ("timm", "torchvision", "efficientnet_pytorch", "geffnet")},
}


def block(name: str) -> nn.Module:
    module = BLOCK_MODULES[name]()
    replace_layers(module)
    return module


def images(size: int = 32, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(batch, 3, size, size + 3, generator=generator).contiguous(memory_format=torch.channels_last)


# Graphs


@pytest.mark.parametrize("name", BLOCK_MODULES)
def test_item_28_gradient_of_an_evaluation_after_a_training_step(name: str) -> None:
    """It is that of what was evaluated: also where PyTorch's BatchNorm takes the statistics that came later."""
    module = block(name)
    x = torch.randn(2, CHANNELS, 6, 5, dtype=torch.float64, requires_grad=True)
    wanted = [x, *module.parameters()]
    expected = torch.autograd.grad(module.eval()(x).square().sum(), wanted)
    y = module(x)
    module.train()(x.detach() + 1)
    for found, value in zip(torch.autograd.grad(y.square().sum(), wanted), expected, strict=True):
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("name", TRAINABLE)
def test_item_28_networks(name: str) -> None:
    model = MODELS[name]()
    y = model(images())
    model.train()(images())
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("graph", [True, False], ids=["with a graph", "plain"])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", TRAINABLE)
def test_item_29_fast_weights_are_freed(name: str, gradients: bool, graph: bool) -> None:
    model = MODELS[name]()
    with torch.set_grad_enabled(gradients):
        model(images())
    fast = {key: p * 2 if graph else p.detach() * 2 for key, p in model.named_parameters()}
    references = [weakref.ref(p) for p in fast.values()]
    with torch.set_grad_enabled(gradients):
        for _ in range(2):
            functional_call(model, fast, (images(),))
    fast.clear()
    assert sum(reference() is not None for reference in references) == 0


def test_item_29_pruned_weights_are_freed() -> None:
    """Each call makes another one, as an attribute of the module, with a graph."""
    module = block("timm")
    prune.l1_unstructured(module.conv_dw, "weight", 0.5)
    pruned = weakref.ref(module.conv_dw.weight)
    assert pruned().grad_fn is not None
    module(torch.randn(2, CHANNELS, 6, 5, dtype=torch.float64))
    assert pruned() is None


@pytest.mark.parametrize("name", TRAINABLE)
def test_model_is_freed_without_the_garbage_collector(name: str) -> None:
    model = MODELS[name]()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            model(images())
    gc.collect()
    gc.disable()
    try:
        references = [weakref.ref(p) for p in model.parameters()]
        del model
        assert not any(reference() is not None for reference in references)
    finally:
        gc.enable()


# Forward passes inside a backward pass


def counts(module: nn.Module) -> set[int]:
    return {int(buffer) for key, buffer in module.named_buffers() if key.endswith("num_batches_tracked")}


def hooked(module: nn.Module, x: Tensor) -> None:
    leaf = torch.ones(3, requires_grad=True)
    y = leaf * 2

    def hook(grad: Tensor) -> None:
        module(x)

    y.register_hook(hook)
    y.sum().backward()


def module_hook(module: nn.Module, x: Tensor) -> None:
    outer = nn.Linear(3, 3)

    def hook(*_: object) -> None:
        module(x)

    outer.register_full_backward_hook(hook)
    outer(torch.ones(1, 3)).sum().backward()


class Implicit(torch.autograd.Function):
    """A gradient that needs a training step of a network, as those of fixed points and inner loops do."""

    @staticmethod
    def forward(ctx, x: Tensor, step: Callable[[], object]) -> Tensor:
        ctx.step = step
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            ctx.step()
        return grad, None


def implicit(module: nn.Module, x: Tensor) -> None:
    Implicit.apply(torch.ones(3, requires_grad=True), lambda: module(x).sum().backward()).sum().backward()


def checkpointed(reentrant: bool) -> Callable[[nn.Module, Tensor], None]:
    def step(module: nn.Module, x: Tensor) -> None:
        checkpoint(module, x.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()

    return step


def checkpointed_in_a_thread(module: nn.Module, x: Tensor) -> None:
    thread = threading.Thread(target=checkpointed(False), args=(module, x))
    thread.start()
    thread.join()


def nested(module: nn.Module, x: Tensor) -> None:
    def inner(x: Tensor) -> Tensor:
        return checkpoint(module, x, use_reentrant=False)

    checkpoint(inner, x.clone().requires_grad_(), use_reentrant=False).square().sum().backward()


def unpacked_outside_of_a_backward_pass(module: nn.Module, x: Tensor) -> None:
    y = checkpoint(lambda x: module(x).square(), x.clone().requires_grad_(), use_reentrant=False)
    assert y.grad_fn._saved_self is not None


TRAINING_FORWARDS: dict[str, Callable[[nn.Module, Tensor], None]] = {
    "hook of a tensor": hooked,
    "hook of a module": module_hook,
    "autograd function": implicit,
    "checkpoint": checkpointed(False),
    "reentrant checkpoint": checkpointed(True),
    "checkpoint in a thread": checkpointed_in_a_thread,
    "checkpoint in a checkpoint": nested,
    "checkpoint that is unpacked outside": unpacked_outside_of_a_backward_pass,
}


@pytest.mark.parametrize("way", TRAINING_FORWARDS)
@pytest.mark.parametrize("name", BLOCK_MODULES)
def test_item_30_each_training_forward_updates_statistics_once(name: str, way: str) -> None:
    module, twin = block(name).train(), block(name).train()
    twin.load_state_dict(module.state_dict())
    x = torch.randn(2, CHANNELS, 6, 5, dtype=torch.float64)
    for _ in range(2):
        TRAINING_FORWARDS[way](module, x)
        twin(x)
    assert counts(module) == {2}
    for (key, buffer), expected in zip(module.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=key)


@pytest.mark.parametrize("reentrant", [True, False])
def test_item_30_hook_in_what_a_checkpoint_recomputes(reentrant: bool) -> None:
    """The recomputed block counts once, and so does the training step that its gradient starts."""
    module, other = block("timm").train(), block("MBConv").train()
    x = torch.randn(2, CHANNELS, 6, 5, dtype=torch.float64)

    def hook(grad: Tensor) -> None:
        other(x)

    def forward(x: Tensor) -> Tensor:
        y = module(x)
        if y.requires_grad:
            y.register_hook(hook)
        return y

    checkpoint(forward, x.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert counts(module) == counts(other) == {1}


# Threads and processes


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", MODELS)
def test_eight_threads_on_one_model(name: str) -> None:
    model, sizes = MODELS[name](), [24 + 5 * i for i in range(8)]

    def infer(size: int) -> list[Tensor]:
        with torch.inference_mode():
            return [model(images(size)) for _ in range(4)]

    expected = {size: infer(size)[0] for size in sizes}
    with ThreadPoolExecutor(8) as pool:
        for size, found in zip(sizes, pool.map(infer, sizes), strict=True):
            assert all(torch.equal(y, expected[size]) for y in found)


@pytest.mark.parametrize("name", TRAINABLE)
def test_training_in_four_threads(name: str) -> None:
    model = MODELS[name]().train()

    def train(seed: int) -> dict[str, Tensor]:
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
        for step in range(3):
            optimizer.zero_grad()
            twin(images(32 + 8 * seed, 4) + step).square().mean().backward()
            optimizer.step()
        return twin.state_dict()

    expected = [train(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for found, state in zip(pool.map(train, range(4)), expected, strict=True):
            assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", MODELS)
def test_thread_counts_change_no_bit(name: str) -> None:
    model, found = MODELS[name](), []
    with torch.no_grad():
        for count in (2, 1, 2, 3, 1):
            torch.set_num_threads(count)
            found.append(model(images(64, 3)))
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_forked_child(name: str) -> None:
    model = MODELS[name]()
    expected = model(images())
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if torch.equal(model(images()), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(model(images()), expected)


class Embedded(Dataset):
    """Data that a network makes in the worker's process."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 6

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        return self.model(images(24 + index))[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("name", MODELS)
def test_workers_of_a_data_loader(name: str) -> None:
    data = Embedded(MODELS[name]())
    expected = torch.stack([data[i] for i in range(len(data))])
    loader = DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context="fork")
    torch.testing.assert_close(torch.cat(list(loader)), expected, rtol=0, atol=0)


# Memory


def resident() -> int:
    """Bytes of this process in memory, after the heap gave back what it kept."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(action: Callable[[int], object], warm: range, then: range) -> int:
    for i in warm:
        action(i)
    before = resident()
    for i in then:
        action(i)
    return resident() - before


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_memory_of_600_image_sizes(name: str) -> None:
    model = MODELS[name]()

    def infer(i: int) -> None:
        model(torch.ones(1, 3, 16 + i % 25, 16 + i // 25).contiguous(memory_format=torch.channels_last))

    infer(599)
    assert growth(infer, range(100), range(600)) < 4 << 20


@linux
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_memory_of_12_models(name: str) -> None:
    weights = 4 * sum(p.numel() for p in MODELS[name]().parameters())

    def build(_: int) -> None:
        MODELS[name]()(images())

    assert growth(build, range(4), range(12)) < max(2 << 20, 6 * weights)


@linux
@pytest.mark.parametrize("name", TRAINABLE)
def test_memory_of_60_training_steps(name: str) -> None:
    model = MODELS[name]().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(i: int) -> None:
        optimizer.zero_grad()
        model(images(24 + i % 5, 4)).square().mean().backward()
        optimizer.step()

    assert growth(step, range(20), range(60)) < 4 << 20


# Interrupts, changes and errors between calls


@pytest.fixture
def interrupted() -> Iterator[Callable[[float], None]]:
    """``interrupted(seconds)`` raises KeyboardInterrupt after that time, as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds) and None
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_keyboard_interrupt_in_a_call(name: str, gradients: bool, interrupted: Callable[[float], None]) -> None:
    model = MODELS[name]()
    x = images(48, 4)
    with torch.set_grad_enabled(gradients):
        expected = model(x)
        for attempt in range(30):
            with pytest.raises(KeyboardInterrupt):
                interrupted(1e-3 + attempt * 1e-4)
                while True:
                    model(x)
            assert torch.equal(model(x), expected)


def another_parameter(model: nn.Module) -> None:
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                setattr(module, name, nn.Parameter(p.detach() * 1.1))


def stepped(model: nn.Module) -> None:
    model(images().double()).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


@torch.no_grad()
def in_place(model: nn.Module) -> None:
    for p in model.parameters():
        p.mul_(1.1)


def through_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 1.1


def through_numpy(model: nn.Module) -> None:
    for p in model.parameters():
        p.detach().numpy()[...] *= 1.1


def loaded(model: nn.Module, assign: bool = False) -> None:
    state = {k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


def trained(model: nn.Module) -> None:
    model.train()(images(32, 4).double())
    model.eval()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "another parameter": another_parameter,
    "optimizer step": lambda model: torch.enable_grad()(stepped)(model),
    "in place": in_place,
    ".data": through_data,
    "NumPy": through_numpy,
    "load_state_dict": loaded,
    "load_state_dict, assigned": lambda model: loaded(model, assign=True),
    "statistics": trained,
    "to and fro": lambda model: model.float().double(),
    "memory format": lambda model: model.to(memory_format=torch.channels_last),
    "shared memory": lambda model: model.share_memory(),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", TRAINABLE)
def test_weights_changed_under_use(name: str, change: str, gradients: bool) -> None:
    model, x = MODELS[name]().double(), images().double()
    with torch.set_grad_enabled(gradients):
        model(x)
        CHANGES[change](model)
        y = model(x)
        plain = copy.deepcopy(model)
        restore_layers(plain)
        with effnet_ops.use_backend("reference"):
            torch.testing.assert_close(y, plain(x), rtol=1e-9, atol=1e-12)


BAD_INPUTS: dict[str, Callable[[], object]] = {
    "None": lambda: None,
    "a list": lambda: [1.0],
    "channels": lambda: torch.randn(2, 4, 32, 32),
    "integers": lambda: torch.ones(2, 3, 32, 32, dtype=torch.int64),
    "another dtype": lambda: torch.randn(2, 3, 32, 32, dtype=torch.float64),
    "two axes": lambda: torch.randn(3, 32),
    "no pixels": lambda: torch.randn(2, 3, 0, 32),
    "sparse": lambda: torch.randn(2, 3, 32, 32).to_sparse(),
    "meta": lambda: torch.randn(2, 3, 32, 32, device="meta"),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_bad_input_between_good_calls(name: str, gradients: bool) -> None:
    model = MODELS[name]()
    with torch.set_grad_enabled(gradients):
        expected = model(images())
        for bad in BAD_INPUTS.values():
            if name != "optimized" or bad is not BAD_INPUTS["another dtype"]:
                with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError)):
                    model(bad())
            assert torch.equal(model(images()), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bn1", "bn2", "blocks.1.0.bn1", "blocks.2.0.bn1", "blocks.3.0.bn1", "conv_stem"])
def test_a_class_that_is_put_on_top_later_is_noticed(name: str) -> None:
    model = with_statistics(timm.create_model("test_efficientnet"), 32).eval()
    replaced, x = copy.deepcopy(model), images()
    replace_layers(replaced)
    replaced(x)
    for net in (model, replaced):
        module = net.get_submodule(name)
        weight = property(lambda self: 2 * self._parameters["weight"])
        module.__class__ = type("Doubled", (type(module),), {"weight": weight})
    expected = model(x)
    assert (replaced(x) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", BLOCK_MODULES)
def test_an_empty_batch_counts(name: str) -> None:
    """As in PyTorch, where it changes nothing else."""
    module, stock = block(name).train(), BLOCK_MODULES[name]().train()
    before = {key: value.clone() for key, value in module.named_buffers()}
    for net in (module, stock):
        net(torch.randn(0, CHANNELS, 6, 5, dtype=torch.float64))
    for (key, value), (other, expected) in zip(module.named_buffers(), stock.named_buffers(), strict=True):
        assert key == other
        if key.endswith("num_batches_tracked"):
            assert value == expected or name == "MBConv"
            assert value == before[key] + 1
        else:
            assert torch.equal(value, before[key])


def tiny() -> nn.Module:
    return with_statistics(timm.create_model("tinynet_e"), 64).eval()


def larger() -> Tensor:
    return torch.randn(1, 3, 64, 64)


def reuse_memory() -> list[Tensor]:
    """Tensors where others were freed."""
    gc.collect()
    return [torch.full((size,), float("nan")) for size in (64, 256, 1024, 4096, 16384) for _ in range(200)]


def assert_still_right(optimized: nn.Module, model: nn.Module, x: Tensor) -> None:
    expected = model(x)
    for _ in range(3):
        assert (optimized(x) - expected).norm() < 1e-4 * expected.norm()


def listened_to(net: nn.Module, x: Tensor) -> None:
    handles = [m.register_forward_hook(lambda m, args, y: None) for m in net.blocks.modules() if not m._modules]
    net.forward_features(x)
    for handle in handles:
        handle.remove()


def classifier_of_others(net: nn.Module, x: Tensor) -> None:
    parameters = {name: torch.randn_like(p) for name, p in net.classifier.named_parameters()}
    functional_call(net.classifier, parameters, torch.randn(1, net.classifier.in_features))


def other_eps_for_a_moment(net: nn.Module, x: Tensor) -> None:
    norm = net.blocks[1][0].bn2
    eps, norm.eps = norm.eps, 0.5
    net.blocks(net.bn1(net.conv_stem(x)))
    norm.eps = eps


@torch.no_grad()
@pytest.mark.parametrize("change", [listened_to, classifier_of_others, other_eps_for_a_moment])
def test_a_change_for_a_moment_leaves_the_whole_call_its_memory(change: Callable[[nn.Module, Tensor], None]) -> None:
    """What the parts have packed is made again meanwhile, and what they had before is nobody's but the whole call's."""
    model, x = tiny(), larger()
    optimized = optimize_for_inference(model)
    for _ in range(4):
        optimized(x)
    change(optimized, x)
    kept = reuse_memory()
    assert_still_right(optimized, model, x)
    del kept


@torch.no_grad()
def test_threads_that_call_a_fresh_copy_at_once() -> None:
    model, xs = tiny(), [larger() for _ in range(3)]
    expected = [model(x) for x in xs]

    def check(optimized: nn.Module) -> list[float]:
        with torch.no_grad():
            return [((optimized(x) - y).norm() / y.norm()).item() for x, y in zip(xs, expected, strict=True)]

    for _ in range(6):
        optimized = optimize_for_inference(model)
        with ThreadPoolExecutor(6) as pool:
            errors = [e for found in pool.map(check, [optimized] * 6) for e in found]
        kept = reuse_memory()
        assert max(errors + check(optimized)) < 1e-4
        del kept


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv_stem", "blocks.1.0.conv_dw"])
def test_a_list_of_settings_that_is_written_in_place(name: str) -> None:
    model, x = tiny(), larger()
    model.get_submodule(name).stride = [2, 2]
    optimized = optimize_for_inference(model)
    for _ in range(4):
        optimized(x)
    for net in (model, optimized):
        net.get_submodule(name).stride[0] = 1
    assert_still_right(optimized, model, x)


@torch.no_grad()
@pytest.mark.parametrize("how", ["parameter", "assign"])
def test_weights_in_the_memory_of_numpy(how: str) -> None:
    model, x = tiny(), larger()
    optimized = optimize_for_inference(model)
    array = model.conv_head.weight.numpy().copy()
    if how == "parameter":
        optimized.conv_head.weight = nn.Parameter(torch.from_numpy(array), requires_grad=False)
    else:
        optimized.load_state_dict({"conv_head.weight": torch.from_numpy(array)}, assign=True, strict=False)
    for _ in range(4):
        optimized(x)
    array *= 2
    model.conv_head.weight.mul_(2)
    assert_still_right(optimized, model, x)


@torch.no_grad()
def test_tensors_of_functional_call_that_are_written_through_data() -> None:
    model, x = tiny(), larger()
    optimized = optimize_for_inference(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        functional_call(optimized, weights, x)
    weights["conv_head.weight"].data.mul_(2)
    found, expected = functional_call(optimized, weights, x), functional_call(model, weights, x)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert_still_right(optimized, model, x)
