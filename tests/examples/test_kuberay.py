"""The manifest: its fields against the part of KubeRay's specification that it uses, its words against the library."""

from __future__ import annotations

import copy
import importlib.metadata
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import pytest
import yaml

from rlhf_ray import cli
from rlhf_ray.config.settings import Settings

EXAMPLES = Path(__file__).parents[2] / "examples"
SCHEMA = yaml.safe_load(Path(__file__).with_name("rayjob_schema.yaml").read_text())


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((EXAMPLES / "kuberay_rayjob.yaml").read_text()))


@pytest.fixture
def rayjob(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (job,) = [document for document in documents if document["kind"] == "RayJob"]
    return copy.deepcopy(job)


def groups(rayjob: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = rayjob["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def containers(rayjob: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in groups(rayjob):
        yield from group["template"]["spec"]["containers"]


def settings_of(rayjob: dict[str, Any]) -> Settings:
    """What the entrypoint trains with, from the example that the claim is to hold."""
    program, command, conf, *overrides = shlex.split(rayjob["spec"]["entrypoint"])
    assert (program, command) == ("rlhf-ray", "train")
    config = cli.load_config(str(EXAMPLES / PurePosixPath(conf).name), overrides)
    config.copy().model(path="a/hub-id").validate()  # The folder is on the claim.
    return config.settings


def test_the_manifest_has_only_fields_that_exist(rayjob: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(rayjob, SCHEMA, jsonschema.Draft202012Validator)


def misspelled(job: dict[str, Any]) -> None:
    job["spec"]["ttlSecondsAfterFinish"] = 1


def unknown_mode(job: dict[str, Any]) -> None:
    job["spec"]["submissionMode"] = "KubernetesJobMode"


def number_for_text(job: dict[str, Any]) -> None:
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def headless(job: dict[str, Any]) -> None:
    del job["spec"]["rayClusterSpec"]["headGroupSpec"]


def volume_of_two_kinds(job: dict[str, Any]) -> None:
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"][0]["emptyDir"] = {}


@pytest.mark.parametrize("spoil", [misspelled, unknown_mode, number_for_text, headless, volume_of_two_kinds])
def test_the_schema_finds_mistakes(spoil: Callable[[dict[str, Any]], None], rayjob: dict[str, Any]) -> None:
    spoil(rayjob)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(rayjob, SCHEMA, jsonschema.Draft202012Validator)


def test_the_gpus_are_enough_for_the_run(rayjob: dict[str, Any]) -> None:
    settings = settings_of(rayjob)
    needed = settings.rollouts.num_replicas * settings.rollouts.tensor_parallel_size + settings.learners.num_learners
    gpus = 0
    for group in rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        gpus += group["replicas"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == needed == 8


def test_a_job_that_failed_goes_on(rayjob: dict[str, Any]) -> None:
    settings = settings_of(rayjob)
    assert rayjob["spec"]["backoffLimit"] > 0
    assert settings.checkpointing.resume == "same"
    assert 0 < settings.checkpointing.interval <= settings.training.iterations / 10


def test_every_pod_sees_the_run_and_what_it_reads(documents: list[dict[str, Any]], rayjob: dict[str, Any]) -> None:
    (claim,) = [document for document in documents if document["kind"] == "PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    settings = settings_of(rayjob)
    conf = shlex.split(rayjob["spec"]["entrypoint"])[2]
    for group in groups(rayjob):
        pod = group["template"]["spec"]
        (shared,) = [volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        (source,) = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if volume["name"] == shared]
        assert source["claimName"] == claim["metadata"]["name"]
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
        for path in (conf, settings.reporting.run_dir, settings.model.path, settings.data.path):
            assert PurePosixPath(str(path)).is_relative_to(mounts[shared])


def test_the_cluster_ends_with_the_job_and_the_job_has_time_to_end(rayjob: dict[str, Any]) -> None:
    spec = rayjob["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    stop_wait_s = int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    assert stop_wait_s >= 60
    for group in groups(rayjob):
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > stop_wait_s


def test_ray_is_the_one_that_the_library_needs_on_every_node(rayjob: dict[str, Any]) -> None:
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == importlib.metadata.version("ray")
    assert len({container["image"] for container in containers(rayjob)}) == 1
