"""Reading a label config: which of its tags can carry an anomaly prediction."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from anomaly_workers.errors import ConfigError
from anomaly_workers.labelstudio import words
from anomaly_workers.types import Control, Controls

MASK_TAGS = ("BrushLabels", "BitmaskLabels", "PolygonLabels", "RectangleLabels")  # best first
HEATMAP_NAME = "anomaly_heatmap"

_PLAIN_VALUE = re.compile(r"\$([\w.\-]+)\Z")
_IN_TEMPLATE = re.compile(r"\$\{?([\w.\-]*\w)\}?")


def parse(xml: str) -> Controls:
    """Find the image, verdict, mask and number of a label config.

    Raises:
        ConfigError: not XML, no Image, or nothing on the Image that a prediction can fill.
    """
    root = _root(xml)
    images = _images(root)
    if not images:
        raise ConfigError(_no_image(root))
    found = list(_controls(root, images))
    if not found:
        raise ConfigError(_nothing_usable(root))
    image = _best_image(found, images)
    here = sorted(found, key=lambda one: one.control.to_name != image)
    verdict = next((one for one in here if one.normal is not None), None)
    mask = min(
        (one for one in found if one.control.tag in MASK_TAGS and one.control.to_name == image), key=_rank, default=None
    )
    number = min((one for one in here if one.control.tag == "Number"), key=_number_rank, default=None)
    return Controls(
        image=image,
        value=images[image],
        choices=verdict.control if verdict else None,
        normal=verdict.normal if verdict else None,
        anomaly=verdict.anomaly if verdict else None,
        mask=mask.control if mask else None,
        mask_label=mask.label if mask else None,
        number=number.control if number else None,
    )


def images_of(xml: str) -> dict[str, str]:
    """Return the data key of every Image by its name, in document order.

    Raises:
        ConfigError: not XML, or no Image.
    """
    root = _root(xml)
    found = _images(root)
    if not found:
        raise ConfigError(_no_image(root))
    return found


def names_of(xml: str) -> frozenset[str]:
    """Return every name that a tag of a label config has."""
    return frozenset(tag.get("name", "") for tag in _root(xml).iter())


def image_of(data: Mapping[str, Any], value: str) -> str | None:
    """Return the image address of a task's data for `Controls.value`: a key, a dotted path or a template with `$key`.

    None when the task has no such field, or it is not text.
    """
    if "$" in value:
        return _filled(data, value)
    found = _looked_up(data, value)
    return found if isinstance(found, str) and found else None


@dataclass(frozen=True, slots=True)
class _Found:
    control: Control
    label: str | None = None
    known: bool = False
    normal: str | None = None
    anomaly: str | None = None


def _root(xml: str) -> ElementTree.Element:
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise ConfigError("The label config declares entities. Remove its DOCTYPE.")
    try:
        return ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise ConfigError(f"The label config is not XML ({error}). Correct it in the project's settings.") from error


def _images(root: ElementTree.Element) -> dict[str, str]:
    """Name to data key of every Image, in document order."""
    images = {}
    for tag in root.iter("Image"):
        name, value = tag.get("name"), tag.get("value")
        if name and value and "$" in value and name != HEATMAP_NAME:
            plain = _PLAIN_VALUE.match(value.strip())
            images[name] = plain.group(1) if plain else value.strip()
    return images


def _controls(root: ElementTree.Element, images: Mapping[str, str]) -> Iterable[_Found]:
    for tag in root.iter():
        names = [name.strip() for name in tag.get("toName", "").split(",")]
        to_name = next((name for name in names if name in images), None)
        if to_name is None or not tag.get("name") or tag.get("perRegion") == "true":
            continue
        found = _usable(tag, to_name)
        if found:
            yield found


def _usable(tag: ElementTree.Element, to_name: str) -> _Found | None:
    if tag.tag == "Number":
        return _number(tag, to_name)
    pairs = _labels(tag)
    labels = tuple(result for result, _shown in pairs)
    control = Control(tag.tag, tag.get("name", ""), to_name, labels)
    if tag.tag == "Choices":
        verdicts = _verdicts(pairs, control.name)
        return _Found(control, normal=verdicts[0], anomaly=verdicts[1]) if verdicts else None
    if tag.tag in MASK_TAGS:
        label, known = _mask_label(pairs)
        return _Found(control, label=label, known=known) if label is not None else None
    return None


def _labels(tag: ElementTree.Element) -> list[tuple[str, str]]:
    """(what a result carries, what people read) of a tag's labels: the alias replaces the value in results."""
    inside = [child for child in tag.iter() if child.tag in ("Label", "Choice") and child.get("value")]
    shown = [child.get("value", "") for child in inside]
    return [(child.get("alias") or value, value) for child, value in zip(inside, shown, strict=True)]


