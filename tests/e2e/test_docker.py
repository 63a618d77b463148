"""The images are built, compose.yaml is started as it is, and Label Studio inside it gets its predictions.

An engine that answers is used. Without one, a stand-in engine is started, and stopped again, where root and the script
for it are at hand. The images built here are removed at the end; DOCKER_TEST_KEEP=1 keeps them for a quick second run.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from anomaly_workers import sample
from anomaly_workers.client import Client
from anomaly_workers.instance import personal_token
from anomaly_workers.types import Connection

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT.parent / "shared" / "tools" / "stand_in_images.sh"
SERVICES = {"label-studio": 1, "redis": 1, "web": 1, "worker": 2}
IMAGES = 12
EMAIL = "inspector@example.com"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

CHECK = """
import sys
from anomaly_workers.client import Client
from anomaly_workers.demo import check_predictions
from anomaly_workers.settings import load_settings
from anomaly_workers.store import Store
store = Store(load_settings().data_dir).project(int(sys.argv[1]))
sys.exit("\\n".join(check_predictions(Client(store.connection()), store)) or 0)
"""


@dataclass(frozen=True)
class Compose:
    """compose.yaml on an engine, as a project of its own.

    Attributes:
        environ: what reaches the engine, and the values that .env would have.
        label_studio: Label Studio's address on this machine.
        front_end: the front end's.
        password: of Label Studio's first account.
        seconds: how long each step took.
    """

    environ: Mapping[str, str]
    label_studio: str
    front_end: str
    password: str
    seconds: dict[str, float] = field(default_factory=dict)

    def docker(self, *arguments: str, extra: Mapping[str, str] | None = None) -> str:
        """Run docker and return what it prints."""
        command, environ = ["docker", *arguments], {**self.environ, **(extra or {})}
        done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=1200)
        if done.returncode:
            pytest.fail(f"{' '.join(command)}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return done.stdout

    def __call__(self, *arguments: str) -> str:
        """Run docker compose."""
        return self.docker("compose", "-f", "docker/compose.yaml", *arguments)

    def build(self, service: str) -> None:
        """Build a service's image as compose.yaml says, with BuildKit even where Compose lacks its plugin for it."""
        told = json.loads(self("config", "--format", "json"))["services"][service]
        build = told["build"]
        stage = ["--target", build["target"]] if "target" in build else []
        given = [f"--build-arg={name}={value}" for name, value in build.get("args", {}).items() if value is not None]
        context = Path(build["context"])
        with self.timed(f"build {service}"):
            self.docker(
                *("build", "--file", str(context / build["dockerfile"]), "--tag", told["image"]),
                *(*stage, *given, str(context)),
            )

    def containers(self) -> list[dict[str, Any]]:
        """Return what `docker inspect` says of each container, stopped ones as well."""
        ids = self("ps", "--all", "--quiet").split()
        return list(json.loads(self.docker("inspect", *ids)))

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Note how long a step took."""
        started = time.monotonic()
        yield
        self.seconds[step] = round(time.monotonic() - started, 1)


@pytest.fixture(scope="module")
def engine() -> Iterator[dict[str, str]]:
    """The environment in which `docker` reaches an engine."""
    foreign = ("ANOMALY_", "LABEL_STUDIO_", "REDIS_", "COMPOSE_")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    if answers(plain):
        yield plain
        return
    if reason := obstacle():
        pytest.skip(f"no container engine answers, and the stand-in cannot run: {reason}")
    if answers(stand_in_environ(plain)):  # somebody else's: not ours to stop
        yield stand_in_environ(plain)
        return
    try:
        for step in ("prepare", "engine"):
            done = subprocess.run([STAND_IN, step], env=plain, capture_output=True, text=True, timeout=600)
            if done.returncode:
                pytest.skip(f"the stand-in engine does not start here ({step}): {done.stderr.strip()[-300:]}")
        yield stand_in_environ(plain)
    finally:
        if not os.environ.get("DOCKER_TEST_KEEP"):
            prune = ["docker", "builder", "prune", "--all", "--force"]
            subprocess.run(prune, env=stand_in_environ(plain), capture_output=True, timeout=120, check=False)
        subprocess.run([STAND_IN, "engine-stop"], env=plain, capture_output=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def compose(engine: dict[str, str]) -> Iterator[Compose]:
    """All services, built from this tree, started, healthy; two workers."""
    tag, password = f"test-{secrets.token_hex(3)}", secrets.token_hex(12)
    if keep := os.environ.get("DOCKER_TEST_KEEP"):
        tag = "test-kept"
    web, label_studio = free_port(), free_port()
    values = {
        "COMPOSE_PROJECT_NAME": f"label-studio-anomaly-{tag}",
        "IMAGE_TAG": tag,
        "LABEL_STUDIO_IMAGE": f"label-studio-anomaly-label-studio:{tag}",
        "LABEL_STUDIO_PASSWORD": password,
        "LABEL_STUDIO_PORT": str(label_studio),
        "LABEL_STUDIO_USERNAME": EMAIL,
        "REDIS_PASSWORD": secrets.token_hex(12),
        "WEB_PORT": str(web),
        "ANOMALY_SWEEP_SECONDS": "5",
        "ANOMALY_SETTLE_SECONDS": "2",
    }
    running = Compose(
        engine | values, f"http://localhost:{label_studio}", f"http://localhost:{web}", password, seconds={}
    )
    try:
        with ThreadPoolExecutor(2) as pool:  # the longest first
            list(pool.map(running.build, ["worker", "label-studio", "web"]))
        with running.timed("start until all are healthy"):
            running("up", "--detach", "--no-build", "--wait", "--wait-timeout", "600", "--scale", "worker=2")
        yield running
    finally:
        keep_evidence(running, tag)
        running("down", "--volumes", "--timeout", "20")
        if not keep:
            images = running.docker("images", "--quiet", "--filter", f"reference=label-studio-anomaly-*:{tag}*").split()
            running.docker("image", "rm", "--force", *sorted(set(images)))


@pytest.fixture(scope="module")
def token(compose: Compose) -> str:
    """A personal access token of the first account."""
    return personal_token(compose.label_studio, EMAIL, compose.password)


def test_all_services_run_and_are_healthy(compose: Compose) -> None:
    found = [box["Config"]["Labels"]["com.docker.compose.service"] for box in compose.containers()]
    assert {name: found.count(name) for name in found} == SERVICES
    assert {box["State"].get("Health", {}).get("Status") for box in compose.containers()} == {"healthy"}


def test_the_front_end_answers_on_this_machine(compose: Compose) -> None:
    assert httpx.get(f"{compose.front_end}/health", timeout=5).status_code == 200


def test_only_label_studio_and_the_front_end_are_published_and_only_on_loopback(compose: Compose) -> None:
    published = {
        (box["Config"]["Labels"]["com.docker.compose.service"], binding["HostIp"])
        for box in compose.containers()
        for bindings in box["NetworkSettings"]["Ports"].values()
        for binding in bindings or ()
    }
    assert published == {("label-studio", "127.0.0.1"), ("web", "127.0.0.1")}


def test_the_front_end_has_no_torch_and_the_worker_has(compose: Compose) -> None:
    look = "import importlib.util, sys; sys.stdout.write(str(importlib.util.find_spec('torch') is not None))"
    assert compose("exec", "-T", "web", "python", "-c", look) == "False"
    assert compose("exec", "-T", "worker", "python", "-c", look) == "True"


def test_the_gpu_variant_is_valid_and_never_takes_the_cpu_wheels(compose: Compose) -> None:
    files = ("-f", "docker/compose.yaml", "-f", "docker/compose.cuda.yaml")
    told = compose.docker("compose", *files, "config", "--format", "json", extra={"TORCH_INDEX_URL": "http://cpu"})
    worker = json.loads(told)["services"]["worker"]
    assert worker["build"]["args"]["DEVICE"] == "cuda"
    assert not worker["build"]["args"]["TORCH_INDEX_URL"]
    assert worker["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


@pytest.mark.parametrize("service", ["label-studio", "web", "worker"])
def test_no_service_of_ours_runs_as_root(compose: Compose, service: str) -> None:
    assert int(compose("exec", "-T", service, "id", "-u")) != 0


def test_label_studio_reaches_the_front_end_and_nothing_else_private(compose: Compose) -> None:
    code = (
        "import os, socket, sys; os.environ['DJANGO_SETTINGS_MODULE'] = 'core.settings.label_studio'\n"
        "import label_studio; sys.path.insert(0, label_studio.__path__[0])\n"
        "import django; django.setup()\n"
        "from core.utils.io import validate_url_for_ssrf\n"
        "for url in sys.argv[1:]:\n"
        "    try: validate_url_for_ssrf(url)\n"
        "    except Exception as error: sys.stdout.write(type(error).__name__ + ' ')\n"
        "    else: sys.stdout.write('open ')\n"
    )
    urls = [
        f"http://{host}:9090" for host in ("web.internal", "192.168.251.1", "localhost", "169.254.169.254", "10.0.0.1")
    ]
    answers = compose("exec", "-T", "label-studio", "python", "-c", code, *urls).split()
    assert answers[-5:] == ["open", *["SsrfBlockedUrlError"] * 4]


def test_every_open_task_gets_exactly_one_prediction_of_the_deployed_version(
    compose: Compose, token: str, tmp_path: Path
) -> None:
    # given a project connected from inside, as README.md says
    inside = ("exec", "-T", "web", "ls-anomaly", "connect", "--url", "http://label-studio:8080", "--token", token)
    compose(*inside, "--create", "Washers")
    with Client(Connection(url=compose.label_studio, project=0, token=token)) as client:
        project = max(found.id for found in client.projects())
        # when images arrive
        files = sorted(sample.write(tmp_path).rglob("*.jpg"))[:IMAGES]
        with compose.timed(f"{IMAGES} images from upload to predictions"):
            addresses = client.upload(project, [(file.name, file.read_bytes()) for file in files])
            client.import_tasks(project, [{"data": {"image": address}} for address in addresses])
            deployed = wait_for_predictions(client, project)
        # then each has one prediction, as Label Studio and the product's own check see it
        assert list(shown(client, project).values()) == [[deployed]] * IMAGES
    compose("exec", "-T", "worker", "python", "-c", CHECK, str(project))


def wait_for_predictions(client: Client, project: int, *, patience: float = 400) -> str:
    """Return the deployed version once every task shows it."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        deployed, found = client.project(project).model_version, shown(client, project)
        if deployed and len(found) == IMAGES and all(deployed in versions for versions in found.values()):
            return deployed
        time.sleep(2)
    pytest.fail(f"after {patience:.0f} s Label Studio shows {shown(client, project)}")


