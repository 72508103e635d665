"""Every launch of a Triton kernel, so that a call that comes again can be launched without Triton's own bookkeeping.

Triton looks at each argument at each launch, to find the compiled kernel that fits: with the host code around it, some
200 us, in which a GPU of today runs the kernel several times. A `Recorder` sees one call of an operator: the tensors
that it makes, the kernels that it launches and the arguments of these. `Recorder.finish` gives a `Recording`, which
does the same for other tensors of the same sizes by the compiled kernels alone. Kernels that are no Triton kernels are
operators of their own, which the operator calls (`is_kernel`): a recording calls them again, with views of its tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton import knobs

_local = threading.local()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
    """``kernel[grid](*args, **settings)``."""
    recorder = getattr(_local, "recorder", None)
    if recorder is None:
        kernel[grid](*args, **settings)
        return
    # What Triton itself does with tensors, as its interpreter does, is a part of the launch.
    with _disable_current_modes():
        compiled = kernel[grid](*args, **settings)
    recorder.launched(kernel, compiled, grid, args, settings)


class Place(NamedTuple):
    """Where a pointer comes from: the argument of this number, or, from -1 downwards, what the call itself makes.

    ``offset`` is in bytes.
    """

    source: int
    offset: int


class View(NamedTuple):
    """A tensor with the memory of another one; ``offset`` is in elements from where that begins."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, value: Tensor, offset: int = 0) -> View:
        return cls(tuple(value.shape), value.stride(), offset)

    def __call__(self, base: Tensor) -> Tensor:
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)


class Launch(NamedTuple):
    """A launch, without the pointers: these are ``places``, each with its position in ``arguments``."""

    run: Callable[..., object]
    arguments: list[Any]
    places: list[tuple[int, Place]]
    last_use: list[int]
    """What the call has made and no later step reads."""

    @property
    def sources(self) -> list[int]:
        return [place.source for _, place in self.places]


