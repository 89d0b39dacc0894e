"""docs/production.md's figures, and the files that it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import glm4export
from glm4export import cli
from glm4export.build.options import BuildOptions
from glm4export.commands import serve as serve_command
from glm4export.inspection.estimate import cache_bytes_per_token, weight_bytes
from glm4runtime.contract import UserError
from glm4serve import create_app
from tests.helpers.fake_engine import FakeEngine
from tools.geometries import GEOMETRIES

ROOT = Path(glm4export.__file__).parents[1]
DEPLOY = ROOT / "tools" / "deploy"
GIB = 2**30
PAGE = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


def paths() -> set[str]:
    app = create_app({"m": FakeEngine()})  # type: ignore[dict-item]
    return set(app.openapi()["paths"])


def test_the_capacity_table() -> None:
    rows = re.findall(r"^\| GLM-4-(\w+) (\w+), (\w+) \| (.+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 6
    for size, precision, target, shown in rows:
        config, options = GEOMETRIES[f"glm-4-{size.lower()}"], BuildOptions(precision, target)
        weights, token = weight_bytes(config, options), cache_bytes_per_token(config, options.cache_dtype)
        slots = [max(0, int((0.9 * memory * GIB - weights - GIB) // (8192 * token))) for memory in (32, 64, 80)]
        expected = [f"{weights / GIB:.1f} GiB", f"{token // 1024} KiB", *map(str, slots), str(GIB // token)]
        assert shown.split(" | ") == expected, (size, precision, target)


def test_the_rate_that_is_worked_out() -> None:
    seconds = 200 / (12 * 2.5) + (1 - 0.5) * 500 / 70
    assert f"= {seconds:.1f} s of the machine each: {round(3600 / seconds, -1):.0f} an hour" in PAGE


def test_the_metrics_that_alerts_are_on_exist() -> None:
    app = create_app({"m": FakeEngine()})  # type: ignore[dict-item]
    text = app.state.service.metrics.text().decode()
    named = set(re.findall(r"glm4:\w+", PAGE))
    named |= {f"glm4:{name}" for name in re.findall(r"`(\w+_(?:queue|decode)_time_seconds)`", PAGE)}
    assert len(named) >= 8
    for name in named:
        assert f"# TYPE {name.removesuffix('_total')}" in text or f"# TYPE {name}" in text, name


def test_kubernetes_objects_have_what_they_need(objects: dict[str, Any]) -> None:
    versions = {kind: document["apiVersion"] for kind, document in objects.items()}
    assert versions == {
        "Secret": "v1",
        "PersistentVolumeClaim": "v1",
        "Deployment": "apps/v1",
        "Service": "v1",
        "PodDisruptionBudget": "policy/v1",
    }
    assert all(re.fullmatch(r"[a-z0-9-]+", document["metadata"]["name"]) for document in objects.values())
    spec = objects["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    for selector in (
        spec["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] and container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    names = {volume.get("secret", {}).get("secretName") for volume in pod["volumes"]} | {
        volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]
    }
    assert {objects[kind]["metadata"]["name"] for kind in ("Secret", "PersistentVolumeClaim")} <= names
    (port,), (outside,) = container["ports"], objects["Service"]["spec"]["ports"]
    assert outside["targetPort"] == port["name"] and f"--port={port['containerPort']}" in container["command"]


def test_the_pod_is_admitted_where_rights_are_restricted(objects: dict[str, Any]) -> None:
    """The Pod Security Standard's rules, https://kubernetes.io/docs/concepts/security/pod-security-standards."""
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
    assert {kind for volume in pod["volumes"] for kind in volume.keys() - {"name"}} <= allowed
    assert pod["automountServiceAccountToken"] is False
    user = re.search(r"useradd --uid (\d+)", (DEPLOY / "Containerfile").read_text(encoding="utf-8"))
    assert user is not None and pod["securityContext"]["runAsUser"] == int(user[1])


