"""A worker of this checkout: `python -m flows.worker [--pool NAME]... [--devices cpu:0-1]`.

Makes the work pools, the limits of its devices, the automations and the deployments of prefect.yaml on the server, then
runs one `prefect worker` for each pool, and starts one again that ends. It also schedules crashed pipelines again that
the server's automation missed, and sends MLflow what runs that have ended could not. A worker runs one flow run at a
time, except on pool `control`, whose runs wait for others.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from flows.clones import CHECKOUT_VARIABLE, find_checkout
from flows.devices import VARIABLE as DEVICES_VARIABLE
from flows.devices import list_devices
from stages.common.entry import ENVIRONMENT_DEFAULTS, run_entry
from stages.common.errors import RunError, SettingError
from stages.common.guard import parse_cores

POOLS = ("local", "control", "cpu", "gpu", "generator")
LIMITS = {"control": 20}
"""Runs at a time; 1 where nothing is said."""
CANCEL_POLL_S = 60
"""Between looks for runs to cancel, once a worker has lost the server's events. Prefect gives up looking for ever after
three looks in vain; at its own 10 s a server that is away for 20 s would leave a worker that cancels nothing."""
STOP_S = 40.0
RESTART_S = 5.0
LOOK_S = 30.0
"""Between looks for crashed pipelines that the server has not scheduled again."""
SEND_EVERY_S = 120.0
"""Between looks for what runs could not send."""
SEND_S = 60.0
"""Of one run's folder."""
MISSED_S = 30.0
"""The server's automation needs a second; while it may still get to a run, nobody else should act."""


