"""The queues in front of the slots: images that wait for the encoders, and requests that wait for a slot.

Each priority has both, a `Lane`. One thread, the engine's, uses them. Only lengths may be read from other
threads.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.out_of_memory import Limits
from blip2_actor.engine.request_state import RequestState
from blip2_actor.request import Result
from blip2_actor.status import Status


class EncodeQueue:
    """Images in order of arrival, and the requests that wait for each of them.

    An image leaves the queue when its pass begins (`take`). Its requests wait here until the pass has ended
    (`take_requests`), so an image that several requests share is encoded once.
    """

    def __init__(self) -> None:
        self._images: OrderedDict[EncodedImage, None] = OrderedDict()
        """Those that are queued; each has requests."""
        self._requests: dict[EncodedImage, list[RequestState]] = {}
        self.gap_s = math.inf
        """Seconds between the last two images that came."""
        self._last_arrived_s = -math.inf

    def __len__(self) -> int:
        return len(self._images)

    def __contains__(self, image: EncodedImage) -> bool:
        """True if a request waits for this image, which is queued or being encoded."""
        return image in self._requests

    def add(self, request: RequestState) -> None:
        """Queue a request behind its image, and the image if it is neither queued nor being encoded."""
        image = request.image
        if image not in self._requests:
            self._images[image] = None
            self._requests[image] = []
            self.gap_s = request.arrived_s - self._last_arrived_s
            self._last_arrived_s = request.arrived_s
        self._requests[image].append(request)

    @property
    def first_arrived_s(self) -> float:
        """When the oldest request for the first image came."""
        return self._requests[next(iter(self._images))][0].arrived_s

    def take(self, max_images: int) -> list[EncodedImage]:
        """Remove the first images that a caller still wants; their requests go on waiting."""
        taken: list[EncodedImage] = []
        while self._images and len(taken) < max_images:
            image, _ = self._images.popitem(last=False)
            wanting = [request for request in self._requests.pop(image) if not request.is_dropped()]
            if wanting:
                self._requests[image] = wanting
                taken.append(image)
        return taken

    def put_back(self, images: Sequence[EncodedImage]) -> None:
        """Queue those images in front again that requests wait for: their pass did not succeed."""
        for image in reversed(images):
            if image in self._requests:
                self._images[image] = None
                self._images.move_to_end(image, last=False)

    def put_behind(self, image: EncodedImage) -> None:
        """Queue an image again if requests wait for it: more of it is wanted than when its pass began."""
        if image in self._requests:
            self._images.setdefault(image)

    def take_requests(self, image: EncodedImage) -> list[RequestState]:
        """Remove an image, queued or not, and return the requests that waited for it."""
        self._images.pop(image, None)
        return self._requests.pop(image, [])


class ReadyQueue:
    """Requests whose image is encoded, in the order in which they get slots."""

    def __init__(self, limits: Limits) -> None:
        self.num_slots = 0
        """Slots that all these requests need together; counted, because every step asks for it."""
        self._limits = limits
        self._requests: deque[RequestState] = deque()

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def first_arrived_s(self) -> float:
        return self._requests[0].arrived_s

    def add(self, request: RequestState) -> None:
        """Queue a request for its slots.

        A request that only wanted its image encoded is finished here. A request that needs more slots than
        there are would wait forever, so it fails.
        """
        if not request.searches:
            request.finish()
        elif request.num_slots > (max_slots := self._limits.max_slots):
            error = (
                f"out of memory: num_beams and num_return_sequences must be at most {max_slots}, got "
                f"{request.num_slots}; lower them, or give the engine more memory"
            )
            request.resolve(Result(status=Status.FAILED, error=error))
        else:
            self._requests.append(request)
            self.num_slots += request.num_slots

    def take(self, num_free_slots: int, max_requests: int) -> list[RequestState]:
        """Remove the first requests that fit into the free slots; cancelled ones are dropped."""
        taken: list[RequestState] = []
        while self._requests and len(taken) < max_requests:
            request = self._requests[0]
            if not request.is_dropped():
                if request.num_slots > num_free_slots:
                    break
                num_free_slots -= request.num_slots
                taken.append(request)
            self.take_first()
        return taken

    def take_first(self) -> RequestState:
        request = self._requests.popleft()
        self.num_slots -= request.num_slots
        return request

    def put_back(self, requests: Sequence[RequestState]) -> None:
        """Queue requests in front again, in the given order."""
        self._requests.extendleft(reversed(requests))
        self.num_slots += sum(request.num_slots for request in requests)

    def check_again(self) -> None:
        """Fail requests that need more slots than there are now."""
        requests, self._requests, self.num_slots = self._requests, deque(), 0
        for request in requests:
            self.add(request)


class Lane:
    """The requests of one priority that have no slot yet."""

    def __init__(self, limits: Limits) -> None:
        self.waiting = EncodeQueue()
        self.ready = ReadyQueue(limits)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.ready)

    def add(self, request: RequestState) -> None:
        """Queue a request; an image that is already encoded is not encoded again."""
        if request.image.is_encoded:
            self.ready.add(request)
        else:
            self.waiting.add(request)

    @property
    def is_overdue(self) -> bool:
        """True if an image waits that came before every ready request.

        Requests for images that are encoded already overtake it; they must not do so without end.
        """
        return bool(self.waiting and self.ready) and self.waiting.first_arrived_s < self.ready.first_arrived_s


class Lanes:
    """One lane for each priority; iteration begins with those that go first."""

    def __init__(self, limits: Limits) -> None:
        self.normal, self.low = Lane(limits), Lane(limits)

    def __iter__(self) -> Iterator[Lane]:
        return iter((self.normal, self.low))

    def __len__(self) -> int:
        return len(self.normal) + len(self.low)

    def of(self, request: RequestState) -> Lane:
        return self.low if request.low_priority else self.normal
