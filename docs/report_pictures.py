"""Pictures of a report, light, dark and on a phone, for ``docs/screenshots.py``."""

import base64
from pathlib import Path
from typing import Any

DESK, PHONE = 1040, 390  # pixels across


def report_picture(browser: Any, report: Path, *, width: int = DESK, dark: bool = False) -> bytes:
    """Takes a picture of a whole report, from its head to its foot.

    Args:
        browser: A selenium Chromium.
        report: The HTML file that CompressionReport or ``selfcompress report`` has written.
        width: Pixels across; below 500 the browser is a phone.
        dark: Whether the system asks for dark pages.

    Returns:
        The picture as PNG.
    """
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    wish = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [wish]})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(report.absolute().as_uri())
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    return base64.b64decode(taken["data"])
