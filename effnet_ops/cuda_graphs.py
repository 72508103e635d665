"""A module whose forward pass is captured in CUDA graphs, one for each kind of input.

It is for small batches, where launching from Python is what takes the time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_WARM_UPS = 3


class CUDAGraphs(nn.Module):
    """Runs ``module`` on a GPU by replaying what its first call on such images launched.

    ``module`` is inside under that name. There is one graph for each shape, layout, dtype and device of images, and
    precision of autocast. At most ``most`` are kept, those that were used last; each keeps a copy of its images and of
    what it returns, and all share the memory between. Results are new tensors.

    A graph knows nothing of what Python does: weights, settings and hooks are those of its capture. `reset` forgets all
    graphs; so do ``load_state_dict``, ``to`` and their like, when called on this module.

    Raises, at a call:
        TypeError: anything but one tensor is given.
        ValueError: the images are not on a GPU.
        RuntimeError: a gradient is asked for, or the module does what cannot be captured, such as to wait for the GPU.
    """

    def __init__(self, module: nn.Module, most: int = 8) -> None:
        super().__init__()
        if most < 1:
            raise ValueError(f"most must be at least 1, got {most}")
        self.module, self.most = module, most
        self.reset()

    def reset(self) -> None:
        """Forget all graphs, and give their memory back."""
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._lock, self._pool = threading.Lock(), None

    def forward(self, *images: Tensor, **settings: Any) -> Any:
        x = _one_tensor(images, settings)
        # Inside somebody else's graph or program the launches belong to that.
        if torch.compiler.is_compiling() or _is_capturing(x):
            return self.module(x)
        if reason := why_not(x):
            raise ValueError(f"a CUDA graph cannot run this call: {reason}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a CUDA graph has no gradients: call it under torch.no_grad(), or call its .module")
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (x.shape, x.stride(), x.dtype, x.device, autocast)
        # Two threads must not fill the same images.
        with self._lock, torch.no_grad():
            graph = self._graphs.get(key)
            if graph is None:
                graph = self._capture(key, x)
            else:
                self._graphs.move_to_end(key)
            return graph.run(x)

    def _capture(self, key: Any, x: Tensor) -> _Graph:
        while len(self._graphs) >= self.most:
            self._graphs.popitem(last=False)
        try:
            graph = capture(self.module, x, self._pool)
        except Exception as error:
            name = type(self.module).__name__
            raise RuntimeError(
                f"{name} cannot be captured in a CUDA graph for images {tuple(x.shape)}: {str(error).splitlines()[0]}"
            ) from error
        self._pool = graph.pool
        self._graphs[key] = graph
        return graph

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.reset()
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.reset()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_graphs", "_lock", "_pool")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.reset()


class _Graph:
    """Launches that read ``images`` and write ``results``."""

    def __init__(self, images: Tensor, results: Any, replay: Callable[[], None], pool: Any) -> None:
        self.images, self.results, self.replay, self.pool = images, results, replay, pool

    def run(self, x: Tensor) -> Any:
        self.images.copy_(x)
        self.replay()
        return pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, self.results)


def why_not(x: Tensor) -> str:
    """Why no graph can be made for these images, or ""."""
    return "" if x.is_cuda else f"the images are on {x.device}, and not on a GPU"


def _one_tensor(images: tuple[Any, ...], settings: dict[str, Any]) -> Tensor:
    if settings or len(images) != 1 or not isinstance(images[0], Tensor):
        given = [type(value).__name__ for value in images] + [f"{name}=" for name in settings]
        raise TypeError(f"a CUDA graph takes one tensor of images, got {', '.join(given) or 'nothing'}")
    return images[0]


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def capture(module: nn.Module, x: Tensor, pool: Any) -> _Graph:
    """The module's launches on images like x. ``pool`` is that of earlier graphs, of which none runs meanwhile."""
    with torch.cuda.device(x.device):
        images, stream, graph = x.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # What is compiled, packed or chosen at a first call is not a part of the graph.
            for _ in range(_WARM_UPS):
                module(images)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            results = module(images)
        return _Graph(images, results, graph.replay, graph.pool())
