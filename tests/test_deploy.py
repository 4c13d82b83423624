"""deploy/: what Slurm and Kubernetes would start is started here, on loopback, with nodes that are stopped and killed.

A node is one torchrun agent with its ranks. Every run has to end in the bits of one agent with two ranks.
"""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import TINY_RECIPE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks of an agent in /proc")

DEPLOY = Path(__file__).parents[1] / "deploy"
LAST_STEP = 80
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LOOPBACK = {"PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}  # PET_X is torchrun's own way to set --x
PORTS = itertools.count(20000 + os.getpid() % 9000)


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # ended meanwhile
            continue
    return found + [grandchild for child in found for grandchild in children(child)]


def kill_hard(node: "subprocess.Popen[bytes]") -> None:
    """What a power cut does: the agent and its ranks, which are in sessions of their own, are gone at once."""
    for pid in [node.pid, *children(node.pid)]:
        os.kill(pid, signal.SIGKILL)
    node.wait()


class Nodes:
    """Nodes that share one run, each with a log of its own."""

    def __init__(self, folder: Path, recipe: Path, data: Path) -> None:
        self.folder, self.recipe, self.data, self.run = folder, recipe, data, folder / "run"
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, command: list[str], **environment: str) -> "subprocess.Popen[bytes]":
        log = self.folder / f"node-{len(self.started)}.log"
        with open(log, "wb") as output:
            node = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={**os.environ, **LOOPBACK, **environment},
            )
        self.started.append(node)
        return node

    def logs(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("node-*.log")))


@pytest.fixture
def nodes(tmp_path: Path, recipe: Path, tiny_data: Path) -> Iterator[Nodes]:
    group = Nodes(tmp_path, recipe, tiny_data)
    yield group
    for node in group.started:
        if node.poll() is None:
            kill_hard(node)


@pytest.fixture
def port() -> int:
    """One of those that the Slurm script chooses from."""
    return next(PORTS)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(
        TINY_RECIPE.replace("max_steps = 12", f"max_steps = {LAST_STEP}").replace("every = 6", "every = 40")
    )
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, recipe: Path, tiny_data: Path) -> dict[str, str]:
    """One agent with two ranks, uninterrupted."""
    run = tmp_path_factory.mktemp("reference") / "run"
    launcher = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "regpt2", "--"]
    train = ["train", str(recipe), "--data", str(tiny_data), "--run", str(run)]
    done = subprocess.run([*launcher, *train], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return final_state(run)


def final_state(run: Path) -> dict[str, str]:
    """SHA-256 of the weights and the optimizer state after the last update."""
    folder = run / "checkpoints" / f"step-{LAST_STEP:08d}"
    names = ("model.safetensors", "optimizer.safetensors")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True) if (run / "metrics.jsonl").exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written
    return [event for event in found if event["event"] == kind]


def wait_for_step(step: int, nodes: Nodes, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if max([0, *(event["step"] for event in events(nodes.run, "train"))]) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {timeout_s} s\n{nodes.logs()}")


def wait_for_end(processes: "list[subprocess.Popen[bytes]]", nodes: Nodes, timeout_s: float = 120) -> list[int]:
    """Exit codes."""
    try:
        return [process.wait(timeout_s) for process in processes]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end in {timeout_s} s\n{nodes.logs()}") from None


def check_one_stop(run: Path) -> None:
    """All ranks left at one step: it is in the record, and its checkpoint is the newest."""
    end = events(run, "end")[-1]
    assert end["reason"] == "stopped by signal 15"
    assert end["step"] < LAST_STEP
    assert max(folder.name for folder in (run / "checkpoints").glob("step-*")) == f"step-{end['step']:08d}"
    assert events(run, "train")[-1]["step"] == end["step"]


# Slurm

SRUN = """#!/bin/bash
# As srun: the command once per node, at the same time; its exit code is the worst of theirs.
[[ -n ${SRUN_FAILS:-} ]] && exit 1
while [[ $1 == -* ]]; do shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node "$@" & echo $! >> tasks; started+=($!)
done
worst=0
for task in "${started[@]}"; do wait "$task" || worst=$?; done
exit $worst
"""
SCONTROL = """#!/bin/bash
echo "$*" >> scontrol.log
[[ $1 == show ]] && printf '127.0.0.1\\n127.0.0.2\\n'
exit 0
"""


class Slurm:
    """sbatch of deploy/slurm.sh, with stubs for srun and scontrol in a PATH of its own."""

    def __init__(self, nodes: Nodes, port: int) -> None:
        self.nodes, self.folder = nodes, nodes.folder
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            stub = self.folder / "bin" / name
            stub.parent.mkdir(exist_ok=True)
            stub.write_text(text)
            stub.chmod(0o755)
        self.environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": str(70_000 + port - 20_000),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "RECIPE": str(nodes.recipe),
            "DATA": str(nodes.data),
            "RUN": str(nodes.run),
            "PYTHON": sys.executable,
            "RANKS_PER_NODE": "1",
        }

    def start(self, **more: str) -> "subprocess.Popen[bytes]":
        return self.nodes.start(["bash", str(DEPLOY / "slurm.sh")], **{**self.environment, **more})

    def signal_tasks(self, number: signal.Signals) -> None:
        """As --signal without B: does: to the tasks, neither to srun nor to the script."""
        for task in (self.folder / "tasks").read_text().split():
            os.kill(int(task), number)

    def requeued(self) -> int:
        calls = (self.folder / "scontrol.log").read_text().splitlines()
        assert calls[0] == "show hostnames node[0-1]"
        return calls.count(f"requeue {self.environment['SLURM_JOB_ID']}")


