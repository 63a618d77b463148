"""What is added to somebody's label config, and what of it may not change."""

from __future__ import annotations

import pytest

from anomaly_workers.connect import Plan
from anomaly_workers.errors import ConfigError
from anomaly_workers.labelstudio import config, template

STARS = '<View><Image name="i" value="$image"/><Rating name="r" toName="i"/></View>'
GERMAN = """<?xml version="1.0" encoding="UTF-8"?>
<View className='ours'>
\t<!-- größe: </View> -->
  <Image name='teil'   value='$foto'/>
  <Choices name='urteil' toName='teil'><Choice value='i.O.'/><Choice value='n.i.O.'/></Choices>
  <TextArea name='anomaly_mask' toName='teil'/>
</View><!-- </View> -->
"""


def test_what_is_missing_is_added_and_every_byte_stays() -> None:
    found = template.with_controls(GERMAN, template.ADDABLE)
    controls = config.parse(found)
    assert controls.choices is not None
    assert controls.mask is not None
    assert controls.number is not None
    assert (controls.choices.name, controls.normal, controls.anomaly) == ("urteil", "i.O.", "n.i.O.")
    assert (controls.mask.name, controls.mask_label) == ("anomaly_mask_2", "Anomaly"), "the name was taken"
    assert controls.number.name == "anomaly_score"
    start = GERMAN.index("</View><!--")
    assert found.startswith(GERMAN[:start])
    assert found.endswith(GERMAN[start:])


def test_adding_twice_adds_once() -> None:
    once = template.with_controls(GERMAN, template.ADDABLE)
    assert template.with_controls(once, template.ADDABLE) == once


def test_only_what_is_asked_for_is_added() -> None:
    found = config.parse(template.with_controls(STARS, ["score"]))
    assert found.number is not None
    assert (found.choices, found.mask) == (None, None)


def test_controls_go_to_the_image_that_has_some() -> None:
    two = (
        '<View><Image name="golden" value="$a"/><Image name="part" value="$b"/>'
        '<PolygonLabels name="p" toName="part"><Label value="Riss"/></PolygonLabels></View>'
    )
    found = config.parse(template.with_controls(two, ["verdict"]))
    assert found.choices is not None
    assert found.choices.to_name == "part"
    assert found.mask is not None
    assert found.mask.tag == "PolygonLabels"


def test_the_panel_is_inserted_before_the_roots_end() -> None:
    found = template.with_heatmap(GERMAN, "http://h/1")
    assert found.endswith("</View><!-- </View> -->\n")
    assert config.parse(found) == config.parse(GERMAN)


def test_an_unknown_control_is_told() -> None:
    with pytest.raises(ConfigError, match="verdict, mask, score"):
        template.with_controls(GERMAN, ["heat"])


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        ('<View><Text name="t" value="$text"/></View>', r"shows: Text.*Add <Image"),
        ('<View><Image name="i" valueList="$pages"/></View>', "valueList"),
        (STARS, "Rating.*--add verdict,mask,score"),
    ],
)
def test_a_refusal_says_what_to_add(xml: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        config.parse(xml)


def test_the_diff_shows_what_a_plan_would_add() -> None:
    plan = Plan(1, STARS.replace("/><R", "/>\n<R"), template.with_controls(STARS, ["score"]), ())
    assert plan.replaces_config
    assert any(line.startswith("+") and "anomaly_score" in line for line in plan.diff)
    assert not Plan(None, "", STARS, ()).replaces_config
    assert Plan(1, STARS, STARS, ()).diff == []
