"""Decode steps replayed from recordings (CUDA graphs).

A step over 32 layers is some 500 kernels of a few microseconds each: launching them one by one takes a GPU's
host longer than the GPU takes to run them. A recording is launched as one, but it fixes every shape and
every address. So a step that is to be replayed reads and writes buffers that stay where they are, and comes
in few shapes: rows and reach are rounded up.

The rows behind the running texts belong to free slots. Each appends token 0 at its slot's first position,
which the next prefill into that slot overwrites, and sees that position alone, so that nothing is divided
by zero; what comes out of it is not looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from blip2_actor.engine.out_of_memory import OutOfMemory, catch_out_of_memory
from blip2_actor.models.language_model import KVCacheProtocol, LanguageModel

logger = logging.getLogger(__name__)

Step = Callable[[], None]
"""Does the same work on the same buffers whenever it is called."""

ROWS_STEP = 32
"""Rows are rounded up to powers of two, and above this to its multiples: idle rows cost memory traffic."""
KV_LEN_STEP = 16
"""Reach is rounded up to multiples of this, or to the slots' own length where that is nearer."""
MAX_GRAPHS = 64
"""Each holds some MB of the driver's memory; beyond this goes what was not replayed for longest."""


class StepCapturer(Protocol):
    """Makes steps repeatable at little cost."""

    def capture(self, step: Step) -> Step:
        """What repeats `step`, which may run meanwhile.

        Raises:
            OutOfMemoryError: memory does not suffice to record it; to run it, it may.
            RuntimeError: nothing can be recorded here.
        """
        ...

    def forget(self) -> None:
        """All recordings are gone: their memory may go too."""
        ...


class EagerRunner:
    """Records nothing and runs the step again: the shapes and buffers of a recording on any device."""

    def capture(self, step: Step) -> Step:
        return step

    def forget(self) -> None:
        pass


class CudaGraphs:
    """Records steps as CUDA graphs that share their working memory, since they never run side by side."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        """Always the same one: cuBLAS keeps a workspace for each."""
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, step: Step) -> Step:
        """Run the step once, then record it, on a stream of its own.

        Other threads may use the device meanwhile (another engine's), so only what this thread does must be
        fit to be recorded. `torch.cuda.graph` is not used because it gives
        back all cached memory, which the next batch of images would have to ask the driver for again.
        """
        graph = torch.cuda.CUDAGraph()
        caller = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                step()  # what is made once and kept, workspaces say, must not become part of the recording
                try:
                    self._capture(graph, step)
                except BaseException:
                    self.forget()  # nothing else may have been in the pool
                    raise
        finally:
            caller.wait_stream(self._stream)
        return graph.replay

    def _capture(self, graph: torch.cuda.CUDAGraph, step: Step) -> None:
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            step()
        except BaseException:
            with suppress(RuntimeError):  # a broken recording; the first error says why
                self._end(graph)
            raise
        self._end(graph)

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """A recording that fails to end would leave the allocator taking memory from its pool."""
        try:
            graph.capture_end()
        except BaseException:
            with suppress(RuntimeError):  # it may have come as far as that
                torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
            raise

    def forget(self) -> None:
        """A pool whose last graph is gone cannot be used again."""
        self._pool = torch.cuda.graph_pool_handle()


def capturer_for(device: torch.device, is_wanted: bool) -> StepCapturer | None:
    """How decode steps are recorded; None where that gains nothing, or weights move between devices."""
    if device.type != "cuda" or not is_wanted:
        return None
    return CudaGraphs(device)


class Buffers:
    """What recorded steps read and write: where it is never changes."""

    def __init__(self, language_model: LanguageModel, num_slots: int, device: torch.device) -> None:
        head = language_model.lm_head
        self.staged = torch.zeros(2, num_slots, dtype=torch.int64, pin_memory=device.type == "cuda")
        """int64[2, S]: token ids and lengths, on the host."""
        self.inputs = torch.zeros(2, num_slots, dtype=torch.int64, device=device)
        self.logits = torch.zeros(num_slots, head.out_features, dtype=head.weight.dtype, device=device)


class DecodeReplay:
    """The decode steps of one language model in a few fixed shapes, each recorded when it comes again."""

    def __init__(self, language_model: LanguageModel, capturer: StepCapturer, device: torch.device) -> None:
        self._language_model = language_model
        self._capturer = capturer
        self._device = device
        self._buffers: Buffers | None = None
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, Step] = {}

    def decode(self, token_ids: list[int], lengths: list[int], slots: KVCacheProtocol) -> Tensor:
        """Append one token to each of the first slots; float[R, V], valid until the next step.

        A shape that comes for the first time may never come again, and recording it costs some ten steps.
        """
        if self._buffers is None:
            self._buffers = Buffers(self._language_model, slots.num_slots, self._device)
        rows = min(round_rows(len(token_ids)), slots.num_slots)
        kv_len = min(-(-(max(lengths) + 1) // KV_LEN_STEP) * KV_LEN_STEP, slots.max_length)
        self._upload(self._buffers, token_ids, lengths, rows)
        shape = (rows, kv_len, slots.step_shape(rows))
        step = partial(self._step, self._buffers, slots, rows, kv_len)
        if shape not in self._seen:
            self._seen.add(shape)
            step()
        else:
            replay = self._graphs.pop(shape, None) or self._capture_or_run(step)
            self._graphs[shape] = replay  # behind all others: they stand in the order of use
            if len(self._graphs) > MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            replay()
        return self._buffers.logits[: len(token_ids)]

    def forget(self) -> None:
        """Throw everything away, because the slots are about to move."""
        self._buffers = None
        self._seen.clear()
        self._graphs.clear()
        self._capturer.forget()

    def _upload(self, buffers: Buffers, token_ids: list[int], lengths: list[int], rows: int) -> None:
        """The last step's upload is over: its logits have been looked at."""
        idle = [0] * (rows - len(token_ids))
        buffers.staged[:, :rows] = torch.tensor([token_ids + idle, lengths + idle])
        buffers.inputs.copy_(buffers.staged, non_blocking=True)

    def _step(self, buffers: Buffers, slots: KVCacheProtocol, rows: int, kv_len: int) -> None:
        token_ids, lengths = buffers.inputs[:, :rows]
        buffers.logits[:rows] = self._language_model.decode(token_ids, lengths, slots, kv_len)

    def _capture_or_run(self, step: Step) -> Step:
        """What repeats the step: itself, where memory does not suffice to record it.

        Where no step can be recorded, that is found out and said once.
        """
        capturer = self._capturer
        try:
            found = catch_out_of_memory(lambda: capturer.capture(step))
            if isinstance(found, OutOfMemory):
                torch.cuda.empty_cache()  # a recording's own allocations do not give back what is cached
                found = catch_out_of_memory(lambda: capturer.capture(step))
        except RuntimeError as error:
            logger.warning("Decode steps run kernel by kernel, they could not be recorded: %s", error)
            self._capturer = EagerRunner()
            return step
        if isinstance(found, OutOfMemory):
            logger.warning(
                "Out of memory: a decode step runs kernel by kernel, not recorded: %s", found.reason
            )
            return step
        return found


def round_rows(count: int) -> int:
    """How many rows a step of `count` running texts has."""
    if count <= ROWS_STEP:
        return 1 << (count - 1).bit_length()
    return -(-count // ROWS_STEP) * ROWS_STEP
