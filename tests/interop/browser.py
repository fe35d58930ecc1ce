"""A headless Chromium, driven through ChromeDriver by the WebDriver protocol (https://www.w3.org/TR/webdriver2/)."""

import base64
import json
import subprocess
import urllib.error
import urllib.request

# Whatever proxy the environment names is not for us.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    # It looks at the pages that it is told to, and at nothing else.
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]


class Browser:
    """One window. The driver runs until `close`."""

    def __init__(self, chromedriver, chromium, port):
        self.driver = subprocess.Popen(
            [chromedriver, f"--port={port}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        self.url = f"http://127.0.0.1:{port}"
        self.chromium = chromium
        self.session = None

    def is_up(self):
        try:
            return self.call("GET", "/status")["ready"]
        except (urllib.error.URLError, ConnectionError):
            return False

    def open(self, url, dark=False):
        if self.session is None:
            options = {"binary": self.chromium, "args": FLAGS}
            wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}}
            self.session = "/session/" + self.call("POST", "/session", wanted)["sessionId"]
        scheme = "dark" if dark else "light"
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        command = {"cmd": "Emulation.setEmulatedMedia", "params": feature}
        self.call("POST", self.session + "/goog/cdp/execute", command)
        self.call("POST", self.session + "/url", {"url": url})

    def size(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        self.call("POST", self.session + "/goog/cdp/execute", command)

    def run(self, script):
        """What JavaScript returns in the page."""
        return self.call("POST", self.session + "/execute/sync", {"script": script, "args": []})

    def complaints(self):
        """What the page's console says: errors, blocked requests."""
        return self.call("POST", self.session + "/se/log", {"type": "browser"})

    def screenshot(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.call("GET", self.session + "/screenshot")))

    def close(self):
        if self.session:
            self.call("DELETE", self.session)
        self.driver.terminate()
        self.driver.wait()

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        try:
            with OPENER.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {error.read().decode()[:500]}") from None
