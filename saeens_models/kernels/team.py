"""The threads that compiled kernels run on."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from itertools import count
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from saeens_models.kernels.products import multiplies_bfloat16

T = TypeVar("T")

WORTH_SHARING = 2**22
"""Operations on numbers that take about as long as it takes to wake another thread and wait for it."""
_BLOCK_TOKENS = 64, 256
"""Fewest and most tokens of a block: a product of fewer rows is slow, and the pre-activations of more leave the cache."""


class Team:
    """As many threads as torch uses, for work that releases the interpreter lock; a context manager.

    Inside, torch itself runs on one thread in each of them: products of blocks, one block to a thread, take turns with compiled
    loops over the same block while it is in the cache. Torch's own threads would spin between its operations and hold the cores.

    Torch's precision of float32 products is "highest" inside, on all threads: which features are largest must not depend on it. Kernels
    for which it may be less see `in_bfloat16`.
    """

    def __init__(self) -> None:
        self.n_threads = torch.get_num_threads()
        self._precision = torch.get_float32_matmul_precision()
        self.in_bfloat16 = self._precision == "medium" and multiplies_bfloat16()
        """Whether products may be in bfloat16: where torch's precision is "medium", and the processor is faster then."""
        self._memory = threading.local()  # scratch memory by name, and whether the thread is in a task

    def __enter__(self) -> Team:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")
        self._executor = ThreadPoolExecutor(max(1, self.n_threads - 1), "saeens-team", initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
        torch.set_num_threads(self.n_threads)
        torch.set_float32_matmul_precision(self._precision)

    def run(self, task: Callable[[int], T], n_tasks: int, work: int = WORTH_SHARING) -> list[T]:
        """``[task(0), ..., task(n_tasks - 1)]``; a thread takes the next one when it is done with its last.

        All stay on this thread within a task of another run, and where the ``work``, operations on numbers, is less than waking others.
        """
        n_threads = min(self.n_threads, n_tasks)
        if n_threads <= 1 or work < WORTH_SHARING or getattr(self._memory, "in_task", False):
            return [task(number) for number in range(n_tasks)]
        results: dict[int, T] = {}
        numbers = count()  # hands each number out once: taking one is a single operation of the interpreter
        failed = threading.Event()

        def take() -> None:
            self._memory.in_task = True
            try:
                while (number := next(numbers)) < n_tasks and not failed.is_set():
                    results[number] = task(number)
            except BaseException:
                failed.set()
                raise
            finally:
                self._memory.in_task = False

        others = [self._executor.submit(take) for _ in range(n_threads - 1)]
        try:
            take()
        finally:
            wait(others)
        for other in others:
            other.result()
        return [results[number] for number in range(n_tasks)]

    def apart(self, task: Callable[[], T]) -> T:
        """``task()``, on another thread. What it holds when an interrupt comes, which is for the main thread, it can still give back."""

        def alone() -> T:
            self._memory.in_task = True
            try:
                return task()
            finally:
                self._memory.in_task = False

        return self._executor.submit(alone).result()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Give torch its threads back for a while; within a task it keeps to one."""
        if getattr(self._memory, "in_task", False):
            yield
            return
        torch.set_num_threads(self.n_threads)
        try:
            yield
        finally:
            torch.set_num_threads(1)

    def scratch(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory to work in, of the calling thread: the next call with this name may give the same. Its content is undefined."""
        kept: dict[str, Tensor] = self._memory.__dict__
        view = kept.get(name)
        if view is None or view.dtype != dtype or view.shape != shape:
            n = prod(shape)
            held = kept.get(f"all of {name}")
            if held is None or held.dtype != dtype or held.numel() < n:
                held = kept[f"all of {name}"] = torch.empty(n, dtype=dtype)
            view = kept[name] = held[:n].view(shape)
        return view

    def kept(self, name: str, make: Callable[..., T], *shape: int) -> T:
        """``make(self, name, *shape)``: several pieces of :meth:`scratch`. Made again only if the calling thread asks for another shape."""
        kept: dict[str, tuple[tuple[int, ...], T]] = self._memory.__dict__.setdefault("kept", {})
        last = kept.get(name)
        if last is None or last[0] != shape:
            last = kept[name] = (shape, make(self, name, *shape))
        return last[1]


def cpu_team(device: torch.device | str) -> AbstractContextManager[Team | None]:
    """A team for work on this device; None where compiled kernels do not help: on accelerators, and without numba."""
    return Team() if torch.device(device).type == "cpu" and _has_numba() else nullcontext()


def _has_numba() -> bool:
    try:
        import_module("numba")
    except ImportError as error:
        if getattr(error, "name", None) != "numba":  # it is there, and does not know this numpy, for one
            warnings.warn(f"numba cannot be imported, without which training and encoding are slower: {error}", stacklevel=3)
        return False
    return True


def blocks_of_tokens(n_tokens: int) -> list[slice]:
    """A batch in blocks, one of which a thread works on at a time. It does not depend on the threads: nor do the bits of a result."""
    fewest, most = _BLOCK_TOKENS
    size = min(max(-(-n_tokens // 2), fewest), most)
    return [slice(start, min(start + size, n_tokens)) for start in range(0, n_tokens, size)]