def test_what_an_operator_would_be_woken_for(objects: dict[str, Any]) -> None:
    """A claim for a bundle, pods on several machines, an image of a version, no scraping without a key."""
    template = objects["Deployment"]["spec"]["template"]
    assert objects["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    (spread,) = template["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == template["metadata"]["labels"]
    assert spread["topologyKey"] == "kubernetes.io/hostname" and spread["whenUnsatisfiable"] == "ScheduleAnyway"
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None and template["spec"]["containers"][0]["image"].endswith(f":{version[1]}")
    assert "annotations" not in template["metadata"]


def test_probes_ask_for_what_there_is(objects: dict[str, Any]) -> None:
    (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    probes = {name: container[name]["httpGet"] for name in container if name.endswith("Probe")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startupProbe": "/health",
        "livenessProbe": "/health",
        "readinessProbe": "/ready",
    }
    assert {probe["path"] for probe in probes.values()} <= paths()
    assert all(probe["port"] == container["ports"][0]["name"] for probe in probes.values())


def test_the_pods_command_line(objects: dict[str, Any], tmp_path: Path) -> None:
    """It is one, and fits into the pod: drained before it is killed, and no larger than its memory."""
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    _, _, *argv = [*container["command"], *container["args"]]
    arguments = cli._parser(["serve"]).parse_args(["serve", *argv])
    keys = tmp_path / "keys"
    text, key = objects["Secret"]["stringData"]["keys"], "f7a1" * 12
    keys.write_text(text, encoding="utf-8")
    arguments.keys = keys
    with pytest.raises(UserError, match=r"number 1 \(example\) has 7 characters"):  # it's public
        serve_command._settings(arguments)
    keys.write_text(text.replace(" REPLACE", f" {key}"), encoding="utf-8")
    assert serve_command._settings(arguments).keys.owner(key) == "example"
    waits = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert waits + arguments.drain + 5 < pod["terminationGracePeriodSeconds"]
    config, options = GEOMETRIES["glm-4-9b"], BuildOptions("int4", "cpu")
    taken = weight_bytes(config, options) + (arguments.prefix_cache_mb << 20) + GIB
    taken += arguments.slots * arguments.max_seq_len * cache_bytes_per_token(config, options.cache_dtype)
    assert taken < int(container["resources"]["limits"]["memory"].removesuffix("Gi")) * GIB


def test_the_container_starts_what_exists() -> None:
    lines = (DEPLOY / "Containerfile").read_text(encoding="utf-8").splitlines()
    entry, options = (next(line for line in lines if line.startswith(word)) for word in ("ENTRYPOINT", "CMD"))
    argv = [*yaml.safe_load(entry.removeprefix("ENTRYPOINT")), *yaml.safe_load(options.removeprefix("CMD"))]
    arguments = cli._parser(argv[1:2]).parse_args(argv[1:])
    assert arguments.no_key and arguments.port == 8000 and arguments.bundle == Path("/bundle")
    for line in lines:
        if line.startswith("COPY"):
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line


def test_the_builder_is_sent_what_is_copied_and_no_more() -> None:
    """A checkout has environments and bundles of gigabytes."""
    copied = [
        name
        for line in (DEPLOY / "Containerfile").read_text(encoding="utf-8").splitlines()
        if line.startswith("COPY")
        for name in line.split()[1:-1]
    ]
    rules = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    assert rules[0] == "*" and sorted(f"!{name}" for name in copied) == sorted(rule for rule in rules if rule[0] == "!")


@pytest.mark.parametrize("text", [PAGE, (DEPLOY / "Containerfile").read_text(encoding="utf-8")])
def test_containers_without_keys_are_for_this_machine_and_have_time_to_drain(text: str) -> None:
    (command,) = re.findall(r"podman run .*", text)
    assert "-p 127.0.0.1:8000:8000" in command
    given = re.search(r"--stop-timeout (\d+)", command)
    assert given is not None and int(given[1]) >= cli._parser(["serve"]).parse_args(["serve", "b"]).drain + 10