@pytest.fixture
def slurm(nodes: Nodes, port: int) -> Slurm:
    return Slurm(nodes, port)


def test_a_slurm_job_saves_before_its_time_is_up_and_goes_on_in_the_queue(
    slurm: Slurm, nodes: Nodes, reference: dict[str, str]
) -> None:
    job = slurm.start()
    wait_for_step(30, nodes)
    slurm.signal_tasks(signal.SIGTERM)
    told_at = time.monotonic()
    assert wait_for_end([job], nodes) == [0]
    assert time.monotonic() - told_at < 10
    check_one_stop(nodes.run)
    assert slurm.requeued() == 1

    assert wait_for_end([slurm.start()], nodes) == [0]
    assert final_state(nodes.run) == reference
    assert slurm.requeued() == 1
    assert list((nodes.run / "logs").glob("*/attempt_0/0/stdout.log"))


def test_a_slurm_job_that_gets_nowhere_is_not_requeued(slurm: Slurm, nodes: Nodes) -> None:
    assert wait_for_end([slurm.start(SRUN_FAILS="1")], nodes) == [1]
    assert slurm.requeued() == 0
    assert "no new checkpoint in this attempt" in nodes.logs()


def test_the_slurm_script_says_what_is_missing(slurm: Slurm, nodes: Nodes) -> None:
    assert wait_for_end([slurm.start(DATA="")], nodes) != [0]
    assert "DATA: the folder with the shards" in nodes.logs()


# Kubernetes


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    return {document["kind"]: document for document in documents}


