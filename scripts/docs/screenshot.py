"""A page as it looks, small enough for the docs: the top of it, cut into columns beside each other.

    python scripts/docs/screenshot.py results/quickstart/base/seed-0/report.html docs/images/report.png

Needs chromium (or what CHROMIUM names). Fewer colours are used until the picture has at most 100 kB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

MOST = 100 * 1024  # bytes
WIDTH = 1000  # pixels of the picture


def shoot(page: Path, *, width: int, height: int) -> Image.Image:
    """The top of a page in a window of that size.

    Raises:
        SystemExit: If there is no browser.
    """
    browser = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no chromium here: install it, or name a browser in CHROMIUM")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--window-size={width},{height}", f"--user-data-dir={folder}/profile", f"--screenshot={shot}"]
        subprocess.run([*command, page.resolve().as_uri()], check=True, capture_output=True, timeout=300)
        with Image.open(shot) as picture:
            return picture.convert("RGB")


def columns(picture: Image.Image, count: int) -> Image.Image:
    """A high picture, cut across and put together side by side."""
    height = picture.height // count
    whole = Image.new("RGB", (picture.width * count, height), "white")
    for number in range(count):
        piece = picture.crop((0, number * height, picture.width, (number + 1) * height))
        whole.paste(piece, (number * picture.width, 0))
    return whole.resize((WIDTH, round(height * WIDTH / whole.width)), Image.Resampling.LANCZOS)


def save_small(picture: Image.Image, out: Path) -> None:
    """Write it in as many colours as fit into `MOST` bytes."""
    for colours in (128, 96, 64, 48, 32, 24, 16):
        picture.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(out, optimize=True)
        if out.stat().st_size <= MOST:
            return
    raise SystemExit(f"{out}: more than {MOST} bytes in 16 colours; show less of the page (--height)")


def main() -> None:
    """Shoot, cut, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="an HTML file")
    parser.add_argument("out", type=Path, help="a .png file")
    parser.add_argument("--width", type=int, default=1100, help="of the window")
    parser.add_argument("--height", type=int, default=3000, help="how much of the page is shown")
    parser.add_argument("--columns", type=int, default=2)
    given = parser.parse_args()
    save_small(columns(shoot(given.page, width=given.width, height=given.height), given.columns), given.out)
    print(f"{given.out}: {given.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
