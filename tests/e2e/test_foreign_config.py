"""Projects that people made for themselves, connected to a real Label Studio without losing a label."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from product import Product, encoded
from typer.testing import CliRunner

from anomaly_workers import cli, sample
from anomaly_workers.client import Client
from anomaly_workers.detectors.regions import regions
from anomaly_workers.enrol import enrol
from anomaly_workers.errors import ConfigError
from anomaly_workers.labelstudio import config, encode
from anomaly_workers.store import Store
from anomaly_workers.types import JSON, Detection

TWO_IMAGES = """<View>
  <!-- ours; </View> in a comment ends nothing -->
  <Header value="Vergleich"/>
  <Image name="golden" value="$reference"/>
  <Image name="teil" value="$foto"/>
  <PolygonLabels name="umriss" toName="teil"><Label value="Kratzer" hotkey="k"/><Label value="Delle"/></PolygonLabels>
</View>
<!-- </View> -->"""
GERMAN = """<View><Image name='teil' value='$foto'/>
<Choices name='urteil' toName='teil' required='true'><Choice value='i.O.'/><Choice value='n.i.O.'/></Choices>
<RectangleLabels name='stelle' toName='teil'><Label value='Rost'/><Label value='Riss'/></RectangleLabels>
<TextArea name='bemerkung' toName='teil'/>
<Taxonomy name='ursache' toName='teil'><Choice value='Werkzeug'><Choice value='stumpf'/></Choice></Taxonomy></View>"""
STARS = '<View><Image name="i" value="$image"/><Rating name="r" toName="i"/></View>'
SIZE = {"original_width": 64, "original_height": 64, "image_rotation": 0}
POLYGON = {
    "id": "p1",
    "from_name": "umriss",
    "to_name": "teil",
    "type": "polygonlabels",
    "value": {"points": [[10, 10], [40, 12], [30, 50]], "closed": True, "polygonlabels": ["Delle"]},
} | SIZE
JUDGED = [
    {"id": "c1", "from_name": "urteil", "to_name": "teil", "type": "choices", "value": {"choices": ["n.i.O."]}},
    {
        "id": "r1",
        "from_name": "stelle",
        "to_name": "teil",
        "type": "rectanglelabels",
        "value": {"x": 5, "y": 6, "width": 20, "height": 30, "rotation": 0, "rectanglelabels": ["Riss"]},
    }
    | SIZE,
    {"id": "t1", "from_name": "bemerkung", "to_name": "teil", "type": "textarea", "value": {"text": ["oben links"]}},
    {
        "id": "x1",
        "from_name": "ursache",
        "to_name": "teil",
        "type": "taxonomy",
        "value": {"taxonomy": [["Werkzeug", "stumpf"]]},
    },
]
Make = Callable[[str], int]


@pytest.fixture(autouse=True)
def _in_this_product(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANOMALY_DATA_DIR", str(product.settings.data_dir))
    monkeypatch.setenv("ANOMALY_PORT", str(product.settings.port))
    monkeypatch.setenv("ANOMALY_REDIS_URL", product.settings.redis_url)


def raw_annotations(client: Client, task: int) -> bytes:
    """Every byte that Label Studio says of a task's annotations."""
    return client.download(f"/api/tasks/{task}/annotations/")


def judged(client: Client, project: int, data: JSON, result: list[JSON]) -> int:
    [task] = client.import_tasks(project, [{"data": data}])
    client.annotate(task, result)
    return task


def predicted(client: Client, project: int, task: int) -> list[JSON]:
    """Push what the product would say of a defect; return what Label Studio then has."""
    controls = config.parse(client.project(project).label_config)
    anomaly_map = np.full((64, 64), 0.1, np.float32)
    anomaly_map[10:30, 20:40] = 0.9
    detection = Detection(0.9, 0.5, anomaly_map, (64, 64))
    prediction = encode.prediction(task, detection, regions(detection), controls, "foreign-v1")
    assert client.import_predictions(project, [prediction]) == []
    return [part for one in client.predictions(project, tasks=[task])[task] for part in one["result"]]


def uploads(client: Client, project: int) -> bool:
    """Whether Label Studio makes a task of one uploaded image, as the import page does."""
    picture = encoded(sample.washer(np.random.default_rng(0)), "PNG")
    before = client.project(project).tasks
    answer = upload(client, project, picture)
    return answer.status_code == 201 and client.project(project).tasks == before + 1


def upload(client: Client, project: int, picture: bytes) -> httpx.Response:
    return client._http.post(f"/api/projects/{project}/import", files={"file": ("a.png", picture, "image/png")})


