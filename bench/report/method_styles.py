"""One colour and one marker per method.

They are the same in every figure and table of the reports.
"""

from __future__ import annotations

from bench.experiments.methods import BASE

# After Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), which colour-blind readers can tell apart. Those too
# light for a white page or too dark for a black one are shifted a little. The markers repeat the distinction.
STYLES: dict[str, tuple[str, str]] = {
    BASE: ("#808080", "X"), "lora": ("#1a7fc0", "o"), "asylora": ("#5cb0dd", "h"), "dora": ("#009e73", "s"),
    "molora": ("#dd9500", "^"), "moasylora": ("#8a7a00", "v"), "malora": ("#d6501c", "D"),
    "malora-small": ("#c76a9b", "d"),
}  # fmt: skip
GLYPHS = {"X": "✕", "o": "●", "h": "⬢", "s": "■", "^": "▲", "v": "▼", "D": "◆", "d": "♦", "P": "✚"}


def style(method: str) -> tuple[str, str]:
    """Return a method's colour and matplotlib marker.

    A variant has the colour of its method.
    """
    return STYLES.get(method) or (STYLES.get(method.partition("-")[0], STYLES[BASE])[0], "P")
