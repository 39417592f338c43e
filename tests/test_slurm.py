"""The Slurm script with stand-ins for Slurm's commands: two machines, the time limit, the requeued job."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from shared.programs import REPOSITORY, python_path
from shared.training_fixtures import TINY, read_log

from dali_saliencymix.training.checkpoints import load_checkpoint

pytest_plugins = ["shared.training_fixtures"]

SCRIPT = REPOSITORY / "configs" / "slurm" / "train.sbatch"
STAND_INS = {
    # Runs the command once for each machine of the job, and ends with the status of the first task that fails.
    "srun": """
        for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
            SLURM_NODEID=$node "${@:2}" & echo $! >>"$SLURM_TMP/tasks"; tasks+=($!)
        done
        status=0
        for task in "${tasks[@]}"; do wait "$task" || status=$?; done
        exit $status""",
    "scancel": """
        echo "scancel $*" >>"$SLURM_TMP/calls"
        kill -"${1#--signal=}" $(cat "$SLURM_TMP/tasks")""",
    "scontrol": """
        echo "scontrol $*" >>"$SLURM_TMP/calls"
        if [ "$1" = show ]; then echo localhost; echo elsewhere; fi""",
    "torchrun": 'exec "$PYTHON" -m torch.distributed.run "$@"',
}


@pytest.fixture
def job(tmp_path, data_folder):
    """Return a function that starts the script as Slurm would."""
    for name, text in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/bash\n" + text)
        path.chmod(0o755)
    with socket.socket() as free:  # the script derives a port from the job id
        free.bind(("localhost", 0))
        number = 20000 + free.getsockname()[1] % 20000
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "RANK", "MASTER"))}
    environment |= {
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NODELIST": "machine[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_TMP": str(tmp_path),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": python_path(),
    }
    started = []

    def start(*more):
        (tmp_path / "tasks").unlink(missing_ok=True)
        with open(tmp_path / "log", "a") as log:
            command = ["bash", str(SCRIPT), str(data_folder), *TINY, "-a", "resnet18", *more]
            command += ["--output-dir", str(tmp_path / "out")]
            process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines()


def test_a_job_on_two_machines_is_stopped_in_time_queued_again_and_goes_on(job, tmp_path):
    # So many epochs that the job is stopped within one.
    running = job("--epochs", "400")
    log = tmp_path / "out" / "log.jsonl"
    while not (log.exists() and any(line["event"] == "epoch" for line in read_log(log.parent))):
        assert running.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.2)
    running.send_signal(signal.SIGUSR1)
    text = (tmp_path / "log").read_text
    assert running.wait(timeout=200) == 0, text()
    assert "requeued" in text(), text()
    number = calls(tmp_path)[-1].split()[-1]
    shown, *others = calls(tmp_path)
    assert shown == "scontrol show hostnames machine[1-2]"
    assert others == [f"scancel --signal=TERM {number}", f"scontrol requeue {number}"]
    start, *_ = read_log(log.parent)
    assert start["config"]["world_size"] == 2
    done = sum(line["event"] == "epoch" for line in read_log(log.parent))
    assert 1 <= done < 400

    saved = load_checkpoint(tmp_path / "out" / "checkpoint_last.pt")
    assert (saved["epoch"], saved["step"]) > (0, 0)
    assert saved["config"]["resume"] == "auto"


@pytest.mark.parametrize("status", [0, 3])
def test_a_job_that_ends_by_itself_is_not_queued_again(job, tmp_path, status):
    (tmp_path / "bin" / "torchrun").write_text(f"#!/bin/bash\nexit {status}\n")
    assert job().wait(timeout=60) == status
    assert calls(tmp_path) == ["scontrol show hostnames machine[1-2]"]
