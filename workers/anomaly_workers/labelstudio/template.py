"""Writing a label config: a good one for new projects, the heatmap panel for existing ones."""

from __future__ import annotations

import re
from xml.sax.saxutils import quoteattr

from anomaly_workers.errors import ConfigError
from anomaly_workers.labelstudio.config import HEATMAP_NAME, parse

_PANEL = re.compile(r"<Image\b[^>]*?\bname\s*=\s*(['\"])" + HEATMAP_NAME + r"\1[^>]*>")
_VALUE = re.compile(r"\bvalue\s*=\s*(\"[^\"]*\"|'[^']*')")

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
    own = _PANEL.search(xml)
    if own:
        address = "value=" + quoteattr(_address(url, source))
        return xml[: own.start()] + _VALUE.sub(lambda _match: address, own.group(), count=1) + xml[own.end() :]
    end = xml.rfind("</")
    if end < 0:
        raise ConfigError("The label config has no closing tag. Correct it in the project's settings.")
    panel = f'  <View>\n    <Header value="Anomaly heatmap" size="5"/>\n    {_panel(url, source)}\n  </View>\n'
    return xml[:end] + panel + xml[end:]


def _panel(url: str, source: str) -> str:
    return f'<Image name="{HEATMAP_NAME}" value={quoteattr(_address(url, source))}/>'


def _address(url: str, source: str) -> str:
    """`$key` stands last: Label Studio fills it in without URL encoding."""
    return f"{url}{'&' if '?' in url else '?'}src={source}"
