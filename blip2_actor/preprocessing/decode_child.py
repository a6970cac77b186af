"""The program that a `DecodePool` starts: decode images from standard input, under limits, one by one.

    python -m blip2_actor.preprocessing.decode_child SIZE_PX LIMITS_AS_JSON

Untrusted bytes may make this program crash, hang or use up its memory; its parent survives that. It replies
to an image before it reads the next, so the first image without a reply is the one on which it died. It ends
when its input ends, and so when its parent dies. It imports Pillow and the standard library only, and starts
in 0.1 s.

Untrusted bytes may also make this program do what an attacker wants. So it gets no environment, and closes a
sandbox around itself before it reads the first image (`sandbox/`).
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import sys
import warnings

from PIL import Image

from blip2_actor.preprocessing.decode_messages import OUT_OF_MEMORY, REQUEST, pack_hello, pack_reply
from blip2_actor.preprocessing.formats import prepare_for_sandbox
from blip2_actor.preprocessing.images import DecodedImage, ImageLimits, decode_or_exhaust
from blip2_actor.preprocessing.sandbox.protections import close_sandbox

_INPUT_BUFFER_BYTES = 1 << 20


def main() -> None:
    size_px, limits = int(sys.argv[1]), ImageLimits(**json.loads(sys.argv[2]))
    # Not the place of standard error, which is free if the parent has closed its own.
    replies = os.fdopen(fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3), "wb", buffering=0)
    prepare_for_sandbox()
    _apply(limits)
    requests = os.fdopen(0, "rb", buffering=_INPUT_BUFFER_BYTES)
    _discard_output()
    replies.write(pack_hello(close_sandbox()))
    try:
        while len(header := requests.read(REQUEST.size)) == REQUEST.size:
            data = requests.read(REQUEST.unpack(header)[0])
            replies.write(pack_reply(_decode_in_time(data, size_px, limits)))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BrokenPipeError:
        pass  # the parent has died


def _discard_output() -> None:
    """Send standard output and standard error to /dev/null.

    Codecs print remarks about damaged bytes. On standard output a remark would look like a reply, and on
    standard error it would fill the caller's log.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    if null > 2:  # else it is itself the missing standard error
        os.close(null)


def _apply(limits: ImageLimits) -> None:
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # max_pixels is the limit here
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]  # of the parent; it can only be lowered
        num_bytes = limits.memory_bytes if hard == resource.RLIM_INFINITY else min(hard, limits.memory_bytes)
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    timer_signals = (signal.SIGPROF, signal.SIGALRM)
    for timer_signal in timer_signals:  # a parent that ignores them passes that on to its children
        signal.signal(timer_signal, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, timer_signals)


def _decode_in_time(data: bytes, size_px: int, limits: ImageLimits) -> DecodedImage:
    # With their default action these signals end the process even if C code never returns to Python.
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
    signal.setitimer(signal.ITIMER_REAL, limits.wall_s)
    image = decode_or_exhaust(data, size_px, limits)
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return image


if __name__ == "__main__":
    main()
