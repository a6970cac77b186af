"""Code that an image smuggles into a decoding child reaches only its own memory and two pipes."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageCms

from blip2_actor import DecodePool, Status, decode_image
from blip2_actor.preprocessing.sandbox import landlock, libc, seccomp
from tests.unit.preprocessing.image_corpus import encode, good_images, malformed_images, noise
from tests.unit.preprocessing.test_decode_pool import EXPECTED, GOOD, SIZE, attack, hostile_pool

FOLDER = Path(__file__).parent
REFUSED = ("Operation not permitted", "Permission denied", "Too many open files")
IS_ROOT = os.geteuid() == 0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the protections are those of Linux")


@contextmanager
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_code_in_a_child_reaches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token in the environment, files, the network, other processes and programs are out of reach."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    victim = tmp_path / "victim"
    victim.touch(mode=0o666)
    with listening() as port, hostile_pool(tmp_path) as pool:
        names = ["need_variable AWS_SECRET_ACCESS_KEY", f"open_file /proc/{os.getpid()}/environ"]
        names += [f"open_file {victim}", f"delete_file {victim}", f"create_file {tmp_path / 'new'}"]
        names += [f"list_folder {tmp_path}", "open_file /dev/null", f"connect {port}", "connect_unix name"]
        names += ["signal_parent", "signal_group", "trace_parent", "read_memory_of_parent", "fork"]
        names += ["execute /bin/true", "become_root", "raise_limits"]
        names += [f"need_descriptor {fd}" for fd in range(4, 32)]
        outcomes = pool.decode([attack(name) for name in names])
        assert pool.decode(GOOD) == EXPECTED  # the child that has tried everything
        report = pool.sandbox_report()
    errors = {name: image.error for name, image in zip(names, outcomes, strict=True)}
    allowed = [name for name, image in zip(names, outcomes, strict=True) if image.status is Status.OK]
    assert not allowed, (allowed, str(report))
    assert "no variable" in (errors.pop("need_variable AWS_SECRET_ACCESS_KEY") or "")
    for name, error in errors.items():
        expected = ("Bad file descriptor",) if name.startswith("need_descriptor") else REFUSED
        assert any(reason in (error or "") for reason in expected), (name, error)
    assert victim.exists()


def under(protection: str, *attempts: tuple[Any, ...]) -> dict[str, str]:
    """Return the outcomes of attempts when only one protection is in force."""
    command = [sys.executable, str(FOLDER / "escapes.py"), json.dumps([protection]), json.dumps(attempts)]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    answer = json.loads(subprocess.run(command, capture_output=True, check=True, env=environment).stdout)
    if answer["missing"]:
        pytest.skip(f"not on this machine: {answer['missing'][0]}")
    outcomes: dict[str, str] = answer["outcomes"]
    return outcomes


def test_another_user_alone(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.touch(mode=0o600)
    outcomes = under("another user", ("open_file", str(private)), ("signal_parent",), ("become_root",))
    assert outcomes == {
        "open_file": "Permission denied",
        "signal_parent": "Operation not permitted",
        "become_root": "Operation not permitted",
    }


def test_no_new_privileges_alone() -> None:
    outcomes = under("no new privileges", ("gain_privileges",))
    assert outcomes == {"gain_privileges": "Operation not permitted"}


def test_landlock_alone() -> None:
    """Only later versions of Landlock cover signals and TCP ports."""
    with listening() as port:
        outcomes = under("Landlock", ("open_file", "/etc/passwd"), ("connect", port), ("signal_parent",))
    assert outcomes["open_file"] == "Permission denied"
    assert outcomes["connect"] in ("Permission denied", "done")
    assert outcomes["signal_parent"] in ("Operation not permitted", "done")


def test_no_new_file_descriptors_alone() -> None:
    with listening() as port:
        outcomes = under("no new file descriptors", ("open_file", "/etc/passwd"), ("connect", port))
    assert outcomes == {"open_file": "Too many open files", "connect": "Too many open files"}


def test_seccomp_alone() -> None:
    with listening() as port:
        attempts = [("open_file", "/etc/passwd"), ("delete_file", "/no/file"), ("connect", port), ("fork",)]
        attempts += [("signal_parent",), ("signal_group",), ("trace_parent",), ("read_memory_of_parent",)]
        attempts += [("execute", "/bin/true"), ("raise_limits",)]
        outcomes = under("seccomp", *attempts)
    assert outcomes == {name: "Operation not permitted" for name, *_ in attempts}


@pytest.mark.parametrize(
    ("lacking", "missing"),
    [
        (
            "lose_the_kernels_sandboxes",
            ["Landlock (Function not implemented)", "seccomp (Function not implemented)"],
        ),
        ("lose_root", ["another user (started by uid 1000, not by root)"]),
        (
            "lose_capabilities",
            ["another user (root lacks CAP_KILL, and could not end a process of another user)"],
        ),
    ],
)
def test_images_are_decoded_where_a_protection_is_missing(lacking: str, missing: list[str]) -> None:
    if not IS_ROOT:
        pytest.skip("only root can take rights away")
    if platform.machine() not in seccomp.ARCHITECTURES:
        pytest.skip("seccomp has no filter for this architecture")
    command = (sys.executable, str(FOLDER / "restricted_start.py"), lacking)
    with DecodePool(SIZE, command=command) as pool:
        report = pool.sandbox_report()
        assert pool.decode(GOOD) == EXPECTED
    assert list(report.not_in_force) == missing
    assert str(report).startswith("decode sandbox: ") and str(report).endswith(
        f"; not in force: {', '.join(missing)}"
    )


def test_another_system_than_linux_lacks_its_protections(monkeypatch: pytest.MonkeyPatch) -> None:
    """System calls have other numbers there, so none may be made."""
    monkeypatch.setattr(sys, "platform", "darwin")
    for call in (lambda: libc.prctl(libc.SET_NO_NEW_PRIVS, 1), landlock.restrict, seccomp.restrict):
        with pytest.raises(OSError, match="this is darwin, not Linux"):
            call()


def test_every_format_is_read_in_the_sandbox() -> None:
    """A system call that a codec needs, or a module that Pillow imports late, must stay available."""
    names, images = zip(*good_images(), strict=True)
    with DecodePool(SIZE) as pool:
        decoded = pool.decode(images)
    for name, data, image in zip(names, images, decoded, strict=True):
        assert image.status is Status.OK, (name, image.error)
        assert image == decode_image(data, SIZE), name


def test_all_protections_are_reported_where_they_are_there() -> None:
    with DecodePool(SIZE) as pool:
        report = pool.sandbox_report()
        assert pool.sandbox_report() is report
    assert {"no new privileges", "no new file descriptors"} <= set(report.in_force)
    assert {"no new privileges", "no files", "no network"} <= set(report.restrictions)
    assert len(report.in_force) + len(report.not_in_force) == 5


def test_nothing_is_imported_after_the_sandbox_is_closed(tmp_path: Path) -> None:
    """Pillow would import it during decoding, which fails in the sandbox, and the image with it."""
    images = [*good_images(), *malformed_images(100, seed=3), ("LAB", encode(to_lab(noise(8, 8)), "TIFF"))]
    for number, (_, data) in enumerate(images):
        (tmp_path / str(number)).write_bytes(data)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from blip2_actor.preprocessing import decode_child as child\n"
        "child.prepare_for_sandbox()\n"
        "before = set(sys.modules)\n"
        "images = [path.read_bytes() for path in Path(sys.argv[1]).iterdir()]\n"
        "for data in images: child.decode_or_exhaust(data, 8, child.ImageLimits())\n"
        "print(len(images), *(set(sys.modules) - before))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [str(len(images))]


def to_lab(image: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    assert lab is not None
    return lab
