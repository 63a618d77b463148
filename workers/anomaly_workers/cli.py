"""The command `ls-anomaly`."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from anomaly_workers import doctor as checks
from anomaly_workers import enrol, operating, policy, queues, server, stack, sweep, tabs, tune
from anomaly_workers.active import strategies
from anomaly_workers.active.strategies import STRATEGIES
from anomaly_workers.client import Client
from anomaly_workers.connect import Plan
from anomaly_workers.errors import AnomalyError, ConfigError
from anomaly_workers.labelstudio import config
from anomaly_workers.pages import report as pages
from anomaly_workers.queues import Queues
from anomaly_workers.settings import Settings, load_settings, public_url, to_environ
from anomaly_workers.store import ProjectStore, Store
from anomaly_workers.supervisor import Supervisor
from anomaly_workers.types import Connection
from anomaly_workers.versions import compare

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Anomaly detection inside Label Studio: every image arrives with a score, a heatmap and a correctable mask.",
    epilog="Settings come from ANOMALY_* variables; the README lists them. Start with: ls-anomaly up",
)
console = Console()
errors = Console(stderr=True)

ProjectOption = Annotated[int, typer.Option("--project", "-p", help="Label Studio project id.")]
MaybeProject = Annotated[int | None, typer.Option("--project", "-p", help="Only this project.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Run the command; a user's mistake is one line, not a traceback."""
    try:
        app()
    except AnomalyError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from error


# -- running


@app.command()
def up(
    port: Annotated[int | None, typer.Option(help="Port of the front end.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; default one per GPU, or one.")] = None,
) -> None:
    """Start everything on this machine: Redis, the front end and the workers. Ctrl-C stops all of it."""
    settings = _settings(port=port, workers=workers)
    running = stack.Stack(settings)
    with _until_signal() as stop:
        try:
            with console.status("starting Redis, front end and workers"):
                running.start()
            console.print(f"[bold green]up[/] at {public_url(settings)}   data in {settings.data_dir}   Ctrl-C stops")
            console.print(
                "next: [bold]ls-anomaly connect --url http://localhost:8080 --token … --create 'My project'[/]"
            )
            running.wait(stop)
        finally:
            with console.status("stopping"):
                running.stop()


@app.command()
def serve(port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None) -> None:
    """Run the front end alone: what Label Studio talks to. Needs no torch."""
    settings = _settings(port=port)
    command = stack.front_command(settings)
    os.execve(command[0], command, os.environ | to_environ(settings))


@app.command()
def worker(
    workers: Annotated[int | None, typer.Option(help="Processes; default one per GPU, or one.")] = None,
) -> None:
    """Run workers: one warm process per GPU, restarted when it dies, and the sweep."""
    stack.require("torch", extra="workers")
    settings = _settings(workers=workers)
    supervisor = Supervisor(settings, server.ensure(settings), workers=settings.workers)
    with _until_signal() as stop:
        supervisor.start()
        try:
            stop.wait()
        finally:
            supervisor.stop()


# -- connecting


