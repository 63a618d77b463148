"""Writing a label config: a good one for new projects, what is asked for into existing ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from xml.parsers import expat
from xml.sax.saxutils import quoteattr

from anomaly_workers.errors import ConfigError
from anomaly_workers.labelstudio.config import HEATMAP_NAME, images_of, names_of, parse

_ATTRIBUTE = re.compile(r"\s+([^\s=]+)\s*=\s*(\"[^\"]*\"|'[^']*')")
"""The next attribute of a start tag; what looks like one inside another's value is not one."""

_CONTROLS: Mapping[str, tuple[str, str]] = {
    "verdict": (
        "Verdict",
        """<Choices name={name} toName={image} choice="single" showInline="true">
      <Choice value="normal"/>
      <Choice value="anomaly"/>
    </Choices>""",
    ),
    "mask": (
        "Defect mask",
        """<BrushLabels name={name} toName={image} showInline="true">
      <Label value="Anomaly" background="#e5484d"/>
    </BrushLabels>""",
    ),
    "score": ("Anomaly score (0 to 1)", """<Number name={name} toName={image} min="0" max="1" step="0.0001"/>"""),
}
"""What can be added to a config that lacks it: its header and its tag, without hotkeys that may be taken."""

ADDABLE = tuple(_CONTROLS)

_DEFAULT = """<View>
  <View style="display: flex; gap: 12px; align-items: flex-start">
    <View style="flex: 1 1 60%">
      <Image name="image" value="$image" zoom="true" zoomControl="true" brightnessControl="true"/>
    </View>
    <View style="flex: 1 1 40%">
      {panel}
    </View>
  </View>
  <View style="display: flex; gap: 32px; align-items: flex-start; flex-wrap: wrap">
    <View>
      <Header value="Verdict" size="6"/>
      <Choices name="verdict" toName="image" choice="single" showInline="true" required="true">
        <Choice value="normal" hotkey="n"/>
        <Choice value="anomaly" hotkey="a"/>
      </Choices>
    </View>
    <View>
      <Header value="Defect mask" size="6"/>
      <BrushLabels name="defect" toName="image" showInline="true">
        <Label value="Anomaly" background="#e5484d" hotkey="d"/>
      </BrushLabels>
      <KeyPointLabels name="point" toName="image" smart="true" smartOnly="true" showInline="true">
        <Label value="Find the defect here" background="#3b82f6" hotkey="f"/>
      </KeyPointLabels>
    </View>
    <View>
      <Header value="Anomaly score (0 to 1)" size="6"/>
      <Number name="anomaly_score" toName="image" min="0" max="1" step="0.0001"/>
    </View>
  </View>
</View>
"""


def default_config(heatmap_url: str) -> str:
    """Return the label config of a new project; one data key, so that plain file uploads keep working."""
    return _DEFAULT.format(panel=_panel(heatmap_url, "$image"))


def with_heatmap(xml: str, url: str) -> str:
    """Add the heatmap panel to a label config, or set the address of the one it has; nothing else changes.

    Raises:
        ConfigError: a config that predictions cannot use.
    """
    value = parse(xml).value
    source = value if "$" in value else f"${value}"
    own = _panel_value(xml)
    if own is not None:
        return xml[: own.start] + quoteattr(_address(url, source)) + xml[own.stop :]
    return _inserted(xml, "Anomaly heatmap", _panel(url, source))


def with_controls(xml: str, wanted: Sequence[str]) -> str:
    """Add what a label config lacks of a verdict, a mask and a score; every byte that is there stays.

    Raises:
        ConfigError: a wanted control has no such name, or the config has no Image to add it to.
    """
    unknown = sorted(set(wanted) - set(_CONTROLS))
    if unknown:
        raise ConfigError(f"--add takes {', '.join(_CONTROLS)} with commas between, not {', '.join(unknown)}.")
    image = next(iter(images_of(xml)))
    there: Mapping[str, object] = {}
    try:
        found = parse(xml)
        image, there = found.image, {"verdict": found.choices, "mask": found.mask, "score": found.number}
    except ConfigError:
        pass  # nothing usable yet, which is why somebody asks for it
    for kind in (kind for kind in _CONTROLS if kind in wanted and not there.get(kind)):
        header, tag = _CONTROLS[kind]
        tag = tag.format(name=quoteattr(_free(f"anomaly_{kind}", names_of(xml))), image=quoteattr(image))
        xml = _inserted(xml, header, tag)
    return xml


def _inserted(xml: str, header: str, tag: str) -> str:
    end = _end(xml)
    return f'{xml[:end]}  <View>\n    <Header value="{header}" size="5"/>\n    {tag}\n  </View>\n{xml[end:]}'


def _end(xml: str) -> int:
    """Return where the root's closing tag stands; a later comment may look like one."""
    closing: list[int] = []
    content, parser = xml.encode(), expat.ParserCreate("utf-8")
    parser.EndElementHandler = lambda _name: closing.append(parser.CurrentByteIndex)
    parser.Parse(content, True)
    if not content.startswith(b"</", closing[-1]):
        raise ConfigError("The label config has no closing tag. Correct it in the project's settings.")
    return len(content[: closing[-1]].decode())


def _panel_value(xml: str) -> slice | None:
    """Return where the heatmap panel's quoted address stands, None without one; a comment may look like a panel."""
    found: list[int] = []
    content, parser = xml.encode(), expat.ParserCreate("utf-8")

    def start(tag: str, attributes: Mapping[str, str]) -> None:
        if tag == "Image" and attributes.get("name") == HEATMAP_NAME and "value" in attributes:
            found.append(parser.CurrentByteIndex)

    parser.StartElementHandler = start
    parser.Parse(content, True)
    at = len(content[: found[0]].decode()) + len("<Image") if found else len(xml)
    while attribute := _ATTRIBUTE.match(xml, at):
        if attribute[1] == "value":
            return slice(*attribute.span(2))
        at = attribute.end()
    return None


def _free(name: str, taken: frozenset[str]) -> str:
    number = 1
    found = name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def _panel(url: str, source: str) -> str:
    return f'<Image name="{HEATMAP_NAME}" value={quoteattr(_address(url, source))}/>'


def _address(url: str, source: str) -> str:
    """`$key` stands last: Label Studio fills it in without URL encoding."""
    return f"{url}{'&' if '?' in url else '?'}src={source}"
