"""Two real processes over loopback, two virtual devices each, against one process with four."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny

from mtl_jax.errors import UserError
from mtl_jax.training import mesh as meshes
from mtl_jax.training.logs import read_metrics

FLAGS = ["--devices", "0", "--trunk.dropout", "0", "--checkpoints.every", "5"]


def start(folder, workdir, devices, *flags):
    environment = os.environ | {"TINY": str(folder), "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, tiny.__file__, "--workdir", str(workdir), *FLAGS, *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_train_as_one(tmp_path):
    tiny.write_bert(tmp_path / "bert")
    tiny.write_data(tmp_path / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pair = [start(tmp_path, tmp_path / "two", 2, "--distributed", f"{address},{index},2") for index in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], "\n".join(outputs)
    alone = start(tmp_path, tmp_path / "one", 4)
    output = alone.communicate(timeout=300)[0]
    assert alone.returncode == 0, output
    assert "| coarse" in outputs[0]
    assert "| coarse" not in outputs[1]  # host 0 speaks

    def totals(workdir):
        return [record["total"] for record in read_metrics(workdir) if record["kind"] == "train"]

    assert len(totals(tmp_path / "two")) == 12
    np.testing.assert_allclose(totals(tmp_path / "two"), totals(tmp_path / "one"), rtol=1e-5)


@pytest.mark.parametrize("cluster", ["yes", "localhost,0,2", "localhost:1,0", "localhost:1,a,b"])
def test_bad_addresses(cluster):
    with pytest.raises(UserError, match="give auto, or HOST:PORT,INDEX,COUNT"):
        meshes.connect(cluster)