@app.command()
def connect(
    url: Annotated[str, typer.Option(help="Label Studio's address, e.g. http://localhost:8080.")] = "",
    token: Annotated[str, typer.Option(help="Personal access token (Account & Settings).", show_default=False)] = "",
    project: Annotated[int | None, typer.Option("--project", "-p", help="Connect this project.")] = None,
    create: Annotated[str, typer.Option(help="Create a project with this title.")] = "",
    heatmap: Annotated[bool, typer.Option(help="Show the heatmap beside the image.")] = True,
    annotators: Annotated[
        int | None, typer.Option(help="People who review at once; each gets a tab, no two the same task.")
    ] = None,
    add: Annotated[
        str, typer.Option(help="Add to an existing label config what it lacks of: verdict,mask,score.")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before changing a label config.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")] = False,
) -> None:
    """Connect a Label Studio project. Safe to run again: what is right stays as it is."""
    settings = _settings()
    url = (url or settings.label_studio_url).rstrip("/")
    token = token or settings.label_studio_token.get_secret_value()
    if not url or not token:
        raise ConfigError("Say where Label Studio is: --url and --token (or ANOMALY_LABEL_STUDIO_URL and _TOKEN).")
    if (project is None) == (not create):
        raise ConfigError("Give either --project ID or --create TITLE.")
    wanted = tuple(part.strip() for part in add.split(",") if part.strip())
    plan = enrol.plan(settings, url, token, project=project, create=create, heatmap=heatmap, add=wanted)
    _print_plan(plan, everything=dry_run)
    if dry_run:
        return
    if plan.replaces_config and not yes and sys.stdin.isatty():
        typer.confirm(f"Change the label config of project {plan.project} so?", abort=True)
    report = enrol.enrol(
        settings, url, token, project=project, create=create, heatmap=heatmap, annotators=annotators, add=wanted
    )
    for change in report.changes or ("nothing to change",):
        console.print(f"  {change}", markup=False, highlight=False)
    console.print(
        f"[bold green]connected[/] project {report.project} '{escape(report.title)}': {escape(report.address)}",
        soft_wrap=True,
    )
    console.print(enrol.page_hint(settings, report.project), soft_wrap=True, highlight=False)


@app.command()
def queue(
    project: ProjectOption,
    strategy: Annotated[str, typer.Option(help=f"Order of review: {', '.join(STRATEGIES)}.")] = "",
    annotators: Annotated[
        int | None, typer.Option(help="People who review at once; each gets a tab, no two the same task.")
    ] = None,
) -> None:
    """Print the links of the review queues and what comes first; choose the order and the number of reviewers."""
    store = Store(_settings().data_dir).project(project)
    with Client(store.connection()) as client:
        if strategy:
            strategies.named(strategy)
            policy.change(store, {"strategy": strategy})
        if annotators is not None:
            policy.change(store, {"annotators": annotators})
        for change in tabs.ensure(
            client, store, config.parse(store.label_config), annotators=policy.read(store).annotators
        ):
            console.print(f"  {change}", markup=False, highlight=False)
    for title, address in tabs.links(store, store.connection().url).items():
        console.print(f"[bold]{escape(title)}[/]: {escape(address)}", soft_wrap=True)
    first = store.document(sweep.QUEUE).get("front", [])
    shown = ", ".join(map(str, first[:10])) or "not ordered yet"
    console.print(f"order: {policy.read(store).strategy}   first: {shown}")


@app.command()
def doctor(project: MaybeProject = None) -> None:
    """Check everything and print the exact setting to change."""
    settings = _settings()
    store = Store(settings.data_dir)
    known = [one for one in store.projects() if project in (None, one.id)]
    with _maybe_client(settings, known) as client:
        found = checks.examine(
            settings,
            client=client,
            project=project if project is not None else known[0].id if known else None,
            password=enrol.front_password(settings),
            probes=[
                ("Redis", lambda: server.ensure(settings)),
                ("device", lambda: _device(settings)),
                ("weights", lambda: _weights(settings)),
            ],
        )
    table = Table(box=None, show_header=False, padding=(0, 1))
    marks = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[yellow]–[/]"}
    for check in found:
        table.add_row(marks[check.ok], check.name, escape(check.detail))
        if check.ok is False:
            table.add_row("", "", f"[bold]fix:[/] {escape(check.fix)}")
    console.print(table)
    for one in known:
        console.print(enrol.page_hint(settings, one.id), soft_wrap=True, highlight=False)
    if any(check.ok is False for check in found):
        raise typer.Exit(1)


# -- scoring


@app.command()
def score(
    project: ProjectOption,
    wait: Annotated[bool, typer.Option(help="Show progress until every open task has its prediction.")] = True,
) -> None:
    """Score every open task of a project that has no prediction yet (backfill)."""
    settings = _settings()
    store, client, queue = _open(settings, project)
    open_total = sum(1 for _ in client.open_tasks(project))
    sweep.sweep_project(client, store, queue, settings, again=True)
    with _bar("scoring") as (bar, shown):
        bar.update(shown, total=open_total)
        while wait:
            missing = sweep.sweep_project(client, store, queue, settings)
            bar.update(shown, completed=open_total - missing, description=store.target or "fitting the first version")
            if store.current and not store.rollout and not missing:
                break
            time.sleep(1.0)
    _print_failures([store])


@app.command()
def jobs(
    project: MaybeProject = None,
    cancel: Annotated[str, typer.Option(help="Cancel the job with this id; 'all' cancels every job.")] = "",
    watch: Annotated[bool, typer.Option(help="Refresh until Ctrl-C.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List jobs: queued, running with their percentage, failed with the reason; and tasks that could not be scored."""
    settings = _settings()
    queue = Queues(queues.connect(server.ensure(settings)), settings)
    if cancel:
        wanted = [job.id for job in queue.jobs(project) if job.state in {"queued", "running", "retrying"}]
        for job_id in wanted if cancel == "all" else [cancel]:
            queue.cancel(job_id)
            console.print(f"cancelled {job_id}")
        return
    stores = [store for store in Store(settings.data_dir).projects() if project in (None, store.id)]
    if as_json:
        console.print_json(data=_jobs_as_json(queue, stores, project))
        return
    while True:
        if watch:
            console.clear()
        _print_jobs(queue, project)
        _print_failures(stores)
        if not watch:
            return
        time.sleep(1.0)


@app.command()
def predict(
    files: Annotated[list[Path], typer.Argument(help="Images, or folders of images.", exists=True)],
    out: Annotated[Path, typer.Option(help="Where masks and heatmaps go.")] = Path("anomaly-out"),
    normal: Annotated[Path | None, typer.Option(help="Folder of normal images to learn from.", exists=True)] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a fitted version to use.", exists=True)] = None,
) -> None:
    """Score files without Label Studio: a score, a mask PNG and a heatmap for each."""
    stack.require("torch", extra="workers")
    from anomaly_workers import offline

    offline.predict_files(files, out=out, normal=normal, model=model, settings=_settings(), console=console)


@app.command(name="eval")
def evaluate(
    folders: Annotated[list[Path], typer.Argument(help="Classes in MVTec layout, or a folder of them.", exists=True)],
    json_: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    detector: Annotated[str, typer.Option(help="Detection method.")] = "patchcore-padim",
    backbone: Annotated[str, typer.Option(help="Feature network.")] = "efficientnet_lite0",
    image_size: Annotated[int, typer.Option(help="Images are scaled to about this many pixels squared.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    contamination: Annotated[float, typer.Option(help="Share of training images replaced by defects.")] = 0.0,
    shots: Annotated[str, typer.Option(help="Numbers of confirmed defects to learn from, e.g. 0,1,5,10.")] = "",
    seeds: Annotated[int, typer.Option(help="Draws for each number of shots.", min=1)] = 5,
    masks: Annotated[bool, typer.Option(help="Use the ground truth of the shots, or their verdicts alone.")] = True,
    unseen: Annotated[str, typer.Option(help="Defect type that is never among the shots, and alone in test.")] = "",
    head_weight: Annotated[float, typer.Option(help="How much the shots change scores.", min=0, max=3)] = 1.0,
) -> None:
    """Fit on train/good, score test/, print and write the metrics of each class; with --shots also learn from pool/."""
    stack.require("torch", extra="workers")
    from anomaly_workers import evaluate as evaluation
    from anomaly_workers import heap
    from anomaly_workers import shots as few

    heap.keep_freed()
    options = evaluation.EvalOptions(
        detector=detector,
        backbone=backbone,
        image_size=image_size,
        device=device,
        seed=seed,
        contamination=contamination,
    )
    figures: Any
    if shots:
        drawn = few.ShotOptions(_numbers(shots), seeds=seeds, masks=masks, unseen=unseen, weight=head_weight)
        figures = few.evaluate_shots(folders, options, drawn, console=console)
    else:
        figures = evaluation.evaluate(folders, options, console=console)
    if json_ is not None:
        json_.write_text(json.dumps(figures, indent=2) + "\n")


@app.command()
def demo(
    label_studio: Annotated[Path, typer.Option(help="The label-studio command to start.", exists=True)],
    images: Annotated[Path | None, typer.Option(help="A folder of images, or a class in MVTec layout.")] = None,
    check: Annotated[bool, typer.Option(help="Verify the result through Label Studio's API, then exit.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the demo keeps its files; emptied first.")] = Path(".demo"),
) -> None:
    """Show all of it: a real Label Studio, a project, images, a detector, predictions. Stays up until Ctrl-C."""
    stack.require("torch", extra="workers")
    from anomaly_workers import demo as show

    with _until_signal() as stop:
        failures = show.run(label_studio, images, folder=folder, check=check, stop=stop, console=console)
    if failures:
        raise typer.Exit(1)


@app.command()
def report(
    project: ProjectOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")],
) -> None:
    """Write a project's page as one HTML file that needs nothing else: for mail, for the archive."""
    settings = _settings()
    queue = Queues(queues.connect(server.ensure(settings), tries=2), settings)
    size = pages.write(settings, project, out, queue)
    console.print(f"[bold green]wrote[/] {out} ({size / 1e6:.1f} MB)", highlight=False)


# -- versions


@app.command()
def versions(project: ProjectOption, as_json: JsonFlag = False) -> None:
    """List a project's versions, oldest first; the deployed one is marked."""
    store = Store(_settings().data_dir).project(project)
    cards = store.versions()
    if as_json:
        console.print_json(data={"current": store.current, "rollout": store.rollout, "versions": cards})
        return
    table = Table("", "version", "created", "images", "defects", "kind", "why", "fit s")
    for card in cards:
        mark = {store.current: "[green]deployed[/]", store.rollout: "[yellow]rolling out[/]"}.get(card["version"], "")
        table.add_row(
            mark,
            *(str(card.get(key, "")) for key in ("version", "created", "images", "defects", "kind")),
            escape(str(card.get("decision", {}).get("reason", ""))),
            str(card.get("fit_seconds", "")),
        )
    console.print(table if cards else "no version yet: the first is made when the project has images")


@app.command()
def diff(
    project: ProjectOption,
    old: Annotated[str, typer.Argument(help="A version; empty means the parent of the other.")] = "",
    new: Annotated[str, typer.Argument(help="Another version; empty means the newest.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Compare two versions: what they learnt from, how they do on confirmed images, which of those changed sides."""
    store = Store(_settings().data_dir).project(project)
    cards = store.versions()
    if len(cards) < 2:
        raise ConfigError(f"Project {project} has {len(cards)} versions, nothing to compare.")
    after = store.card(new) if new else cards[-1]
    before = store.card(old or str(after.get("parent") or cards[-2]["version"]))
    found = compare(before, after)
    if as_json:
        console.print_json(data=found)
        return
    table = Table("", before["version"], after["version"])
    for name, (was, now) in found["fields"].items():
        table.add_row(name, str(was), str(now))
    console.print(table)
    for line in found["images"]:
        console.print(f"task {line['task']}: {line['before']:.3f} -> {line['after']:.3f}  {line['says']}")


@app.command()
def promote(project: ProjectOption, version: Annotated[str, typer.Argument(help="Version to deploy.")]) -> None:
    """Deploy a version: open tasks are scored with it first, then Label Studio is switched."""
    settings = _settings()
    store = Store(settings.data_dir).project(project)
    store.roll_out(version)
    operating.follow(store, version)
    queue = Queues(queues.connect(server.ensure(settings)), settings)
    missing = sweep.sweep_project(Client(store.connection()), store, queue, settings)
    console.print(f"{version}: {missing} open tasks to score before the switch; see ls-anomaly jobs")


@app.command()
def threshold(
    project: ProjectOption,
    fpr: Annotated[float | None, typer.Option(help="Share of normal images that may raise an alarm.")] = None,
    f1: Annotated[bool, typer.Option("--f1", help="The best F1 on confirmed images.")] = False,
    at: Annotated[float | None, typer.Option(help="The threshold itself, between 0 and 1.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait until Label Studio has the new verdicts.")] = True,
) -> None:
    """Show where alarms begin and what that flags, or move it: verdicts and masks follow in seconds."""
    changes = tune.choice(fpr=fpr, f1=f1, at=at)
    settings = _settings()
    store, client, queue = _open(settings, project)
    if changes:
        tune.decide(store, settings, changes)
        tune.move(store, settings, queue, console, wait=wait)
    tune.show(store, settings, client, console)


@app.command()
def rollback(project: ProjectOption) -> None:
    """Return to the version that was deployed before the current one."""
    store = Store(_settings().data_dir).project(project)
    earlier = [entry["from"] for entry in store.history() if entry["to"] == store.current and entry["from"]]
    if not earlier:
        raise ConfigError(f"Project {project} has no earlier deployed version. See: ls-anomaly versions -p {project}")
    promote(project, earlier[-1])


# -- helpers


def _print_plan(plan: Plan, *, everything: bool) -> None:
    """Show how a label config would change, and with `everything` what else would."""
    colours = {"+": "green", "-": "red", "@": "cyan"}
    for line in plan.diff if everything or plan.replaces_config else ():
        console.print(line, style=colours.get(line[0]), markup=False, highlight=False, soft_wrap=True)
    for change in plan.changes if everything else ():
        console.print(f"  would {change}", markup=False, highlight=False)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--shots takes numbers with commas between, e.g. 0,1,5,10, not {text!r}.") from None


def _settings(**overrides: Any) -> Settings:
    given = {name: value for name, value in overrides.items() if value is not None}
    settings = load_settings(**given)
    logging.basicConfig(
        level=settings.log_level, format="%(message)s", handlers=[RichHandler(console=errors, show_path=False)]
    )
    for noisy in ("httpx", "httpcore", "rq.worker", "timm"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return settings


def _open(settings: Settings, project: int) -> tuple[ProjectStore, Client, Queues]:
    store = Store(settings.data_dir).project(project)
    client = Client(store.connection())
    config.parse(client.project(project).label_config)
    return store, client, Queues(queues.connect(server.ensure(settings)), settings)


@contextmanager
def _maybe_client(settings: Settings, known: list[ProjectStore]) -> Iterator[Client | None]:
    """Yield a client of the first known project's Label Studio, or of the one in the settings, or None."""
    url, token = settings.label_studio_url.rstrip("/"), settings.label_studio_token.get_secret_value()
    connection = known[0].connection() if known else Connection(url=url, token=token, project=0) if url else None
    if connection is None:
        yield None
        return
    with Client(connection) as client:
        yield client


def _device(settings: Settings) -> str:
    stack.require("torch", extra="workers")
    from anomaly_workers.runtime import choose_device

    return choose_device(settings.device)


def _weights(settings: Settings) -> str:
    stack.require("torch", extra="workers")
    from anomaly_workers import detectors

    detectors.create(detectors.options(settings, device="cpu"))
    return f"{settings.backbone} loads"


@contextmanager
def _until_signal() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set."""
    stop = threading.Event()
    before: dict[signal.Signals, Any] = {}
    handler: Callable[..., None] = lambda *_: stop.set()  # noqa: E731
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def _bar(title: str) -> Iterator[tuple[Progress, Any]]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield bar, bar.add_task(title, total=None)


def _print_jobs(queue: Queues, project: int | None) -> None:
    listed = queue.jobs(project)
    depth = ", ".join(f"{name} {count}" for name, count in queue.depth().items())
    console.print(f"waiting: {depth}   workers: {len(queue.workers())}")
    if not listed:
        console.print("no jobs")
        return
    table = Table("id", "state", "%", "what", "worker")
    colours = {"failed": "red", "running": "cyan", "retrying": "yellow", "cancelled": "dim"}
    for job in listed:
        colour = colours.get(job.state, "default")
        table.add_row(job.id, f"[{colour}]{job.state}[/]", str(job.percent), escape(job.message), escape(job.worker))
    console.print(table)


def _print_failures(stores: list[ProjectStore]) -> None:
    table = Table("project", "task", "image", "why it has no prediction")
    for store in stores:
        for failure in store.failures():
            table.add_row(str(store.id), str(failure.task), escape(failure.image), escape(failure.reason))
    if table.row_count:
        console.print(table)


def _jobs_as_json(queue: Queues, stores: list[ProjectStore], project: int | None) -> dict[str, Any]:
    return {
        "queued": queue.depth(),
        "jobs": [
            {
                "id": job.id,
                "kind": job.kind,
                "state": job.state,
                "project": job.project,
                "percent": job.percent,
                "message": job.message,
                "queue": job.queue,
                "worker": job.worker,
            }
            for job in queue.jobs(project)
        ],
        "failures": [
            {"project": store.id, "task": failure.task, "image": failure.image, "reason": failure.reason}
            for store in stores
            for failure in store.failures()
        ],
    }