def joined(product: Product, project: int, **options: Any) -> tuple[str, ...]:
    found = enrol(product.settings, product.label_studio.url, product.label_studio.token, project=project, **options)
    return found.changes


@pytest.mark.parametrize(
    ("xml", "data", "result", "fills"),
    [
        (TWO_IMAGES, {"reference": "http://x/0.png", "foto": "http://x/1.png"}, [POLYGON], {"umriss"}),
        (GERMAN, {"foto": "http://x/1.png"}, JUDGED, {"urteil", "stelle"}),
    ],
)
def test_a_foreign_project_is_connected_without_losing_a_label(
    client: Client, product: Product, new_project: Make, xml: str, data: JSON, result: list[JSON], fills: set[str]
) -> None:
    project = new_project(xml)
    could_upload = uploads(client, project)
    task = judged(client, project, data, result)
    stored, before = client.project(project).label_config, raw_annotations(client, task)
    assert json.loads(before)[0]["result"], "there is something to lose"
    joined(product, project)
    after = client.project(project).label_config
    panel = after[after.index("  <View>\n    <Header") : after.index("</View>\n", after.index("anomaly_heatmap")) + 8]
    assert after.replace(panel, "") == stored, "every byte that was there is there, in its order"
    assert raw_annotations(client, task) == before
    assert {part["from_name"] for part in predicted(client, project, task)} == fills
    assert raw_annotations(client, task) == before
    assert uploads(client, project) == could_upload
    kept = list((Store(product.settings.data_dir).project(project).folder / "configs").glob("*.xml"))
    assert [path.read_text() for path in kept] == [stored]
    assert joined(product, project) == ()


def test_missing_controls_are_added_when_asked_for(client: Client, product: Product, new_project: Make) -> None:
    project = new_project(TWO_IMAGES)
    data = {"reference": "http://x/0.png", "foto": "http://x/1.png"}
    task = judged(client, project, data, [POLYGON])
    before = raw_annotations(client, task)
    joined(product, project, add=("verdict", "mask", "score"), heatmap=False)
    parts = predicted(client, project, task)
    assert [part["from_name"] for part in parts] == ["anomaly_verdict", "anomaly_score", "umriss"], "it has a mask"
    assert {part["to_name"] for part in parts} == {"teil"}
    assert raw_annotations(client, task) == before


def test_a_project_with_nothing_to_fill_works_once_controls_are_added(
    client: Client, product: Product, new_project: Make
) -> None:
    project = new_project(STARS)
    with pytest.raises(ConfigError, match="--add verdict,mask,score"):
        joined(product, project)
    assert client.project(project).label_config == STARS
    joined(product, project, add=("verdict",))
    assert uploads(client, project)
    [task] = [one.id for one in client.open_tasks(project)]
    assert [part["from_name"] for part in predicted(client, project, task)] == ["anomaly_verdict"]


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        (
            '<View><Text name="t" value="$text"/><Choices name="c" toName="t"><Choice value="a"/></Choices></View>',
            "Text",
        ),
        (STARS, "Rating"),
        (
            '<View><Image name="i" value="$image"/><KeyPointLabels name="k" toName="i"><Label value="Eye"/>'
            "</KeyPointLabels></View>",
            "KeyPointLabels",
        ),
    ],
)
def test_a_config_that_cannot_work_is_refused_with_what_to_add(
    client: Client, product: Product, new_project: Make, xml: str, reason: str
) -> None:
    project = new_project(xml)
    with pytest.raises(ConfigError, match=f"{reason}.*Add") as refusal:
        joined(product, project)
    assert "<Image" in str(refusal.value) or "BrushLabels" in str(refusal.value)
    assert client.project(project).label_config == xml
    assert (client.backends(project), client.webhooks(project)) == ([], [])


def test_a_dry_run_shows_everything_and_changes_nothing(client: Client, product: Product, new_project: Make) -> None:
    project = new_project(GERMAN)
    before = client.project(project)
    options = ["--url", product.label_studio.url, "--token", product.label_studio.token, "-p", str(project)]
    shown = CliRunner().invoke(cli.app, ["connect", *options, "--dry-run", "--add", "score"])
    assert shown.exit_code == 0, shown.output
    for said in ("+++ label config after", "anomaly_heatmap", "anomaly_score", "Uncertainty sampling", "webhook", "ML"):
        assert said in shown.output
    assert client.project(project) == before
    assert (client.backends(project), client.webhooks(project)) == ([], [])
    done = CliRunner().invoke(cli.app, ["connect", *options, "--add", "score"])
    assert done.exit_code == 0, done.output
    assert "+++ label config after" in done.output
    assert "is kept in" in done.output.replace("\n", " ")
