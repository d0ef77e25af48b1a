"""The files for containers and clouds are valid for their projects, and consistent with each other.

PTUNE_TEST_CLOUDS=1 adds the clouds' own parsers, which are too large to install for every run. tests/schemas/ has the
schemas with which two of them check keys and types.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import jsonschema
import pytest
import yaml
from kubeflow_trainer_api import models

from ptune_dist import __version__
from ptune_dist.cluster.launch import parse
from ptune_dist.cluster.topology import find_topology
from ptune_dist.cluster.torch_builds import BUILDS
from ptune_dist.config.load import load_config
from tests.processes import ROOT, process_env

LAUNCH = ROOT / "launch"
PROGRAMS = Path(sys.executable).parent  # where pip installs the linters
IMAGE = f"registry.example.com/ptune_dist:{__version__}"
SCRIPTS = [*LAUNCH.glob("*.sh"), *ROOT.glob("slurm/*.sbatch"), ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"]
DOCS = (ROOT / "docs" / "clouds.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")

TRAINJOB = yaml.safe_load((LAUNCH / "kubernetes" / "trainjob.yaml").read_text())
JOBSET = yaml.safe_load((LAUNCH / "kubernetes" / "jobset.yaml").read_text())
SKYPILOT = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
REPLICAS, SERVICE = yaml.safe_load_all((LAUNCH / "kubernetes" / "replicas.yaml").read_text())
SKYPILOT_REPLICAS = yaml.safe_load((LAUNCH / "skypilot_replicas.yaml").read_text())
AWS_BATCH = json.loads((LAUNCH / "aws_batch.json").read_text())
AZURE_ML = yaml.safe_load((LAUNCH / "azureml.yaml").read_text())

PATCH = TRAINJOB["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
TRAINJOB_POD = PATCH["template"]["spec"]["template"]["spec"]
JOB = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
JOBSET_POD = JOB["template"]["spec"]
REPLICAS_POD = REPLICAS["spec"]["template"]["spec"]
(AWS_NODES,) = AWS_BATCH["nodeProperties"]["nodeRangeProperties"]

COMMANDS = {
    "Dockerfile": json.loads(re.search(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)[1]),
    "trainjob.yaml": TRAINJOB["spec"]["trainer"]["command"],
    "jobset.yaml": JOBSET_POD["containers"][0]["command"],
    "replicas.yaml": REPLICAS_POD["containers"][0]["command"],
    "skypilot.yaml": shlex.split(SKYPILOT["run"]),
    "skypilot_replicas.yaml": shlex.split(SKYPILOT_REPLICAS["run"].splitlines()[-1].replace("$NODE", "0")),
    "aws_batch.json": AWS_NODES["container"]["command"],
    "azureml.yaml": shlex.split(AZURE_ML["command"].removeprefix("cd /opt/ptune_dist && ")),
}


def mounts(containers: list[dict]) -> dict[str, str]:
    """The volumes of the only container, by path."""
    (container,) = containers
    return {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}


# Schemas


@pytest.mark.parametrize(
    "content, kind",
    [
        (TRAINJOB, models.TrainerV1alpha1TrainJob),
        (JOBSET, models.JobsetV1alpha2JobSet),
        (REPLICAS, models.IoK8sApiBatchV1Job),
        (SERVICE, models.IoK8sApiCoreV1Service),
    ],
)
def test_kubernetes_knows_every_key_and_type(content: dict, kind: type):
    assert kind.from_dict(content).to_dict() == content  # unknown keys are dropped


@pytest.mark.parametrize(
    "content, schema",
    [
        (AWS_BATCH, "aws_batch_job_definition.json"),
        (SKYPILOT, "skypilot_task.json"),
        (SKYPILOT_REPLICAS, "skypilot_task.json"),
    ],
)
def test_the_cloud_knows_every_key_and_type(content: dict, schema: str):
    validator = jsonschema.Draft202012Validator(json.loads((ROOT / "tests" / "schemas" / schema).read_text()))
    assert not [error.message for error in validator.iter_errors(content)]
    assert list(validator.iter_errors(content | {"runn": "x"}))


PARSERS = {
    "skypilot==0.14.1": """
import sky
task = sky.Task.from_yaml("launch/skypilot.yaml")
(resources,) = task.resources
assert task.num_nodes == 2 and resources.use_spot and resources.job_recovery["recover_on_exit_codes"] == [75]
""",
    "azure-ai-ml==1.35.2": """
from azure.ai.ml import load_job
job = load_job("launch/azureml.yaml")
assert job.resources.instance_count == 2 and job.distribution.process_count_per_instance == 1
""",
    "botocore==1.44.5": """
