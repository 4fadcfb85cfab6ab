"""`deploy/kubernetes`: that Kubernetes takes it, that its parts fit, and that it says what the units say.

Here: the files. Not here: the chart itself, which only Helm can render, or the same on hosts
(`test_several_hosts.py`, `test_deployment.py`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from dagster_shared.yaml_utils import load_yaml_from_path
from kubernetes_validate.utils import resources_from_file

from muse_assets_tests.systemd_units import read_environment, read_unit

DEPLOY_FILES = Path(__file__).parent.parent / "deploy"
FILES = DEPLOY_FILES / "kubernetes"
CHART_PARTS = ("dagsterWebserver", "dagsterDaemon")


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, Any]]:
    """kind/name -> manifest of code.yaml."""
    found = resources_from_file(str(FILES / "code.yaml"))
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in found}


@pytest.fixture(scope="module")
def code_pod(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    pod: dict[str, Any] = manifests["Deployment/muse-code"]["spec"]["template"]["spec"]
    return pod


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    found = load_yaml_from_path(str(FILES / "values.yaml"))
    assert isinstance(found, dict)
    return found


def pod_of(part: dict[str, Any]) -> dict[str, Any]:
    """What the chart makes of a part's values, as far as they say."""
    container = {
        "name": "dagster",
        "image": f"{part['image']['repository']}:{part['image']['tag']}",
        "imagePullPolicy": part["image"]["pullPolicy"],
        "envFrom": [{"secretRef": secret} for secret in part["envSecrets"]],
        **{key: part[key] for key in ("volumeMounts", "securityContext", "resources")},
        **({"readinessProbe": part["readinessProbe"]} if "readinessProbe" in part else {}),
    }
    return {
        "containers": [container],
        "volumes": part["volumes"],
        "securityContext": part["podSecurityContext"],
    }


def validate(manifest: dict[str, Any]) -> None:
    """Raises for a field that this kind has not, or of another type."""
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_kubernetes_knows_every_field(manifests: dict[str, dict[str, Any]], values: dict[str, Any]) -> None:
    assert len(manifests) == 6
    for manifest in manifests.values():
        validate(manifest)
    for part in CHART_PARTS:
        spec = pod_of(values[part])
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        validate(pod)
        spec["volume"] = spec.pop("volumes")
        with pytest.raises(kubernetes_validate.ValidationError):
            validate(pod)


def test_the_pages_ask_the_service_under_the_location_s_name(
    manifests: dict[str, dict[str, Any]], code_pod: dict[str, Any], values: dict[str, Any]
) -> None:
    service = manifests["Service/muse-code"]
    (container,) = code_pod["containers"]
    (port,) = service["spec"]["ports"]
    workspace = load_yaml_from_path(str(DEPLOY_FILES / "workspace.yaml"))
    assert isinstance(workspace, dict)
    (entry,) = workspace["load_from"]
    assert values["dagsterWebserver"]["workspace"] == {
        "enabled": True,
        "servers": [
            {
                "host": service["metadata"]["name"],
                "port": port["port"],
                "name": entry["grpc_server"]["location_name"],
            }
        ],
    }
    assert [one["name"] for one in container["ports"]] == [port["targetPort"]]
    labels = manifests["Deployment/muse-code"]["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


def test_the_code_location_is_started_and_stopped_as_the_unit_is(
    manifests: dict[str, dict[str, Any]], code_pod: dict[str, Any]
) -> None:
    unit = read_unit(DEPLOY_FILES / "systemd", "muse-dagster-code.service")
    command = " ".join(code_pod["containers"][0]["command"])
    assert command.replace("--host 0.0.0.0 --port 4266", "--socket /run/muse/code.sock") == unit.value(
        "ExecStart"
    ).replace("/opt/muse/venv/bin/", "")
    assert code_pod["terminationGracePeriodSeconds"] == int(unit.value("TimeoutStopSec"))
    assert manifests["Deployment/muse-code"]["spec"]["strategy"] == {"type": "Recreate"}


def test_every_process_finds_the_instance_and_writes_only_where_it_may(
    code_pod: dict[str, Any], values: dict[str, Any]
) -> None:
    instance = read_environment(DEPLOY_FILES / "instance.env.example")
    stores = read_environment(DEPLOY_FILES / "muse.env.example")
    dagster = load_yaml_from_path(str(DEPLOY_FILES / "dagster.yaml"))
    assert isinstance(dagster, dict)
    assert dagster["compute_logs"]["config"]["base_dir"].startswith(f"{instance['DAGSTER_HOME']}/")
    pods = {"code": code_pod} | {part: pod_of(values[part]) for part in CHART_PARTS}
    for name, pod in pods.items():
        (container,) = pod["containers"]
        mounted = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in mounted.values()} == set(volumes), name

        settings = mounted[f"{instance['DAGSTER_HOME']}/dagster.yaml"]
        assert settings["subPath"] == "dagster.yaml"
        assert volumes[settings["name"]]["configMap"] == {"name": "muse-instance"}
        assert container["securityContext"]["readOnlyRootFilesystem"]
        written = [instance["DAGSTER_HOME"], "/tmp"]  # noqa: S108
        if name == "code":
            written += [stores[f"MUSE_{one}_DIR"] for one in ("WORK", "SERVER", "LOG")]
        assert set(mounted) == {*written, f"{instance['DAGSTER_HOME']}/dagster.yaml"}, name


def test_all_run_the_image_as_its_user_and_one_has_the_stores_secrets(
    code_pod: dict[str, Any], values: dict[str, Any]
) -> None:
    pods = {"code": code_pod} | {part: pod_of(values[part]) for part in CHART_PARTS}
    uid = re.search(r"--uid (\d+)", (DEPLOY_FILES / "Dockerfile").read_text("utf-8"))
    assert uid
    images = set()
    for name, pod in pods.items():
        (container,) = pod["containers"]
        images.add(container["image"])
        user = pod["securityContext"]
        assert user["runAsNonRoot"] and user["runAsUser"] == user["fsGroup"] == int(uid[1])
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert {"requests", "limits"} == set(container["resources"])
        secrets = [one["secretRef"]["name"] for one in container["envFrom"]]
        assert secrets == ["muse-instance", *(["muse-stores"] if name == "code" else [])]
        assert "env" not in container  # secrets come from Secrets
    assert len(images) == 1


def test_only_who_must_reaches_a_port_without_a_login(
    manifests: dict[str, dict[str, Any]], values: dict[str, Any]
) -> None:
    labels = manifests["Deployment/muse-code"]["spec"]["template"]["metadata"]["labels"]
    code, pages = (manifests[f"NetworkPolicy/muse-{name}"]["spec"] for name in ("code", "pages"))
    assert code["podSelector"] == {"matchLabels": labels}
    (rule,) = code["ingress"]
    assert rule["ports"] == [{"port": manifests["Service/muse-code"]["spec"]["ports"][0]["port"]}]
    (who,) = rule["from"]
    (expression,) = who["podSelector"]["matchExpressions"]
    # Twin included; `component` is the label that the chart gives its pods.
    assert expression["values"] == ["dagster-webserver", "dagster-webserver-read-only", "dagster-daemon"]
    assert pages["podSelector"]["matchExpressions"][0]["values"] == expression["values"][:2]
    (rule,) = pages["ingress"]
    assert rule["ports"] == [{"port": values["dagsterWebserver"]["service"]["port"]}]
    assert values["dagsterWebserver"]["readinessProbe"]["httpGet"]["port"] == rule["ports"][0]["port"]
