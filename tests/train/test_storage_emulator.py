"""A run in an emulator of Google Cloud Storage: gcsfs, orbax and TensorStore's own client.

Needs `pip install gcsfs gcp-storage-emulator`. The emulator knows no preconditions, so that the
first of two starts at the same moment is not told apart there.
"""

import os
import socket
import subprocess
import sys

import pytest

from tests.train.tiny_run import write_text

pytest.importorskip("gcsfs")
emulator = pytest.importorskip("gcp_storage_emulator.server")
pytestmark = pytest.mark.slow

PROGRAM = """
import sys
from tests.train.test_object_storage import killed_at
from tests.train.tiny_run import Killed, losses_of, tiny_config
from jaxopt_lab.train import export_run, load_params, pretrain
from jaxopt_lab.train.arguments import parse_config

run, text = "gs://bucket/runs/one", sys.argv[1]
try:
    pretrain(tiny_config(text, run), callbacks=[killed_at(6)])
except Killed:
    pass
before = losses_of(run)
assert max(before) == 4, before
# Its lease is released, as the process lives on.
assert pretrain(parse_config(["--resume", "--run-directory", run], "pretrain")).status == "finished"
assert losses_of(run).items() > before.items()
load_params(run, step="best")
print(export_run(run, "gs://bucket/models/one"))
"""


@pytest.fixture
def server():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    started.start()
    yield f"http://localhost:{port}"
    started.stop()


def test_a_run_is_killed_and_resumed(server, tmp_path):
    text = write_text(tmp_path / "text")
    environment = os.environ | {
        "STORAGE_EMULATOR_HOST": server,
        "TENSORSTORE_GCS_HTTP_URL": server,
        "FSSPEC_GCS_TOKEN": "anon",
        "GOOGLE_CLOUD_PROJECT": "none",
        # gcsfs would ask the real service for the kind of the bucket.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "JAXOPT_LAB_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, text], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "gs://bucket/models/one"