import json
from botocore.loaders import Loader
from botocore.model import ServiceModel
from botocore.validate import ParamValidator
service = ServiceModel(Loader().load_service_model("batch", "service-2"))
shape = service.operation_model("RegisterJobDefinition").input_shape
found = ParamValidator().validate(json.load(open("launch/aws_batch.json")), shape)
assert not found.has_errors(), found.generate_report()
""",
}


@pytest.mark.long
@pytest.mark.skipif(not os.environ.get("PTUNE_TEST_CLOUDS"), reason="installs 0.6 GB: set PTUNE_TEST_CLOUDS=1")
@pytest.mark.parametrize("package", PARSERS)
def test_the_clouds_own_parser_accepts_the_file(package: str, tmp_path: Path):
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
    env = process_env({"HOME": str(tmp_path), "PYTHONPATH": ""})
    subprocess.run([python, "-c", PARSERS[package]], cwd=ROOT, env=env, check=True)


# Contents


@pytest.mark.parametrize("file", COMMANDS)
def test_the_launcher_accepts_every_command(file: str):
    script, *arguments = COMMANDS[file]
    assert script == "launch/run.sh" and os.access(ROOT / script, os.X_OK)
    parsed = parse(arguments)
    config = load_config(ROOT / parsed.config, parsed.overrides)
    shared = "${{outputs.runs}}" if file == "azureml.yaml" else "/runs"
    own = "-0" if file == "skypilot_replicas.yaml" else ""
    assert config.output_dir == f"{shared}/quickstart{own}"
    assert config.train.nodes == ("replicas" if "replicas" in file else "one_world")


def test_all_use_the_same_image():
    azure = AZURE_ML["environment"]["image"]
    pods = [pod["containers"][0]["image"] for pod in (JOBSET_POD, REPLICAS_POD)]
    assert {TRAINJOB["spec"]["trainer"]["image"], *pods, azure} == {IMAGE}
    assert AWS_NODES["container"]["image"] == IMAGE
    assert f"docker build --tag {IMAGE} ." in DOCKERFILE and f"docker build --tag {IMAGE} ." in DOCS


@pytest.mark.parametrize("pod", [TRAINJOB_POD, JOBSET_POD, REPLICAS_POD], ids=["trainjob", "jobset", "replicas"])
def test_a_pod_has_the_shared_volume_shared_memory_and_time_to_save(pod: dict):
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts(pod["containers"]) == {"/runs": "runs", "/dev/shm": "shm"}
    assert "persistentVolumeClaim" in volumes["runs"] and volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert pod["terminationGracePeriodSeconds"] >= 120


def test_the_trainjob_patches_the_runtimes_own_job_and_container():
    assert TRAINJOB["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    assert PATCH["name"] == TRAINJOB_POD["containers"][0]["name"] == "node"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_pods_of_the_jobset_find_each_other(rank: int):
    labels = {
        "jobset.sigs.k8s.io/jobset-name": JOBSET["metadata"]["name"],
        "jobset.sigs.k8s.io/replicatedjob-name": JOBSET["spec"]["replicatedJobs"][0]["name"],
        "jobset.sigs.k8s.io/restart-attempt": "3",
    }
    env = {"JOB_COMPLETION_INDEX": str(rank)}  # set by Kubernetes for an Indexed Job
    for entry in JOBSET_POD["containers"][0]["env"]:
        path = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        label = path.removeprefix("metadata.labels['").removesuffix("']")
        env[entry["name"]] = labels[label] if path else entry["value"]
    topology = find_topology(env)
    assert (topology.source, topology.node_rank, topology.num_restarts) == ("jobset", rank, 3)
    assert topology.head == "ptune-node-0-0.ptune"
    assert topology.num_nodes == JOB["completions"] == JOB["parallelism"] and JOB["completionMode"] == "Indexed"


@pytest.mark.parametrize(
    "message, action",
    [  # as Kubernetes writes them, pkg/controller/job/pod_failure_policy.go
        ("Container node for pod ptune/x failed with exit code 2 matching FailJob rule at index 0", "FailJobSet"),
        ("Container node for pod ptune/x failed with exit code 75 matching FailJob rule at index 0", "Restart"),
        ("Pod ptune/x has condition DisruptionTarget matching FailJob rule at index 1", "Restart"),
    ],
)
def test_only_a_mistake_fails_the_jobset_immediately(message: str, action: str):
    assert JOB["backoffLimit"] == 0 and JOBSET_POD["restartPolicy"] == "Never"
    statuses, condition = JOB["podFailurePolicy"]["rules"]
    assert statuses["onExitCodes"]["values"] == [2, 75]
    assert statuses["onExitCodes"]["containerName"] == JOBSET_POD["containers"][0]["name"]
    assert condition["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    rules = JOBSET["spec"]["failurePolicy"]["rules"]
    matching = [
        rule for rule in rules if any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"])
    ]
    assert len(matching) == 1 and matching[0]["action"].startswith(action)
    assert action == "FailJobSet" or matching[0]["action"].endswith("IgnoreMaxRestarts")


def test_a_pod_of_replicas_is_a_node_of_its_own_that_is_replaced_alone():
    spec = REPLICAS["spec"]
    assert spec["completions"] == spec["parallelism"] and spec["completionMode"] == "Indexed"
    assert spec["backoffLimitPerIndex"] > 0 and "backoffLimit" not in spec
    assert spec["successPolicy"]["rules"] == [{"succeededCount": 1}]
    mistake, stopped, disrupted = spec["podFailurePolicy"]["rules"]
    assert (mistake["action"], mistake["onExitCodes"]["values"]) == ("FailJob", [2])
    assert (stopped["action"], stopped["onExitCodes"]["values"]) == ("Ignore", [75])
    assert disrupted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    (container,) = REPLICAS_POD["containers"]
    assert {rule["onExitCodes"]["containerName"] for rule in (mistake, stopped)} == {container["name"]}
    env = {entry["name"]: entry.get("value", "1") for entry in container["env"]}
    topology = find_topology(env | {"JOB_COMPLETION_INDEX": "3"})
    assert (topology.num_nodes, topology.source) == (1, "one node")
    # Kubernetes names the pods of an Indexed Job by its own name, and gives them a domain by the service's.
    name = SERVICE["metadata"]["name"]
    assert REPLICAS["metadata"]["name"] == REPLICAS_POD["subdomain"] == name and SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["selector"] == spec["template"]["metadata"]["labels"]
    assert f'"{name}-0.{name}:29599"' in (LAUNCH / "kubernetes" / "replicas.yaml").read_text()


def test_a_replica_on_a_cloud_is_a_job_of_one_machine_with_the_ports_of_its_addresses():
    assert SKYPILOT_REPLICAS["num_nodes"] == 1 and SKYPILOT_REPLICAS["resources"]["use_spot"]
    text = (LAUNCH / "skypilot_replicas.yaml").read_text()
    assert set(map(int, re.findall(r"[\w.)]:(\d{5})\b", text))) == set(SKYPILOT_REPLICAS["resources"]["ports"])
    variables = [*SKYPILOT_REPLICAS["envs"], *SKYPILOT_REPLICAS["secrets"]]
    comment, _, _ = text.partition("name: ptune-replica")
    assert all(comment.count(f"{name}=") == 2 for name in variables)
    for key in ("setup", "file_mounts"):
        assert SKYPILOT_REPLICAS[key] == SKYPILOT[key]


@pytest.mark.parametrize(
    "seen, action",
    [
        ({"onExitCode": "2"}, "EXIT"),
        ({"onExitCode": "75"}, "RETRY"),
        ({"onStatusReason": "Host EC2 (instance i-0) terminated."}, "RETRY"),
        ({"onExitCode": "1", "onReason": "Essential container in task exited"}, "RETRY"),
    ],
)
def test_aws_batch_retries_everything_but_a_mistake(seen: dict[str, str], action: str):
    rules = AWS_BATCH["retryStrategy"]["evaluateOnExit"]
    seen = {"onReason": "x", **seen}
    first = next(
        rule for rule in rules if all(fnmatch(seen.get(key, ""), rule[key]) for key in rule if key != "action")
    )
    assert first["action"] == action
    assert len(rules) <= 5 and 1 <= AWS_BATCH["retryStrategy"]["attempts"] <= 10  # the service's limits


def test_aws_batch_mounts_the_volume_that_it_declares():
    container = AWS_NODES["container"]
    (volume,) = container["volumes"]
    (mount,) = container["mountPoints"]
    assert mount == {"sourceVolume": volume["name"], "containerPath": "/runs", "readOnly": False}
    assert {entry["type"] for entry in container["resourceRequirements"]} == {"VCPU", "MEMORY", "GPU"}
    assert AWS_BATCH["type"] == "multinode" and AWS_BATCH["nodeProperties"]["mainNode"] == 0


def test_skypilot_recovers_on_new_machines_with_a_mount_that_supports_appending():
    recovery = SKYPILOT["resources"]["job_recovery"]
    assert SKYPILOT["resources"]["use_spot"] and recovery["recover_on_exit_codes"] == [75]
    assert SKYPILOT["file_mounts"]["/runs"]["mode"] == "MOUNT_CACHED"
    assert "bash launch/setup.sh" in SKYPILOT["setup"] and SKYPILOT["workdir"] == "."


def test_azure_ml_starts_one_launcher_per_node_with_a_permanent_output():
    assert AZURE_ML["distribution"] == {"type": "pytorch", "process_count_per_instance": 1}
    output = AZURE_ML["outputs"]["runs"]
    assert output["mode"] == "rw_mount" and not re.search(r"\$\{\{|name", output["path"])
    assert f"cd {re.search(r'^WORKDIR (.*)$', DOCKERFILE, re.MULTILINE)[1]} &&" in AZURE_ML["command"]
    assert set(AZURE_ML) == {
        "$schema",
        "type",
        "display_name",
        "experiment_name",
        "environment",
        "compute",
        "command",
        "distribution",
        "resources",
        "outputs",
        "limits",
    }


@pytest.mark.parametrize("file", [name for name in COMMANDS if name != "Dockerfile"])
def test_the_docs_have_the_command_of_each_file(file: str):
    (path,) = LAUNCH.rglob(file)
    name = path.relative_to(ROOT).as_posix()
    commands = re.findall(rf"`([^`]*{re.escape(name)}[^`]*)`", DOCS)
    assert commands
    if path.suffix == ".yaml":  # JSON has no comments
        first_lines = " ".join(path.read_text().split("\n")[:2])
        assert any(command in first_lines for command in commands)


# The image


def test_the_dockerfile_passes_its_linter():
    done = subprocess.run([PROGRAMS / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_is_pinned_and_has_no_root_user_or_keys():
    *bases, last = re.findall(r"^FROM (\S+)(?: AS cuda-(\S+))?$", DOCKERFILE, re.MULTILINE)
    for base, cuda in bases:
        assert re.fullmatch(rf"nvidia/cuda:{re.escape(cuda)}\.\d+-base-ubuntu\d\d\.04", base)
    assert last == ("cuda-${PTUNE_CUDA}", "")
    assert re.findall(r"^USER (\d+)", DOCKERFILE, re.MULTILINE)[-1] != "0"
    assert not re.search(r"ssh-keygen|authorized_keys|openssh-server|^ADD |sudo", DOCKERFILE, re.MULTILINE)
    assert "bash launch/setup.sh\n" in DOCKERFILE
    assert "launch/constraints.txt" in (LAUNCH / "setup.sh").read_text()


def test_the_image_takes_the_builds_of_torch_that_setup_chooses():
    """One build argument selects the base image, the compiler and, in the environment of setup.sh, torch."""
    stages = re.findall(r"^FROM \S+ AS cuda-(\S+)$", DOCKERFILE, re.MULTILINE)
    assert sorted(stages) == sorted(build.cuda for build in BUILDS)
    default, inherited = re.findall(r"^ARG PTUNE_CUDA=?(.*)$", DOCKERFILE, re.MULTILINE)
    assert default == "13.0" and inherited == ""
    assert '"cuda-minimal-build-${PTUNE_CUDA%.*}-${PTUNE_CUDA#*.}"' in DOCKERFILE


def test_editing_the_code_does_not_repeat_the_install():
    """What is copied before the install is all that setup.sh and pip need, and .dockerignore does not exclude it."""
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    before, after = DOCKERFILE.split("bash launch/setup.sh\n")
    assert re.findall(r"^COPY (?:--\S+ )?(.*)$", after, re.MULTILINE) == [". ."]
    copied = [line.split()[:-1] for line in re.findall(r"^COPY (.*)$", before, re.MULTILINE)]
    copied = [name for names in copied for name in names]
    wanted = {"pyproject.toml", "launch/setup.sh", "launch/constraints.txt", "ptune_dist/__init__.py"}
    wanted.add("ptune_dist/cluster/torch_builds.py")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*wanted, project["readme"], *project["license-files"]} == set(copied)
    needed = [*copied, "launch/run.sh", "launch/site.sh", "configs/quickstart.yaml", "configs/tiny/causal/config.json"]
    for name in needed:
        parts = Path(name).parts
        assert not any(fnmatch("/".join(parts[: i + 1]), rule) for rule in ignored for i in range(len(parts))), name
    assert {".git", ".venv", "runs", "tests"} <= set(ignored)


# The scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_passes_its_linter(path: Path):
    subprocess.run(["bash", "-n", path], check=True)
    lint = [PROGRAMS / "shellcheck", "--shell=bash", "--severity=warning", "--external-sources", path]
    done = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
