"""Takes the pictures of TensorBoard and of the terminal that the documentation shows.

    pip install selenium pillow rich
    apt-get install chromium chromium-driver
    python docs/screenshots.py                  # all pictures, into docs/images
    python docs/screenshots.py images hparams   # some of them

It trains the demo's small network on scikit-learn's digits twice, with two gammas, opens TensorBoard on the runs in a
headless Chromium, and looks at one tab after another. A new picture is a function with ``@picture`` that gets a Stage.
Look at each picture before it is committed.
"""

import argparse
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report_pictures

FOLDER = Path(__file__).parent / "images"
LARGEST = 100_000  # bytes of a picture
GAMMAS = 0.1, 0.6
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
TRAINING = """
import sys
import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_selfcompress import SelfCompression
from lightning_selfcompress.demo import DigitsData, DigitsNet

folder, gamma, epochs = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
pl.seed_everything(0, verbose=False)
logger = TensorBoardLogger(folder, name="", version=f"gamma_{gamma:g}")
callbacks = [SelfCompression(gamma), TQDMProgressBar()]
trainer = pl.Trainer(
    max_epochs=epochs, callbacks=callbacks, logger=logger, log_every_n_steps=10, enable_model_summary=False
)
trainer.fit(DigitsNet(), datamodule=DigitsData())
"""


@dataclass
class Stage:
    """What a picture is taken of.

    Args:
        browser: A selenium browser.
        url: TensorBoard's address.
        runs: The folder of the runs.
        said: What the trainings have written to a terminal.
    """

    browser: Any
    url: str
    runs: Path
    said: str

    def tab(self, name: str, *, width: int = 1280, height: int = 720, seconds: float = 8) -> None:
        """Opens a tab of TensorBoard, and waits for its curves, which are drawn bit by bit."""
        self.browser.set_window_size(width, height)
        self.browser.get("about:blank")
        self.browser.get(f"{self.url}/{name}")
        time.sleep(seconds)

    def seen(self) -> bytes:
        """Takes a picture of the window as it is."""
        return bytes(self.browser.get_screenshot_as_png())

    def press(self, text: str) -> None:
        """Presses the button of this text."""
        buttons = "[...document.querySelectorAll('button')]"
        self.browser.execute_script(f"{buttons}.find(b => b.textContent.trim().endsWith('{text}')).click()")
        time.sleep(3)


Take = Callable[[Stage], bytes]
PICTURES: dict[str, Take] = {}


def picture(take: Take) -> Take:
    """Adds a picture, under the name of its function."""
    PICTURES[take.__name__] = take
    return take


@picture
def scalars(stage: Stage) -> bytes:
    """The totals, which come first."""
    stage.tab("?tagFilter=%5Eselfcompress%2F#timeseries", width=1500, height=1150)
    stage.press("Settings")
    return stage.seen()


@picture
def custom_scalars(stage: Stage) -> bytes:
    """Accuracy and size in one chart."""
    stage.tab("#custom_scalars", height=560)
    return stage.seen()


@picture
def images(stage: Stage) -> bytes:
    """The bits of every channel."""
    stage.tab("#images", height=620)
    return stage.seen()


@picture
def hparams(stage: Stage) -> bytes:
    """Runs side by side."""
    stage.tab("#hparams", height=420)
    return stage.seen()


@picture
def terminal(stage: Stage) -> bytes:
    """What a training writes, drawn by rich as a terminal would."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=124, file=io.StringIO(), force_terminal=True)
    for line in _without_old_bars(stage.said.splitlines()):
        console.print(Text.from_ansi(line), no_wrap=True, overflow="ellipsis")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "terminal.html"
        page.write_text(f"<body style='margin:0'>{console.export_svg(title='python train.py')}</body>")
        stage.browser.set_window_size(1280, 1200)
        stage.browser.get(page.as_uri())
        time.sleep(1)
        return bytes(stage.browser.find_element("tag name", "svg").screenshot_as_png)


@picture
def report(stage: Stage) -> bytes:
    """The report of a run."""
    return report_pictures.report_picture(stage.browser, report_pictures.train(stage.runs / "report"))


@picture
def report_dark(stage: Stage) -> bytes:
    """The same, where the system is dark."""
    return report_pictures.report_picture(stage.browser, report_pictures.train(stage.runs / "report"), dark=True)


@picture
def report_phone(stage: Stage) -> bytes:
    """The same, on a phone."""
    made, width = report_pictures.train(stage.runs / "report"), report_pictures.PHONE
    return report_pictures.report_picture(stage.browser, made, width=width)


def _without_old_bars(lines: list[str]) -> list[str]:
    """Returns lines without the bars of validation, which go, and of earlier epochs, which are drawn over."""
    of_epochs = [i for i, line in enumerate(lines) if line.startswith("Epoch ")]
    bars = ("Epoch ", "Validation", "Sanity", "Training:")
    return [line for i, line in enumerate(lines) if i in of_epochs[-1:] or not line.startswith(bars)]


def train(runs: Path, epochs: int) -> str:
    """Trains one network for each gamma; returns what a terminal shows of the last one."""
    said = ""
    for gamma in GAMMAS:
        arguments = [sys.executable, "-W", "ignore", "-c", TRAINING, str(runs), str(gamma), str(epochs)]
        done = subprocess.run(
            arguments, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment()
        )
        said = done.stdout.decode()
    return _as_a_terminal_shows(said)


def _environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}


def _as_a_terminal_shows(said: str) -> str:
    """Returns lines as they stand in the end: what follows a carriage return overwrites what was there."""
    lines = [line.split("\r")[-1].replace("\x1b[A", "").rstrip() for line in said.split("\n")]
    kept = [line for line in lines if line and not line.startswith(("GPU", "TPU", "💡", "Loading"))]
    return "\n".join(dict.fromkeys(kept))


@contextmanager
def tensorboard(runs: Path) -> Iterator[str]:
    """Runs TensorBoard on a free port; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--logdir", runs.name, "--port", str(port), "--reload_interval", "0", "--samples_per_plugin=images=99"]
    command = [sys.executable, "-m", "tensorboard.main", *arguments]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=runs.parent)  # which shows the path it is given
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5)
                break
            except OSError:
                time.sleep(1)
        time.sleep(5)  # until it has read the runs
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@contextmanager
def chromium() -> Iterator[Any]:
    """Starts a headless Chromium with an empty profile."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            yield browser
        finally:
            browser.quit()


def compressed(png: bytes) -> bytes:
    """Returns a picture of fewer colours, and of fewer pixels where it is still too large."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    while True:
        out = io.BytesIO()
        image.quantize(96).save(out, "PNG", optimize=True)
        if len(out.getvalue()) <= LARGEST:
            return out.getvalue()
        image = image.resize((image.width * 9 // 10, image.height * 9 // 10), Image.Resampling.LANCZOS)


def main() -> None:
    """Takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*PICTURES, []], help="which pictures; all if none is named")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--runs", type=Path, help="a folder that keeps the runs; if there are some they are taken")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        runs = options.runs or Path(temporary) / "runs"
        log = runs / "terminal.txt"
        if not log.exists():
            said = train(runs, options.epochs)
            log.write_text(said)
        with tensorboard(runs) as url, chromium() as browser:
            for name in options.names or PICTURES:
                data = compressed(PICTURES[name](Stage(browser, url, runs, log.read_text())))
                (FOLDER / f"{name}.png").write_bytes(data)
                print(f"{FOLDER / name}.png: {len(data):,} bytes", flush=True)


if __name__ == "__main__":
    main()
