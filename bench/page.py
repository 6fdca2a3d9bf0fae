"""The picture of the server's page in README.md, taken anew: python -m bench.page.

It takes Chromium (apt-get install chromium), and a picture of the demo model, asked for by keyboard as users do.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from tests.serve.browser import browsing, executable
from tests.serve.server import serving

from sdrt.engines import demo

PROMPT = "a large red star on a blue background"
SIZE = (1000, 790)


def take(program: str) -> bytes:
    """Give a PNG of the page with a finished picture."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        demo.bundle_folder(home)
        with serving(home) as server, browsing(program, home / "browser") as browser:
            server.wait_until_ready()
            browser.open(f"{server.url}/")
            browser.type(PROMPT)
            browser.replace("seed", "42")
            browser.press("Enter")
            browser.until("document.getElementById('status').innerText.startsWith('Done')")
            browser.evaluate("document.activeElement.blur()")
            return browser.screenshot(*SIZE)


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "page.png")
    output = parser.parse_args().output
    program = executable()
    if program is None:
        sys.exit("there is no Chromium: apt-get install chromium")
    with Image.open(io.BytesIO(take(program))) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(output, optimize=True)
    print(f"{output}: {output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
