"""Decode steps replayed as CUDA graphs; `encoders.py` replays full batches of images.

A step over 32 layers is about 500 kernels of a few microseconds each. Launching them one by one takes the
host longer than the GPU needs to run them. A graph is one launch, but it fixes every shape and every address.
So a replayed step reads and writes buffers that never move, and comes in few shapes: the number of rows is
rounded up, and so is `kv_len`, unless attention reads the lengths from the device.

The rows after those of the running texts belong to free slots. Each of them appends token 0 at the first
position of its slot, which the next prefill into this slot overwrites, and attends to this position alone, so
that nothing is divided by zero. Their logits are ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from blip2_actor.device import FIRST
from blip2_actor.engine.out_of_memory import OutOfMemory, catch_out_of_memory
from blip2_actor.models.language_model import KVCacheProtocol, LanguageModel

logger = logging.getLogger(__name__)

Step = Callable[[], None]
"""Does the same work on the same buffers each time it is called."""

ROWS_STEP = 32
"""Rows are rounded up to powers of two up to this number, and to its multiples above, because idle rows cost
memory traffic."""
KV_LEN_STEP = 16
"""`kv_len` is rounded up to multiples of this, or to the length of the slots if that is less."""
MAX_GRAPHS = 64
"""Each graph holds some MB of the driver's memory; beyond this number, the least recently used one is
dropped."""


class StepCapturer(Protocol):
    """Makes steps cheap to repeat."""

    def capture(self, step: Step) -> Step:
        """Return a step that repeats `step`; `step` may run while it is captured.

        Raises:
            OutOfMemoryError: memory does not suffice to capture it; it may still suffice to run it.
            RuntimeError: steps cannot be captured here.
        """
        ...

    def forget(self) -> None:
        """Release memory, because all captured steps are gone."""
        ...


class EagerRunner:
    """Captures nothing and runs the step itself, with the shapes and buffers of a graph, on any device."""

    def capture(self, step: Step) -> Step:
        return step

    def forget(self) -> None:
        pass


class CudaGraphs:
    """Captures steps as CUDA graphs. They share their working memory, because they never run at the same
    time."""

    def __init__(self, device: torch.device, priority: int = FIRST) -> None:
        self._stream = torch.cuda.Stream(device, priority=priority)  # graphs keep that of their capture
        """One stream for all graphs: cuBLAS keeps a workspace per stream."""
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, step: Step) -> Step:
        """Run the step once, then capture it, on a stream of its own.

        Other threads, such as those of another engine, may use the device at the same time. So the capture
        mode is "thread_local": only what this thread does must be allowed during a capture.
        `torch.cuda.graph` is not used, because it gives back all cached memory, which the next batch of
        images would have to request from the driver again.
        """
        graph = torch.cuda.CUDAGraph()
        caller = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                step()  # allocations that are kept, such as workspaces, must not become part of the graph
                try:
                    self._capture(graph, step)
                except BaseException:
                    self.forget()  # the pool may have held nothing else
                    raise
        finally:
            caller.wait_stream(self._stream)
        return graph.replay

    def _capture(self, graph: torch.cuda.CUDAGraph, step: Step) -> None:
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            step()
        except BaseException:
            with suppress(RuntimeError):  # the capture is broken; the first error says why
                self._end(graph)
            raise
        self._end(graph)

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture. If that fails, stop the allocator from taking memory from the graph's pool."""
        try:
            graph.capture_end()
        except BaseException:
            with suppress(RuntimeError):  # `capture_end` may have done this before it failed
                torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
            raise

    def forget(self) -> None:
        """Start a new pool: a pool whose last graph is gone cannot be used again."""
        self._pool = torch.cuda.graph_pool_handle()


def capturer_for(device: torch.device, is_wanted: bool, priority: int = FIRST) -> StepCapturer | None:
    """Return what captures steps on a GPU; None if this is not wanted."""
    return CudaGraphs(device, priority) if is_wanted else None


class Captures:
    """Captures steps, and runs them kernel by kernel where that fails."""

    def __init__(self, capturer: StepCapturer) -> None:
        self._capturer = capturer

    def capture(self, step: Step) -> Step:
        """Return the captured step, or the step itself if memory does not suffice to capture it.

        If steps cannot be captured here at all, log this once and capture none from then on.
        """
        capturer = self._capturer
        try:
            captured = catch_out_of_memory(lambda: capturer.capture(step))
            if isinstance(captured, OutOfMemory):
                torch.cuda.empty_cache()  # allocations during a capture do not give back cached memory
                captured = catch_out_of_memory(lambda: capturer.capture(step))
        except RuntimeError as error:
            logger.warning("Steps could not be captured and run kernel by kernel: %s", error)
            self._capturer = EagerRunner()
            return step
        if isinstance(captured, OutOfMemory):
            logger.warning(
                "Out of memory: a step was not captured and runs kernel by kernel: %s", captured.reason
            )
            return step
        return captured

    def forget(self) -> None:
        """Release memory, because all captured steps are gone."""
        self._capturer.forget()