class Call(NamedTuple):
    """A call of an operator that is a kernel, without its tensors: these are ``views`` of a source, as in `Place`.

    All its results are new tensors. A view that is all of its source, in the form in which that is made, is None.
    """

    run: Callable[..., tuple[Tensor, ...]]
    arguments: list[Any]
    views: list[tuple[int, int, View | None]]
    last_use: list[int]

    @property
    def sources(self) -> list[int]:
        return [source for _, source, _ in self.views]

    def __call__(self, tensors: Sequence[Tensor], made: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        arguments = self.arguments[:]
        for position, source, view in self.views:
            base = tensors[source] if source >= 0 else made[-1 - source]
            arguments[position] = base if view is None else view(base)
        return self.run(*arguments)


class Made(NamedTuple):
    """A tensor that the call makes: empty, or the argument ``cast_from`` in another dtype."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    cast_from: int | None = None


class Unrecordable(Exception):
    """The call does something that cannot be done again from its arguments' addresses alone."""


class Recording:
    """What an operator's call launches for arguments of these sizes, strides and dtypes, in order."""

    def __init__(
        self,
        device: torch.device,
        steps: list[Launch | Call | Made],
        outputs: list[tuple[int, View | None]],
        single: bool,
    ) -> None:
        self._device, self._steps, self._outputs, self._single = device, steps, outputs, single

    def __call__(self, tensors: Sequence[Tensor], pointers: list[int], stream: int) -> Any:
        """The operator's result for these tensor arguments, which begin at ``pointers``; launched on ``stream``."""
        pointers, made = pointers[:], []
        first, device = len(pointers) - 1, self._device
        for step in self._steps:
            if type(step) is Made:
                size, stride, dtype, cast_from = step
                if cast_from is None:
                    value = torch.empty_strided(size, stride, dtype=dtype, device=device)
                else:
                    value = tensors[cast_from].to(dtype)
                made.append(value)
                pointers.append(value.data_ptr())
                continue
            if type(step) is Call:
                results = step(tensors, made)
                made.extend(results)
                pointers.extend(map(Tensor.data_ptr, results))
            else:
                arguments = step.arguments[:]
                for position, (source, offset) in step.places:
                    # What is made comes behind the arguments: -1 is the first of it.
                    arguments[position] = pointers[source if source >= 0 else first - source] + offset
                step.run(stream, arguments)
            for index in step.last_use:
                made[index] = None
        results = [made[index] if view is None else view(made[index]) for index, view in self._outputs]
        return results[0] if self._single else tuple(results)


_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_CASTS = {torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype}


def _is_view(function: Any, args: Sequence[Any], result: Any) -> bool:
    """Whether a function only looks at its first argument in another way, as `contiguous` may or may not."""
    if function._schema.is_mutable or not args or not isinstance(args[0], Tensor):
        return False
    memory = args[0].untyped_storage()._cdata
    results = (result,) if isinstance(result, Tensor) else result
    return all(isinstance(value, Tensor) and value.untyped_storage()._cdata == memory for value in results)


def is_kernel(function: Any) -> bool:
    """Whether an operator launches kernels for its tensors and leaves them as they are, as those of `ops/cuda` do."""
    return function.name().startswith("effnet_ops::cuda_") and not function._schema.is_mutable


def _end(value: Tensor) -> int:
    """Where the memory of a tensor with elements ends."""
    last = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    return value.data_ptr() + (last + 1) * value.element_size()


class Recorder(TorchDispatchMode):
    """Watches one call of an operator on Triton kernels, as a context manager around it.

    Args:
        tensors: the operator's tensor arguments. No two of them may begin at the same address.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._tensors = tensors
        self._arguments = {t.data_ptr(): i for i, t in enumerate(tensors) if t.numel()}
        self._steps: list[Launch | Call | Made] = []
        # Kept until the end, so that no two tensors of the call have had the same address.
        self._made: list[Tensor] = []
        # The step that makes each.
        self._made_at: list[int] = []
        self._storages: dict[int, int] = {}
        self._problem = ""

    def __enter__(self) -> Recorder:
        self._previous = getattr(_local, "recorder", None)
        _local.recorder = self
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _local.recorder = self._previous
        super().__exit__(*exception)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if is_kernel(function):
            self._attempt(self._called, function, args, kwargs, result)
        elif function in _EMPTY:
            self._keep(result, None)
        elif _is_view(function, args, result):
            pass
        elif function in _CASTS:
            source = self._arguments.get(args[0].data_ptr())
            plain = result.stride() == args[0].stride() and result.device == args[0].device
            if source is None or not plain or args[0].shape != self._tensors[source].shape:
                self._problem = "something else than an argument is converted"
            else:
                self._keep(result, source)
        else:
            self._problem = f"{function} is neither a launch nor a view"
        return result

    def _attempt(self, step: Callable[..., None], *args: Any) -> None:
        """What goes wrong ends the recording, and not the call."""
        try:
            step(*args)
        except Unrecordable as problem:
            self._problem = str(problem)

    def _keep(self, value: Tensor, cast_from: int | None) -> None:
        self._add(value)
        self._steps.append(Made(tuple(value.shape), value.stride(), value.dtype, cast_from))

    def _add(self, value: Tensor) -> None:
        """What the next step makes."""
        self._storages[value.untyped_storage()._cdata] = len(self._made)
        self._made.append(value)
        self._made_at.append(len(self._steps))

    def _place(self, value: Tensor) -> Place:
        argument = self._arguments.get(value.data_ptr())
        if argument is not None:
            return Place(argument, 0)
        made = self._storages.get(value.untyped_storage()._cdata)
        if made is None:
            raise Unrecordable("a launch reads what is neither an argument nor made by the call")
        return Place(-1 - made, value.data_ptr() - self._made[made].data_ptr())

    def _view(self, value: Tensor) -> tuple[int, View]:
        """The source of a tensor that a kernel reads, and which part of it that is."""
        source, offset = self._place(value)
        base = self._tensors[source] if source >= 0 else self._made[-1 - source]
        if value.untyped_storage()._cdata != base.untyped_storage()._cdata or value.dtype != base.dtype:
            raise Unrecordable("a kernel reads a tensor as another one's memory, or as another dtype")
        if offset < 0 or (value.numel() and _end(value) > _end(base)):
            raise Unrecordable("a kernel reads more of a tensor's memory than the tensor has")
        return source, View.of(value, offset // value.element_size())

    def _called(self, function: Any, args: Sequence[Any], kwargs: Any, result: Any) -> None:
        lists = [value for value in args if isinstance(value, (list, tuple))]
        if kwargs or any(isinstance(value, Tensor) for values in lists for value in values):
            raise Unrecordable(f"{function} takes tensors by name or in lists")
        if not isinstance(result, tuple) or not all(isinstance(value, Tensor) for value in result):
            raise Unrecordable(f"{function} gives something else than a tuple of tensors")
        given = {value.untyped_storage()._cdata for value in self._tensors}
        memory = [value.untyped_storage()._cdata for value in result]
        if len(set(memory)) < len(memory) or not given.union(self._storages).isdisjoint(memory):
            raise Unrecordable(f"{function} gives a tensor that is not a new one")
        arguments = [None if isinstance(value, Tensor) else value for value in args]
        views = [(i, *self._view(value)) for i, value in enumerate(args) if isinstance(value, Tensor)]
        for value in result:
            self._add(value)
        self._steps.append(Call(function, arguments, views, []))

    def launched(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: Sequence[Any], settings: dict[str, Any]
    ) -> None:
        """Called by `launch`."""
        self._attempt(self._launched, kernel, compiled, grid, args, settings)

    def _launched(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: Sequence[Any], settings: dict[str, Any]
    ) -> None:
        names = kernel.arg_names
        arguments = [*args, *(settings[name] for name in names[len(args) :])]
        places: list[tuple[int, Place]] = []
        for position, value in enumerate(arguments):
            if isinstance(value, Tensor):
                places.append((position, self._place(value)))
                arguments[position] = 0
        self._steps.append(Launch(runner(kernel, compiled, grid), arguments, places, []))

    def finish(self, result: Tensor | tuple[Tensor, ...]) -> Recording:
        """The recording of the call that gave ``result``; raises `Unrecordable` with the reason."""
        if self._problem:
            raise Unrecordable(self._problem)
        single = isinstance(result, Tensor)
        outputs: dict[int, View | None] = {}
        for value in (result,) if single else result:
            index = self._storages.get(value.untyped_storage()._cdata)
            if index is None or index in outputs:
                raise Unrecordable("a result is not a tensor of its own, made by the call")
            outputs[index] = self._output(value, index)
        steps = [step._replace(views=self._final(step.views)) if type(step) is Call else step for step in self._steps]
        uses = [(i, source) for i, step in enumerate(steps) if type(step) is not Made for source in step.sources]
        for index, at in {-1 - source: i for i, source in uses if source < 0}.items():
            if index not in outputs:
                steps[at].last_use.append(index)
        return Recording(self._made[0].device, steps, list(outputs.items()), single)

    def _output(self, value: Tensor, index: int) -> View | None:
        """What a result is of the tensor that the call has made for it; None where it is made as it is returned."""
        base, at = self._made[index], self._made_at[index]
        if (value.data_ptr(), value.numel(), value.dtype) != (base.data_ptr(), base.numel(), base.dtype):
            raise Unrecordable("a result is a part of what the call made")
        step = self._steps[at]
        if type(step) is Made:
            if step.cast_from is not None:
                raise Unrecordable("a result is an argument in another dtype")
            # It is made in the form in which it is returned.
            self._steps[at] = Made(tuple(value.shape), value.stride(), value.dtype)
            return None
        return None if View.of(value) == View.of(base) else View.of(value)

    def _final(self, views: list[tuple[int, int, View | None]]) -> list[tuple[int, int, View | None]]:
        """The same, None where a view is all of its source."""

        def whole(source: int) -> View:
            if source >= 0:
                return View.of(self._tensors[source])
            step = self._steps[self._made_at[-1 - source]]
            return View(*step[:2], 0) if type(step) is Made else View.of(self._made[-1 - source])

        return [(i, source, None if view == whole(source) else view) for i, source, view in views]


def watched() -> bool:
    """Whether somebody, such as a profiler, has asked Triton to be told of launches."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def runner(kernel: Any, compiled: Any, grid: tuple[int, ...]) -> Callable[[int, list[Any]], object]:
    """What launches a compiled kernel on a stream, with all of its arguments in order."""
    x, y, z = (*grid, 1, 1)[:3]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    return lambda stream, arguments: run(x, y, z, stream, function, metadata, None, None, None, *arguments)
