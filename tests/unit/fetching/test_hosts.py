"""Web servers are asked with patience and within limits; one that is down does not hold up the job."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from blip2_actor import FetchError, FetchPolicy, Status
from pipeline.fetching.hosts import DOWN_S, MAX_HOSTS, Hosts
from tests.unit.fetching.web_server import web_server

POLICY = FetchPolicy(private_hosts=("127.0.0.1",), timeout_s=10.0)


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []
        self.while_asleep: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if seconds:
            self.pauses.append(seconds)
            self.while_asleep()


def hosts(clock: Clock, per_host: int = 8, patience_s: float = 60.0) -> Hosts:
    return Hosts(POLICY, per_host, patience_s, clock.sleep, lambda: clock.now)


def failure(asked: Hosts, url: str) -> FetchError:
    with pytest.raises(FetchError) as raised:
        asked.fetch(url)
    return raised.value


def test_a_server_that_is_busy_or_fails_is_asked_again() -> None:
    clock = Clock()
    with web_server({"/a": [429, 500, 503, b"image"]}) as site:
        assert hosts(clock).fetch(f"{site.url}/a") == b"image"
    assert clock.pauses == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("header", ["7", "Wed, 21 Oct 2065 07:28:00 GMT"])
def test_the_pause_that_a_server_asks_for_is_made(header: str) -> None:
    """Or not waited for, if it is longer than the patience."""
    clock = Clock()
    with web_server({"/a": [(429, {"Retry-After": header}), b"image"]}) as site:
        if header == "7":
            assert hosts(clock).fetch(f"{site.url}/a") == b"image"
            assert clock.pauses == [7.0]
        else:
            error = failure(hosts(clock), f"{site.url}/a")
            assert error.status is Status.FETCH_FAILED and "asks to wait" in str(error)
            assert clock.pauses == []


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_definite_answer_is_not_asked_for_again(status: int) -> None:
    clock = Clock()
    with web_server({"/a": [status]}) as site:
        error = failure(hosts(clock), f"{site.url}/a")
        assert (error.status, error.http_status) == (Status.FETCH_FAILED, status)
        assert site.num_requests["/a"] == 1


def test_a_server_that_is_down_is_left_alone_for_a_while() -> None:
    """A million images of a dead host would hold up the job for years."""
    clock = Clock()
    with web_server({"/a": [503], "/b": [b"image"]}) as site:
        asked = hosts(clock, patience_s=4.0)
        assert "status 503, not with an image (4 tries in 4 s)" in str(failure(asked, f"{site.url}/a"))
        assert "until it may be up" in str(failure(asked, f"{site.url}/a"))
        assert site.num_requests["/a"] == 5, "it was asked once more"
        before = clock.now
        error = failure(asked, f"{site.url}/b")
        assert error.status is Status.FETCH_FAILED and "status 503" in str(error)
        assert (clock.now, site.num_requests["/b"]) == (before, 0)
        clock.now += DOWN_S
        assert asked.fetch(f"{site.url}/b") == b"image"


def test_one_image_that_cannot_be_had_does_not_bring_its_server_down() -> None:
    """A thousand good images failed if the bad one was the last of its part of a table."""
    clock = Clock()
    with web_server({"/bad": [500], "/good": [b"image"]}) as site:
        asked = hosts(clock, patience_s=4.0)
        assert "tries" in str(failure(asked, f"{site.url}/bad"))
        assert [asked.fetch(f"{site.url}/good") for _ in range(3)] == [b"image"] * 3


def test_without_patience_each_image_is_asked_for_once() -> None:
    """One failure left the host alone for a minute."""
    with web_server({"/bad": [503], "/good": [b"image"]}) as site:
        asked = hosts(Clock(), patience_s=0.0)
        assert "status 503" in str(failure(asked, f"{site.url}/bad"))
        assert asked.fetch(f"{site.url}/good") == b"image"


def test_one_image_that_cannot_be_had_does_not_count_against_its_server() -> None:
    clock = Clock()
    with web_server({"/bad": [500], "/good": [b"image"]}) as site:
        asked = hosts(clock, patience_s=4.0)
        clock.while_asleep = lambda: asked.fetch(f"{site.url}/good")
        assert "tries" in str(failure(asked, f"{site.url}/bad"))
        assert asked.fetch(f"{site.url}/good") == b"image"


@pytest.mark.parametrize("per_host", [1, 3])
def test_a_host_gets_a_limited_number_of_requests_at_once(per_host: int) -> None:
    with (
        web_server({"/a": [b"image"]}, threading.Barrier(per_host)) as site,
        ThreadPoolExecutor(8) as threads,
    ):
        asked = Hosts(POLICY, per_host, 60.0)
        assert list(threads.map(asked.fetch, [f"{site.url}/a"] * 8)) == [b"image"] * 8
    assert site.most_at_once == per_host


def test_hosts_without_end_are_not_all_remembered() -> None:
    asked = hosts(Clock())
    for number in range(MAX_HOSTS + 10):
        asked._host_of(f"http://host{number}/a")
    assert len(asked._hosts) == MAX_HOSTS


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/latest/meta-data/", "http://[", "http://localhost/a"]
)
def test_a_private_address_is_refused_without_another_try(url: str) -> None:
    clock = Clock()
    assert failure(hosts(clock), url).status is Status.REFUSED
    assert clock.pauses == []
