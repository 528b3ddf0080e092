"""A team of threads for compiled kernels, with scratch memory per thread."""

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from itertools import count
from math import prod
from typing import Self, TypeVar

import torch
from torch import Tensor

from saeens_models.kernels.products import multiplies_bfloat16

T = TypeVar("T")

WORTH_SHARING = 2**22
"""Number of arithmetic operations that take about as long as waking another thread and waiting for it."""
_BLOCK_TOKENS = 64, 256
"""Fewest and most tokens of a block: products of fewer rows are slow, and the pre-activations of more rows do not fit the cache."""


class Team:
    """As many threads as torch uses, for work that releases the interpreter lock; a context manager.

    Inside the context torch runs on one thread in each of them. Each thread alternates between torch's products of a block and compiled
    loops over the same block while it is in the cache. Torch's own threads would spin between operations and occupy the cores.

    Inside the context torch's precision of float32 products is "highest" on all threads: the selected features must not depend on it.
    Kernels that may use a lower precision read :attr:`in_bfloat16`.
    """

    def __init__(self) -> None:
        from saeens_models.kernels import compiled, compiled_pursuit, compiled_topk  # need numba

        self.compiled, self.compiled_pursuit, self.compiled_topk = compiled, compiled_pursuit, compiled_topk
        self.n_threads = torch.get_num_threads()
        self._precision = torch.get_float32_matmul_precision()
        self.in_bfloat16 = self._precision == "medium" and multiplies_bfloat16()
        """Products may be in bfloat16: torch's precision is "medium", and the processor multiplies bfloat16 faster."""
        self._memory = threading.local()  # scratch memory by name, and a flag: the thread is in a task

    def __enter__(self) -> Self:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")
        self._executor = ThreadPoolExecutor(max(1, self.n_threads - 1), "saeens-team", initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
        torch.set_num_threads(self.n_threads)
        torch.set_float32_matmul_precision(self._precision)

    def run(self, task: Callable[[int], T], n_tasks: int, work: int = WORTH_SHARING) -> list[T]:
        """Return ``[task(0), ..., task(n_tasks - 1)]``. A thread takes the next task when it has finished its last one.

        All tasks run on the calling thread if it is in a task already, or if the ``work`` (arithmetic operations of all tasks) is too
        little to wake other threads.
        """
        n_threads = min(self.n_threads, n_tasks)
        if n_threads <= 1 or work < WORTH_SHARING or getattr(self._memory, "in_task", False):
            return [task(number) for number in range(n_tasks)]
        results: dict[int, T] = {}
        numbers = count()  # each number is taken once: next() is a single operation of the interpreter
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
        """Return ``task()``, computed on another thread: interrupts reach the main thread only, and leave no lock of the task held."""

        def alone() -> T:
            self._memory.in_task = True
            try:
                return task()
            finally:
                self._memory.in_task = False

        return self._executor.submit(alone).result()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Let torch use all threads within this context. Inside a task of the team torch keeps one thread."""
        if getattr(self._memory, "in_task", False):
            yield
            return
        torch.set_num_threads(self.n_threads)
        try:
            yield
        finally:
            torch.set_num_threads(1)

    def scratch(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return scratch memory of the calling thread with undefined content; the next call with this name may return the same memory."""
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
        """Return ``make(self, name, *shape)``, which groups pieces of :meth:`scratch`; cached until the thread asks for another shape."""
        kept: dict[str, tuple[tuple[int, ...], T]] = self._memory.__dict__.setdefault("kept", {})
        last = kept.get(name)
        if last is None or last[0] != shape:
            last = kept[name] = (shape, make(self, name, *shape))
        return last[1]


def cpu_team(device: torch.device | str) -> AbstractContextManager[Team | None]:
    """Return a context manager that yields a team of CPU threads, or None on accelerators and without numba."""
    return Team() if torch.device(device).type == "cpu" and _has_numba() else nullcontext()


def _has_numba() -> bool:
    try:
        import_module("numba")
    except ImportError as error:
        if getattr(error, "name", None) != "numba":  # installed, but broken: for example not for this version of numpy
            warnings.warn(f"numba cannot be imported; training and encoding are slower without it: {error}", stacklevel=3)
        return False
    return True


def blocks_of_tokens(n_tokens: int) -> list[slice]:
    """Return the blocks of a batch, each processed by one thread. They do not depend on the number of threads, so neither do results."""
    fewest, most = _BLOCK_TOKENS
    size = min(max(-(-n_tokens // 2), fewest), most)
    return [slice(start, min(start + size, n_tokens)) for start in range(0, n_tokens, size)]
