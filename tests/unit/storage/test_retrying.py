"""Retries must outlast a disk that a person frees, and must end."""

import errno

import pytest

from pipeline.storage.retrying import Trouble, is_final, listen, retry_on_oserror

FULL = OSError(28, "No space left on device")


class Clock:
    """Time that passes only in `sleep`."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def fails(times: int):
    left = iter([FULL] * times)

    def write() -> str:
        error = next(left, None)
        if error is not None:
            raise error
        return "written"

    return write


def test_a_disk_that_is_full_for_a_while_costs_nothing():
    clock = Clock()
    assert retry_on_oserror(fails(5), sleep=clock.sleep, clock=lambda: clock.now) == "written"
    assert clock.now == 0.5 + 1 + 2 + 4 + 8


def test_a_disk_that_stays_full_is_given_up_in_time():
    clock = Clock()
    with pytest.raises(OSError, match="No space"):
        retry_on_oserror(fails(10_000), retry_for_s=60, sleep=clock.sleep, clock=lambda: clock.now)
    assert 30 <= clock.now <= 60


def test_without_retries_nothing_sleeps():
    clock = Clock()
    with pytest.raises(OSError, match="No space"):
        retry_on_oserror(fails(1), retry_for_s=0, sleep=clock.sleep, clock=lambda: clock.now)
    assert clock.now == 0


def test_another_error_is_raised_at_once():
    def wrong() -> None:
        raise ValueError("no storage is to blame")

    clock = Clock()
    with pytest.raises(ValueError, match="no storage"):
        retry_on_oserror(wrong, sleep=clock.sleep, clock=lambda: clock.now)
    assert clock.now == 0


@pytest.fixture
def heard():
    """Listen to retries; they go on while `heard.patient`."""

    class Heard(list[Trouble | None]):
        patient = True

        def __call__(self, trouble: Trouble | None) -> bool:
            self.append(trouble)
            return self.patient

    heard = Heard()
    listen(heard)
    yield heard
    listen(None)


def test_the_listener_hears_of_trouble_every_second_and_of_its_end(heard):
    clock = Clock()
    retry_on_oserror(fails(4), sleep=clock.sleep, clock=lambda: clock.now)
    *troubles, end = heard
    assert end is None
    assert {(trouble.place, trouble.state) for trouble in troubles} == {("output", "full")}
    assert [trouble.seconds for trouble in troubles] == [0, 0.5, *(1.5 + n for n in range(6))]


def test_a_listener_that_is_to_stop_ends_the_retries(heard):
    """A signal must not wait until a store works again."""
    clock = Clock()
    heard.patient = False
    with pytest.raises(OSError, match="No space"):
        retry_on_oserror(fails(9), sleep=clock.sleep, clock=lambda: clock.now)
    assert clock.now == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FULL, False),
        (TimeoutError(), False),
        (ConnectionResetError(), False),
        (OSError("503 slow down"), False),
        (FileNotFoundError(), True),
        (FileNotFoundError("google::cloud::Status(NOT_FOUND: gcloud-cpp.retry.function=UploadChunk)"), False),
        (PermissionError(errno.EACCES, "no"), True),
        (OSError(errno.EROFS, "Read-only file system"), True),
        (OSError(errno.ENAMETOOLONG, "File name too long"), True),
        (OSError("AWS Error ACCESS_DENIED during PutObject operation: Access Denied."), True),
        (OSError("UploadFrom failed. Azure Error: [ContainerNotFound] 404 The container is gone"), True),
        (OSError("UploadFrom failed. Azure Error: [ServerBusy] 503 Ingress is over the limit"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error, expected):
    assert is_final(error) == expected


@pytest.mark.parametrize(
    "message",
    [
        "AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body.",
        "AWS Error UNKNOWN (HTTP status 400) during GetObject operation: Unable to parse ExceptionName: "
        "ExpiredToken Message: The provided token has expired.",
        "Azure Error: [InvalidAuthenticationInfo] 401 Lifetime validation failed. The token is expired.",
    ],
)
def test_expired_credentials_are_awaited_for_an_output_alone(message):
    """Each image of a job with --fetch was tried for a minute."""
    assert is_final(OSError(message), "input") and not is_final(OSError(message))


def test_a_final_error_is_raised_at_once():
    """A name that is too long would be tried for a quarter of an hour."""
    clock = Clock()

    def write() -> None:
        raise OSError(errno.ENAMETOOLONG, "File name too long")

    with pytest.raises(OSError, match="too long"):
        retry_on_oserror(write, sleep=clock.sleep, clock=lambda: clock.now)
    assert clock.now == 0


def test_an_error_of_arrow_is_raised_without_the_signature_of_its_url():
    """Rows and reports of an input in Azure had the shared access signature in their errors."""

    class StoreError(OSError):
        def __init__(self, message: str, *, response: int) -> None:  # as huggingface_hub has it
            super().__init__(message)

    def fail(error: OSError) -> OSError:
        def read() -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            retry_on_oserror(read)
        return caught.value

    signed = "http://host/bucket/a.tar?se=1&sig=pa55word"
    error = fail(StoreError(f"DownloadTo from '{signed}' failed. AuthenticationFailed", response=403))
    assert str(error) == "DownloadTo from 'http://host/bucket/a.tar' failed. AuthenticationFailed"
    denied = fail(OSError(errno.EACCES, f"{signed} is denied", signed))
    assert denied.errno == errno.EACCES
    assert "sig" not in str(denied)