def shown(client: Client, project: int) -> dict[int, list[str]]:
    """Return the version of each prediction that Label Studio has, by task."""
    return {task: [str(one["model_version"]) for one in found] for task, found in client.predictions(project).items()}


def keep_evidence(compose: Compose, tag: str) -> None:
    """Leave logs, durations and sizes where CI collects them."""
    folder = ROOT / "artifacts"
    folder.mkdir(exist_ok=True)
    (folder / "docker-logs.txt").write_text(compose("logs", "--no-color", "--timestamps"))
    listed = compose.docker("images", "--format", "{{.Repository}} {{.Size}}", "--filter", "dangling=false")
    sizes = dict(line.split() for line in listed.splitlines() if line.startswith("label-studio-anomaly-"))
    (folder / "docker.json").write_text(json.dumps({"seconds": compose.seconds, "sizes": sizes}, indent=2) + "\n")


def answers(environ: Mapping[str, str]) -> bool:
    """Whether an engine answers and docker has its compose command."""
    if shutil.which("docker", path=environ.get("PATH")) is None:
        return False
    return all(
        subprocess.run(["docker", *question], env=dict(environ), capture_output=True, check=False).returncode == 0
        for question in (["info"], ["compose", "version"])
    )


def obstacle() -> str:
    """Why the stand-in engine cannot be started here; empty if it can be tried."""
    if sys.platform != "linux":
        return f"it needs Linux, this is {sys.platform}"
    if not STAND_IN.is_file():
        return f"there is no {STAND_IN.name} beside this repository"
    if os.geteuid() != 0:
        return "it needs root"
    return ""


def stand_in_environ(plain: Mapping[str, str]) -> dict[str, str]:
    """The environment after evaluating what the stand-in script prints."""
    script = 'eval "$("$0" env)"; env -0'
    done = subprocess.run(["bash", "-c", script, STAND_IN], env=dict(plain), capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.split("\0") if "=" in line)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
