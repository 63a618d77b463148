"""Label configs of every kind, and the ones that cannot work."""

from __future__ import annotations

import pytest

from anomaly_workers.errors import ConfigError
from anomaly_workers.labelstudio import config, template, words
from anomaly_workers.types import Controls

IMAGE = '<Image name="image" value="$image"/>'


def parse(*tags: str) -> Controls:
    return config.parse(f"<View>{IMAGE}{''.join(tags)}</View>")


def choices(*values: str, name: str = "cls") -> str:
    inside = "".join(f'<Choice value="{value}"/>' for value in values)
    return f'<Choices name="{name}" toName="image">{inside}</Choices>'


def labels(tag: str, *values: str, name: str = "mask") -> str:
    inside = "".join(f'<Label value="{value}"/>' for value in values)
    return f'<{tag} name="{name}" toName="image">{inside}</{tag}>'


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("normal", "anomaly"), ("normal", "anomaly")),
        (("Defective", "Good"), ("Good", "Defective")),
        (("OK", "NOK"), ("OK", "NOK")),
        (("i.O.", "n.i.O."), ("i.O.", "n.i.O.")),
        (("Gut", "Fehlerhaft"), ("Gut", "Fehlerhaft")),
        (("pass", "fail"), ("pass", "fail")),
        (("bon", "défaut"), ("bon", "défaut")),
        (("no defect", "defect"), ("no defect", "defect")),
        (("Not good", "Good"), ("Good", "Not good")),
        (("正常", "异常"), ("正常", "异常")),
        (("良品", "不良品"), ("良品", "不良品")),
        (("정상", "불량"), ("정상", "불량")),
        (("годен", "брак"), ("годен", "брак")),
        (("ok", "cracked"), ("ok", "cracked")),
        (("rework", "good"), ("good", "rework")),
        (("cracked", "defective", "fine", "unsure"), ("fine", "defective")),
    ],
)
def test_the_verdict_words_of_many_languages_are_found(values: tuple[str, ...], expected: tuple[str, str]) -> None:
    found = parse(choices(*values))
    assert (found.normal, found.anomaly) == expected


@pytest.mark.parametrize(("name", "normal"), [("is_defective", "No"), ("is_good", "Yes")])
def test_yes_and_no_answer_the_name_of_the_control(name: str, normal: str) -> None:
    assert parse(choices("Yes", "No", name=name)).normal == normal


def test_choices_without_a_known_word_are_no_verdict() -> None:
    with pytest.raises(ConfigError, match="Choices"):
        parse(choices("red", "green"))


def test_an_alias_is_what_a_prediction_carries() -> None:
    found = parse(
        '<Choices name="c" toName="image"><Choice value="Good" alias="g0"/><Choice value="Bad" alias="b1"/></Choices>'
    )
    assert (found.normal, found.anomaly) == ("g0", "b1")


def test_choices_of_single_regions_are_not_the_verdict() -> None:
    with pytest.raises(ConfigError):
        parse(choices("good", "bad").replace("<Choices", '<Choices perRegion="true"'))


def test_the_best_mask_control_is_chosen() -> None:
    tags = ("RectangleLabels", "PolygonLabels", "BitmaskLabels", "BrushLabels")
    for count in range(1, 5):
        found = parse(*(labels(tag, "Defect", name=tag) for tag in tags[:count]))
        assert found.mask is not None
        assert found.mask.tag == tags[count - 1]


@pytest.mark.parametrize(
    ("values", "expected"),
    [(("Part", "Scratch", "Defect"), "Defect"), (("Background", "Scratch"), "Scratch"), (("Kratzer",), "Kratzer")],
)
def test_the_mask_label_is_the_one_for_anomalies(values: tuple[str, ...], expected: str) -> None:
    assert parse(labels("BrushLabels", *values)).mask_label == expected


def test_the_number_that_can_hold_a_score_is_chosen() -> None:
    found = parse(
        '<Number name="count" toName="image" min="1" max="9"/><Number name="other" toName="image"/>',
        '<Number name="anomaly_score" toName="image" max="1"/>',
    )
    assert found.number is not None
    assert found.number.name == "anomaly_score"