def test_the_kubernetes_objects_fit_together(manifest: dict[str, Any]) -> None:
    service, job = manifest["Service"], manifest["Job"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    options = dict(word.split("=", 1) for word in container["command"] if word.startswith("--") and "=" in word)
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    name = manifest["Job"]["metadata"]["name"]
    # the first pod's name resolves through the headless service, at the port where the agents meet
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert options["--rdzv-endpoint"] == f"{name}-0.{pod['subdomain']}:{service['spec']['ports'][0]['port']}"
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == int(options["--nnodes"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(options["--nproc-per-node"])
    # a preempted pod comes back for nothing, a broken one at most backoffLimit times; both have time to save
    assert pod["restartPolicy"] == "Never"  # the API demands it where there is a podFailurePolicy
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    assert job["podFailurePolicy"]["rules"] == [{"action": "Ignore", "onPodConditions": disrupted}]
    assert job["backoffLimit"] > int(options["--max-restarts"])
    assert 30 < int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    # every mount has a volume, and the paths lie on them
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert "/dev/shm" in mounts
    for path in (options["--data"], options["--run"], options["--log-dir"]):
        assert f"/{path.split('/')[1]}" in mounts


class Cluster:
    """What the Job controller does with the container of deploy/kubernetes.yaml, with processes instead of pods."""

    def __init__(self, nodes: Nodes, manifest: dict[str, Any], words: dict[str, str]) -> None:
        self.nodes, self.job = nodes, manifest["Job"]["spec"]
        container = self.job["template"]["spec"]["containers"][0]
        self.environment = {entry["name"]: replaced(entry["value"], words) for entry in container["env"]}
        assert container["command"][0] == "torchrun"
        self.command = TORCHRUN + [replaced(word, words) for word in container["command"][1:]]
        self.failures = 0
        self.pods = {index: self.start(index) for index in range(self.job["completions"])}

    def start(self, index: int) -> "subprocess.Popen[bytes]":
        # a missing node is noticed after 3 s, not 15; on one machine the names do not tell who hosts the meeting
        own = {"JOB_COMPLETION_INDEX": str(index), "PET_RDZV_CONF": f"keep_alive_interval=1,is_host={int(index == 0)}"}
        return self.nodes.start(self.command, **{**self.environment, **own})

    def disrupt(self, index: int, number: signal.Signals) -> None:
        """Take a pod away, by a power cut or by preemption, and start its successor."""
        if number == signal.SIGKILL:
            kill_hard(self.pods[index])
        else:
            self.pods[index].send_signal(number)
            assert wait_for_end([self.pods[index]], self.nodes) != [0]
        self.pods[index] = self.start(index)

    def run_to_completion(self, timeout_s: float = 120) -> None:
        """Replace pods that fail until all have completed."""
        deadline = time.monotonic() + timeout_s
        while any(pod.poll() != 0 for pod in self.pods.values()):
            for index, pod in self.pods.items():
                if pod.poll() not in (None, 0):
                    self.failures += 1
                    self.pods[index] = self.start(index)
            assert self.failures <= self.job["backoffLimit"], self.nodes.logs()
            assert time.monotonic() < deadline, self.nodes.logs()
            time.sleep(0.05)


def replaced(word: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        word = word.replace(old, new)
    return word


@pytest.mark.parametrize(
    ("index", "number", "n_failures"),
    [
        (1, signal.SIGKILL, 0),  # the agent that remains takes the new pod in
        pytest.param(1, signal.SIGTERM, 0, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGKILL, 1, marks=pytest.mark.slow),  # the meeting place is gone: the other fails too
        pytest.param(0, signal.SIGTERM, 1, marks=pytest.mark.slow),
    ],
)
def test_a_lost_pod_is_replaced_and_no_bit_changes(
    nodes: Nodes,
    port: int,
    reference: dict[str, str],
    manifest: dict[str, Any],
    index: int,
    number: signal.Signals,
    n_failures: int,
) -> None:
    words = {
        "regpt2-0.regpt2:29400": f"127.0.0.1:{port}",
        "--nproc-per-node=8": "--nproc-per-node=1",
        "/data/fineweb_edu": str(nodes.data),
        "/runs/gpt2_124m": str(nodes.run),
        "gpt2_124m": str(nodes.recipe),
    }
    cluster = Cluster(nodes, manifest, words)
    wait_for_step(30, nodes)
    cluster.disrupt(index, number)
    if number == signal.SIGTERM:
        check_one_stop(nodes.run)
    cluster.run_to_completion()
    assert cluster.failures <= n_failures, nodes.logs()
    assert final_state(nodes.run) == reference


@pytest.fixture
def namespaces() -> Iterator[list[tuple[str, str, str]]]:
    """Two network namespaces joined by a cable: (name, interface, address) of each."""
    names, ends = [f"regpt2-{os.getpid()}-{i}" for i in (0, 1)], [f"rg{os.getpid() % 100000}-{i}" for i in (0, 1)]
    addresses = ["10.77.0.1", "10.77.0.2"]
    commands = [f"link add {ends[0]} type veth peer name {ends[1]}"]
    for name, end, address in zip(names, ends, addresses, strict=True):
        commands += [f"netns add {name}", f"link set {end} netns {name}", f"-n {name} link set lo up"]
        commands += [f"-n {name} address add {address}/24 dev {end}", f"-n {name} link set {end} up"]
    try:
        for command in commands:
            try:
                subprocess.run(["ip", *command.split()], check=True, capture_output=True, timeout=10)
            except (OSError, subprocess.SubprocessError) as error:
                pytest.skip(f"no network namespaces here: {error}")
        yield list(zip(names, ends, addresses, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", ends[0]], check=False, capture_output=True)


@pytest.mark.slow
def test_two_nodes_with_addresses_of_their_own(
    nodes: Nodes, namespaces: list[tuple[str, str, str]], reference: dict[str, str]
) -> None:
    """Nothing goes over loopback: ranks that tell a wrong address do not find each other."""
    meeting = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
    meeting += ["--rdzv-backend=c10d", "--rdzv-id=two", "--rdzv-endpoint=10.77.0.1:29400"]
    train = ["-m", "regpt2", "--", "train", str(nodes.recipe), "--data", str(nodes.data), "--run", str(nodes.run)]

    def start(index: int) -> "subprocess.Popen[bytes]":
        name, interface, address = namespaces[index]
        # both see the host's name and not the other's: who is who has to be said
        own = {"PET_LOCAL_ADDR": address, "GLOO_SOCKET_IFNAME": interface, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        own["PET_RDZV_CONF"] = f"keep_alive_interval=1,is_host={int(index == 0)}"
        return nodes.start(["ip", "netns", "exec", name, *meeting, *train], **own)

    pair = [start(0), start(1)]
    wait_for_step(30, nodes)
    kill_hard(pair[1])
    pair[1] = start(1)
    assert wait_for_end(pair, nodes) == [0, 0], nodes.logs()
    assert final_state(nodes.run) == reference
