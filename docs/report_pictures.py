"""Pictures of a report, light, dark and on a phone; ``docs/screenshots.py`` takes them."""

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

DESK, PHONE = 1040, 390  # pixels across
TRAINING = """
import sys
import lightning.pytorch as pl
from lightning_selfcompress import CompressionReport, ParetoCheckpoint, SelfCompression
from lightning_selfcompress.demo import DigitsData, DigitsNet

folder = sys.argv[1]
pl.seed_everything(0, verbose=False)
kept = ParetoCheckpoint(monitor="val/accuracy", dirpath=f"{folder}/checkpoints")
callbacks = [SelfCompression(gamma=0.6), kept, CompressionReport(f"{folder}/report.html")]
trainer = pl.Trainer(max_epochs=30, callbacks=callbacks, logger=False, enable_progress_bar=False)
trainer.fit(DigitsNet(), datamodule=DigitsData())
"""


def train(folder: Path) -> Path:
    """Trains the demo's network on digits, unless it has been done; returns its report."""
    report = folder / "report.html"
    if not report.exists():
        script = folder / "train.py"  # the command in the report
        folder.mkdir(parents=True, exist_ok=True)
        script.write_text(TRAINING)
        subprocess.run([sys.executable, "-W", "ignore", "train.py", "."], check=True, cwd=folder)
    return report


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
