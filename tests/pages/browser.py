"""A browser without a window, and a server of the built pages for it."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def why_not() -> str | None:
    """What is missing for a browser, or None."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "the package selenium is not installed"
    if not any(map(shutil.which, BROWSERS)):
        return f"no browser is installed ({', '.join(BROWSERS)})"
    return None if shutil.which("chromedriver") else "chromedriver is not installed"


class _Silent(http.server.SimpleHTTPRequestHandler):
    failed: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.failed.append(f"{code} {self.path}")
        super().send_error(code, message, explain)


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a folder, and what was asked for in vain."""
    failed: list[str] = []
    handler = functools.partial(type("Handler", (_Silent,), {"failed": failed}), directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", failed
        server.shutdown()
        thread.join()


@contextmanager
def opened() -> Iterator[Any]:
    """A browser."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(word)
    # What a page writes to its console, and every answer that is no success.
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.set_script_timeout(60)
        yield driver
    finally:
        driver.quit()


def resize(driver: Any, width: int) -> None:
    """Give pages a screen of that many pixels; a narrow one is that of a phone."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
