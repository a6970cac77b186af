"""A real S3 server on loopback: the gateway of an in-memory Ceph cluster with one monitor and one disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import boto3
import pytest

from tests.chaos.stores.emulators import START_S, Store, running
from tests.ports import free_port

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
KEY, SECRET = "key", "s3cret-of-ceph"
CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{monitor_port}
public addr = 127.0.0.1
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
mon data = {folder}/monitor
mon cluster log file = {folder}/cluster.log
mon allow pool size one = true
osd data = {folder}/disk
osd objectstore = memstore
memstore device bytes = 2147483648
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
rgw frontends = beast endpoint=127.0.0.1:{port}
run dir = {folder}
log file = {folder}/$name.log
admin socket = {folder}/$name.asok
pid file =
"""


@contextmanager
def ceph(folder: Path) -> Iterator[Store]:
    """Start the cluster and its gateway."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not in PATH")
    fsid, disk, port, monitor_port = str(uuid.uuid4()), str(uuid.uuid4()), free_port(), free_port()
    for name in ("monitor", "disk"):
        (folder / name).mkdir()
    configuration = folder / "ceph.conf"
    configuration.write_text(
        CONFIGURATION.format(fsid=fsid, monitor_port=monitor_port, port=port, folder=folder)
    )
    environment = {**os.environ, "CEPH_CONF": str(configuration)}

    def call(*command: str) -> str:
        return subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True, timeout=START_S
        ).stdout

    monitors = str(folder / "monitors")
    call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"v1:127.0.0.1:{monitor_port}", monitors)
    call("ceph-mon", "--mkfs", "-i", "a", "--monmap", monitors)
    with ExitStack() as servers:
        servers.enter_context(running(["ceph-mon", "-i", "a", "-f"], monitor_port, environment))
        call("ceph", "osd", "new", disk)
        call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        servers.enter_context(running(["ceph-osd", "-i", "0", "-f"], None, environment))
        deadline = time.monotonic() + START_S
        while "1 up" not in call("ceph", "osd", "stat"):
            assert time.monotonic() < deadline, "the disk must come up"
        user = ("--uid=user", "--display-name=user", f"--access-key={KEY}", f"--secret-key={SECRET}")
        call("radosgw-admin", "user", "create", *user)
        servers.enter_context(running(["radosgw", "-n", "client.rgw", "-f"], port, environment))
        variables = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        variables |= {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
        variables |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
        boto3.client(
            "s3",
            endpoint_url=variables["AWS_ENDPOINT_URL"],
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        ).create_bucket(Bucket="bucket")
        options = f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        yield Store("s3", f"{KEY}:{SECRET}@", options, SECRET, variables, "s3")