def main() -> None:
    """Set the server up and work until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m flows.worker", description=__doc__)
    parser.add_argument("--pool", action="append", choices=POOLS, help="default: local and control")
    parser.add_argument(
        "--devices",
        help="cores or GPUs to keep to, such as cpu:0-1 or gpu:0,2 (default: all GPUs, else all cores)",
    )
    parser.add_argument("--name", help="of the worker (default: made by Prefect)")
    arguments = parser.parse_args()
    devices = arguments.devices or find_devices()
    environment = make_environment(devices)
    os.environ.update(environment)
    set_up_server(devices)
    work(arguments.pool or ["local", "control"], arguments.name, devices)


def find_devices() -> str:
    """All GPUs that this process sees, else all cores.

    Raises:
        SettingError: GPUs are named otherwise than by number, or the machine names no cores.
    """
    import torch

    if torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        if not all(number.isdecimal() for number in visible.split(",")):
            raise SettingError(f"CUDA_VISIBLE_DEVICES={visible!r}: names GPUs otherwise than by number; give --devices")
        return f"gpu:{','.join(sorted(visible.split(','), key=int))}"
    cores = sorted(os.sched_getaffinity(0))
    if not cores:
        raise SettingError("--devices: this machine names no cores; give them")
    return f"cpu:{','.join(map(str, cores))}"


def make_environment(devices: str) -> dict[str, str]:
    """What flow runs of this worker inherit."""
    from flows.automations import HEARTBEAT_S
    from stages.common.tracking_client import tracking_uri
    from stages.judge.llm.verdicts import VERDICTS, VERDICTS_VARIABLE

    checkout = str(find_checkout().resolve())
    kind, _, numbers = devices.partition(":")
    list_devices(devices)  # raises for what is no list of devices
    # A worker of cores sees no GPU: another worker holds it.
    visible = sorted(parse_cores(numbers)) if kind == "gpu" else []
    return {
        **{name: value for name, value in ENVIRONMENT_DEFAULTS.items() if name not in os.environ},
        CHECKOUT_VARIABLE: checkout,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *_python_path()]),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        "PREFECT_RUNNER_POLL_FREQUENCY": str(CANCEL_POLL_S),
        "MLFLOW_TRACKING_URI": tracking_uri(),
        # Verdicts of an LLM judge are paid for: the clones of all runs share the checkout's.
        VERDICTS_VARIABLE: os.environ.get(VERDICTS_VARIABLE) or str(Path(checkout) / VERDICTS),
        DEVICES_VARIABLE: devices,
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, visible)),
    }


def set_up_server(devices: str) -> None:
    """Pools, limits, automations and deployments; what is there already is brought up to date.

    Raises:
        RunError: no server answers, or it refuses a deployment.
    """
    import httpx
    from prefect import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    from flows.automations import set_up_automations

    try:
        with get_client(sync_client=True) as client:
            for pool in POOLS:
                client.create_work_pool(WorkPoolCreate(name=pool, type="process"), overwrite=True)
            for name in list_devices(devices):
                client.upsert_global_concurrency_limit_by_name(name, 1)
    except (httpx.HTTPError, ValueError) as error:
        url = os.environ.get("PREFECT_API_URL", "the address in pyproject.toml")
        raise RunError(f"Prefect's server does not answer at {url}; `make services` starts one: {error}") from error
    set_up_automations()
    deploy()


def deploy() -> None:
    """Send prefect.yaml's deployments to the server.

    Raises:
        RunError: it refuses one.
    """
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RunError(f"prefect deploy --all failed: {(done.stdout + done.stderr).strip()[-800:]}")


def work(pools: list[str], name: str | None, devices: str) -> None:
    """Run a worker for each pool until asked to stop; one that ends is started again."""
    if devices.startswith("cpu:"):
        os.sched_setaffinity(0, parse_cores(devices.partition(":")[2]))
    workers = {pool: start_worker(pool, name) for pool in pools}
    sys.stdout.write(f"working for {', '.join(pools)} with {devices}; Ctrl-C ends it\n")
    sys.stdout.flush()
    chores = {look_for_missed: LOOK_S, send_left_behind: SEND_EVERY_S}
    done_at = dict.fromkeys(chores, time.monotonic())
    try:
        while True:
            time.sleep(RESTART_S)
            restart_ended(workers, name)
            for chore, every_s in chores.items():
                if time.monotonic() - done_at[chore] > every_s:
                    chore()
                    done_at[chore] = time.monotonic()
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            _wait(worker)


def restart_ended(workers: "dict[str, subprocess.Popen[bytes]]", name: str | None) -> None:
    """Start the worker of each pool anew that has ended."""
    for pool, worker in workers.items():
        if worker.poll() is not None:
            sys.stderr.write(f"the worker of pool {pool} ended with {worker.returncode}; starting it again\n")
            workers[pool] = start_worker(pool, name)


def look_for_missed(missed_s: float = MISSED_S) -> None:
    """Schedule pipelines that have been crashed for so long; a server that is away is named."""
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError

    from flows.automations import schedule_missed

    try:
        missed = schedule_missed(missed_s)
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        sys.stderr.write(f"cannot look for crashed runs, Prefect's server does not answer: {error}\n")
        return
    for run in missed:
        sys.stderr.write(f"run {run.name} was still crashed; scheduled again\n")


def send_left_behind() -> None:
    """Send MLflow what runs that have ended could not; the first that it does not take ends the attempt."""
    from flows.workspace import lock_unsent_clones

    with contextlib.closing(lock_unsent_clones()) as clones:
        for clone in clones:
            # -P: of this checkout's code, which knows this command; the run may be of an earlier commit.
            command = [sys.executable, "-P", "-m", "stages.send_events", "--seconds", str(SEND_S)]
            try:
                done = subprocess.run(command, cwd=clone, timeout=2 * SEND_S)
            except subprocess.TimeoutExpired:
                sys.stderr.write(f"{clone}: MLflow did not take what is left there; tried again later\n")
                return
            if done.returncode:
                return


def start_worker(pool: str, name: str | None) -> "subprocess.Popen[bytes]":
    """`prefect worker start` for one pool; it is asked to stop when this process is gone."""
    command = [sys.executable, "-m", "flows.worker_process", pool, str(LIMITS.get(pool, 1))]
    # A session of its own, so that Ctrl-C reaches this process alone, which then asks the workers to stop.
    return subprocess.Popen([*command, *([f"{name}-{pool}"] if name else [])], start_new_session=True)


def _wait(worker: "subprocess.Popen[bytes]") -> None:
    try:
        worker.wait(STOP_S)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


if __name__ == "__main__":
    run_entry(main)
