"""A headless Chromium for the tests of pages; they skip with a reason where there is none."""

import contextlib
import shutil
import time

import pytest


def find_browser() -> tuple[str, str]:
    """The programs of Chromium and of its driver."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    return browser, driver


@contextlib.contextmanager
def open_browser(width=1280, height=1400, camera=None):
    """A browser with a made-up camera, which takes all rights; `camera` is a Y4M or MJPEG file that it shows."""
    selenium = pytest.importorskip("selenium.webdriver", reason="needs Selenium: pip install selenium")
    browser, driver = find_browser()
    options = selenium.ChromeOptions()
    options.binary_location = browser
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", f"window-size={width},{height}"):
        options.add_argument(f"--{argument}")
    options.add_argument("--use-fake-device-for-media-stream")
    options.add_argument("--use-fake-ui-for-media-stream")
    if camera is not None:
        options.add_argument(f"--use-file-for-fake-video-capture={camera}")
    page = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    try:
        page.set_script_timeout(30)
        yield page
    finally:
        page.quit()


def wait_for(condition, seconds=120):
    """What `condition()` gives once it gives something; an element that the page has replaced meanwhile is nothing."""
    gone = pytest.importorskip("selenium.common.exceptions").StaleElementReferenceException
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(gone):
            if found := condition():
                return found
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.1)