class Buffers:
    """What captured steps read and write; these tensors never move."""

    def __init__(self, language_model: LanguageModel, num_slots: int, device: torch.device) -> None:
        head = language_model.lm_head
        is_cuda = device.type == "cuda"
        self.staged = torch.zeros(2, 2, num_slots, dtype=torch.int64, pin_memory=is_cuda).unbind()
        """int64[2, S] for this step and for the previous one: token ids and lengths, on the host."""
        self.inputs = torch.zeros(2, num_slots, dtype=torch.int64, device=device)
        self.logits = torch.zeros(num_slots, head.out_features, dtype=head.weight.dtype, device=device)


class DecodeReplay:
    """The decode steps of one language model in a few fixed shapes.

    A shape is captured when it comes for the second time.
    """

    def __init__(self, language_model: LanguageModel, capturer: StepCapturer, device: torch.device) -> None:
        self._language_model = language_model
        self._captures = Captures(capturer)
        self._device = device
        self._buffers: Buffers | None = None
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, Step] = {}

    def decode(
        self, token_ids: list[int], lengths: list[int], slots: KVCacheProtocol, selected: Tensor | None = None
    ) -> Tensor:
        """Append one token to each of the first slots.

        The first step of a shape runs eagerly: the shape may never come again, and to capture it costs as
        much as about ten steps.

        Args:
            selected: int64[S], the tokens of the slots whose id is negative.

        Returns:
            float[R, V], valid until the next step.
        """
        if self._buffers is None:
            self._buffers = Buffers(self._language_model, slots.num_slots, self._device)
        rows = min(round_rows(len(token_ids)), slots.num_slots)
        kv_len = slots.max_length
        if not slots.reads_counts:
            kv_len = min(-(-(max(lengths) + 1) // KV_LEN_STEP) * KV_LEN_STEP, kv_len)
        self._upload(self._buffers, token_ids, lengths, rows, selected)
        shape = (rows, kv_len, slots.step_shape(rows))
        step = partial(self._step, self._buffers, slots, rows, kv_len)
        if shape not in self._seen:
            self._seen.add(shape)
            step()
        else:
            replay = self._graphs.pop(shape, None) or self._captures.capture(step)
            self._graphs[shape] = replay  # last, because the graphs are in the order of their use
            if len(self._graphs) > MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            replay()
        return self._buffers.logits[: len(token_ids)]

    def forget(self) -> None:
        """Drop all graphs and buffers, because the slots are about to move."""
        self._buffers = None
        self._seen.clear()
        self._graphs.clear()
        self._captures.forget()

    def _upload(
        self,
        buffers: Buffers,
        token_ids: list[int],
        lengths: list[int],
        rows: int,
        selected: Tensor | None,
    ) -> None:
        """Bring the inputs to the device.

        The previous step may not have begun, so its inputs are still needed; those of the step before it are
        not, because its tokens have been read.
        """
        staged, other = buffers.staged
        buffers.staged = other, staged
        idle = [0] * (rows - len(token_ids))
        staged[:, :rows] = torch.tensor([token_ids + idle, lengths + idle])
        buffers.inputs.copy_(staged, non_blocking=True)
        if selected is not None:
            buffers.inputs[0, :rows] = fill_in(buffers.inputs[0, :rows], selected)

    def _step(self, buffers: Buffers, slots: KVCacheProtocol, rows: int, kv_len: int) -> None:
        token_ids, lengths = buffers.inputs[:, :rows]
        buffers.logits[:rows] = self._language_model.decode(token_ids, lengths, slots, kv_len)


def round_rows(count: int) -> int:
    """Return how many rows a step of `count` slots has."""
    if count <= ROWS_STEP:
        return 1 << (count - 1).bit_length()
    return -(-count // ROWS_STEP) * ROWS_STEP


def fill_in(token_ids: Tensor, selected: Tensor | None) -> Tensor:
    """Return token ids with those of `selected` instead of negative ones, int64[R] and int64[S]."""
    if selected is None:
        return token_ids
    return torch.where(token_ids < 0, selected[: len(token_ids)], token_ids)