def test_of_several_images_the_one_with_the_controls_is_taken() -> None:
    found = config.parse(
        '<View><Image name="golden" value="$reference"/><Image name="part" value="$data.photo"/>'
        '<Image name="anomaly_heatmap" value="http://h/x?src=$photo"/>'
        '<BrushLabels name="b" toName="part"><Label value="Defect"/></BrushLabels></View>'
    )
    assert (found.image, found.value) == ("part", "data.photo")


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<View>", "not XML"),
        ('<View><Text name="t" value="$t"/></View>', "no Image"),
        (f"<View>{IMAGE}</View>", "nothing on its Image"),
        (
            f'<View>{IMAGE}<KeyPointLabels name="k" toName="image"><Label value="a"/></KeyPointLabels></View>',
            "KeyPoint",
        ),
        (f"<!DOCTYPE x [<!ENTITY a 'b'>]><View>{IMAGE}</View>", "DOCTYPE"),
        ("", "not XML"),
    ],
)
def test_a_config_that_cannot_work_is_refused_with_the_reason(xml: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse(xml)


@pytest.mark.parametrize(
    ("value", "data", "expected"),
    [
        ("image", {"image": "a.png"}, "a.png"),
        ("data.image", {"image": "a.png"}, "a.png"),
        ("part.photo", {"part": {"photo": "b.png"}}, "b.png"),
        ("a.b", {"a.b": "c.png"}, "c.png"),
        ("https://cdn/$id.png", {"id": 7}, "https://cdn/7.png"),
        ("https://cdn/$id.png", {}, None),
        ("image", {"image": 3}, None),
        ("image", {"image": ""}, None),
        ("image.x", {"image": "text"}, None),
    ],
)
def test_the_image_of_a_task_is_looked_up(value: str, data: dict[str, object], expected: str | None) -> None:
    assert config.image_of(data, value) == expected


def test_the_default_config_offers_everything_under_one_data_key() -> None:
    xml = template.default_config("http://host:9090/heatmap/1/secret?v=1")
    found = config.parse(xml)
    assert (found.normal, found.anomaly, found.mask_label) == ("normal", "anomaly", "Anomaly")
    assert found.number is not None
    assert "secret?v=1&amp;src=$image" in xml
    assert xml.count("$") == xml.count("$image")


def test_a_heatmap_panel_is_added_once_and_updated() -> None:
    xml = f"<View>\n  <!-- ours -->\n  {IMAGE}\n  {choices('good', 'bad')}\n</View>"
    once = template.with_heatmap(xml, "http://a/h")
    assert once.replace(once[once.index("  <View>\n    <Header") : once.index("</View>", 200) + 8], "") in (xml, once)
    assert template.with_heatmap(once, "http://a/h") == once
    moved = template.with_heatmap(once, "http://b/h")
    assert moved == once.replace("http://a/h", "http://b/h")
    assert config.parse(moved) == config.parse(xml)


def test_only_the_real_heatmap_panel_is_updated() -> None:
    old = '<Image name="anomaly_heatmap" value="http://a/h?src=$image"/>'
    real = """<Image hint="a > b, value='x'"\n  name='anomaly_heatmap' value = 'http://a/h?src=$image' zoom="true"/>"""
    xml = f"<View>\n  <!-- é {old} -->\n  {IMAGE}\n  {choices('good', 'bad')}\n  {real}\n</View>"
    moved = template.with_heatmap(xml, "http://b/h")
    assert moved == xml.replace(real, real.replace("'http://a/h?src=$image'", '"http://b/h?src=$image"'))
    without = xml.replace(real, "")
    added = template.with_heatmap(without, "http://b/h")
    assert old in added, "a commented-out panel stays as it is"
    assert "http://b/h?src=$image" in added


@pytest.mark.parametrize("label", ["normal", "OK", "no anomaly", "defect-free", "free of defects", "sans défaut", "é"])
def test_a_label_of_nothing_wrong_is_never_taken_for_a_defect(label: str) -> None:
    assert words.meaning(label) is not True