def _verdicts(pairs: list[tuple[str, str]], name: str) -> tuple[str, str] | None:
    """Choose (normal, anomaly); of two choices one recognised word is enough, or yes and no to the control's name."""
    meanings = [_meaning(pair) for pair in pairs]
    if not any(one is not None for one in meanings):
        meanings = _answers(pairs, name)
    normal = [pair[0] for pair, abnormal in zip(pairs, meanings, strict=True) if abnormal is False]
    anomaly = [pair[0] for pair, abnormal in zip(pairs, meanings, strict=True) if abnormal is True]
    other = [pair[0] for pair, abnormal in zip(pairs, meanings, strict=True) if abnormal is None]
    if len(pairs) == 2 and len(other) == 1:
        normal, anomaly = normal or other, anomaly or other
    return (normal[0], anomaly[0]) if normal and anomaly else None


def _answers(pairs: list[tuple[str, str]], name: str) -> list[bool | None]:
    """Meanings of yes and no to a control called e.g. `is_defective`."""
    question = words.meaning(name)
    said = [words.agreement(pair[1]) for pair in pairs]
    return [None if question is None or yes is None else yes == question for yes in said]


def _mask_label(pairs: list[tuple[str, str]]) -> tuple[str | None, bool]:
    """Choose the label that marks anomalies, and whether its word was recognised."""
    known = next((pair[0] for pair in pairs if _meaning(pair) is True), None)
    if known is not None:
        return known, True
    return next((pair[0] for pair in pairs if _meaning(pair) is None), None), False


def _meaning(pair: tuple[str, str]) -> bool | None:
    shown = words.meaning(pair[1])
    return words.meaning(pair[0]) if shown is None else shown


def _number(tag: ElementTree.Element, to_name: str) -> _Found | None:
    """A Number whose limits let a score in [0, 1] in; Label Studio checks a step only where the config has one."""
    try:
        least, most, step = (float(tag.get(name) or default) for name, default in (("min", 0), ("max", 1), ("step", 0)))
    except ValueError:
        return None
    if not (least <= 0 and most >= 1 and 0 <= step <= 1):
        return None
    return _Found(Control("Number", tag.get("name", ""), to_name, step=step, least=least))


def _best_image(found: list[_Found], images: Mapping[str, str]) -> str:
    """The Image of the mask control; without one, that of the verdict, then that of the number."""
    masks = [one for one in found if one.control.tag in MASK_TAGS]
    best = min(masks, key=_rank, default=None)
    if best is None:
        best = next((one for one in found if one.control.tag == "Choices"), found[0])
    assert best.control.to_name in images
    return best.control.to_name


def _rank(one: _Found) -> tuple[int, bool]:
    return MASK_TAGS.index(one.control.tag), not one.known


def _number_rank(one: _Found) -> bool:
    return not re.search(r"anomal|score|confid", one.control.name.lower())


def _no_image(root: ElementTree.Element) -> str:
    if any(tag.get("valueList") for tag in root.iter("Image")):
        return "The label config's Image shows a list of pages (valueList), which is not supported. Use value."
    shown = sorted({tag.tag for tag in root.iter() if tag.get("name") and tag.get("value", "").startswith("$")})
    instead = f" (it shows: {', '.join(shown)})" if shown else ""
    return f'The label config has no Image{instead}. Add <Image name="image" value="$image"/>.'


def _nothing_usable(root: ElementTree.Element) -> str:
    tags = sorted({tag.tag for tag in root.iter() if tag.get("toName")}) or ["none"]
    return (
        "The label config has nothing on its Image that a prediction can fill (control tags found: "
        f"{', '.join(tags)}). Add Choices with a normal and an anomaly choice, BrushLabels, BitmaskLabels, "
        "PolygonLabels, RectangleLabels or Number; or let `ls-anomaly connect --add verdict,mask,score` add its own."
    )


def _looked_up(data: Mapping[str, Any], key: str) -> Any:
    if key in data:
        return data[key]
    found: Any = data
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    if found is None and key.startswith("data."):
        return _looked_up(data, key.removeprefix("data."))
    return found


def _filled(data: Mapping[str, Any], template: str) -> str | None:
    missing = False

    def fill(match: re.Match[str]) -> str:
        nonlocal missing
        key, rest = match.group(1), ""
        while (value := _looked_up(data, key)) is None and "." in key:  # `$id.png` is the key `id`
            key, _dot, end = key.rpartition(".")
            rest = f".{end}{rest}"
        missing = missing or value is None
        return f"{value}{rest}"

    filled = _IN_TEMPLATE.sub(fill, template)
    return None if missing else filled
