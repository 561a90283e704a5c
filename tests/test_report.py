"""The report, in a real browser: the numbers beside the slider are those of the stored profiles."""

import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from stem_dask.cli.main import main

CHROMIUM = shutil.which("chromium")

browser_only = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs chromium and playwright",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a scan whose beam wanders, its analysis, and a crop."""
    folder = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(5)
    y, x = np.indices((48, 40))
    scan = np.empty((7, 6, 48, 40), "u2")
    for i in np.ndindex(7, 6):
        beam = 300 * np.exp(-((y - 22 - i[0] / 4) ** 2 + (x - 19) ** 2) / (20 + 4 * i[1]))
        scan[i] = rng.poisson(beam)
    np.save(folder / "scan.npy", scan)
    code = (
        "from stem_dask.cli.main import main; import sys;"
        "sys.exit(main(['analyze', 'scan.npy']) or main(['run', 'scan.npy', 'output.path=out.zarr', 'output.export=[]']))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    page = browser.new_page()
    page.problems = []
    page.on("console", lambda m: page.problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith("file:") else page.problems.append(r.url))
    yield page
    problems = page.problems
    page.close()
    assert problems == []


def shown(page: Any) -> tuple[str, str]:
    return page.inner_text("#shown-window"), page.inner_text("#shown-retention")


def words(kept: Any) -> str:
    return f"mean {100 * kept.mean():.2f} %, min {100 * kept.min():.2f} %"


@browser_only
@pytest.mark.parametrize("name", ["out", "scan"])
def test_the_slider_shows_the_profiles(made: Path, page: Any, name: str) -> None:
    store = made / ("out.zarr" if name == "out" else "scan_analysis.zarr")
    with xr.open_zarr(store, group="analysis") as known:
        profile, retention = known.profile.values, known.retention.values
        largest = list(known.mean_pattern.shape)
    page.goto((made / f"{name}_report.html").as_uri())
    assert shown(page)[1] == words(retention)
    start = page.input_value("#size")
    page.focus("#size")
    page.keyboard.press("ArrowLeft")
    size = int(start) - 2
    assert page.input_value("#number") == str(size)
    sides = [min(size, full) for full in largest]
    assert shown(page) == (f"{sides[0]} x {sides[1]} px", words(profile[..., size // 2]))
    assert f"--size {size}" in page.inner_text("#line") or "crop.size" in page.inner_text("#line")
    page.fill("#number", "12")
    page.press("#number", "Enter")
    assert shown(page) == ("12 x 12 px", words(profile[..., 6]))
    below = int((profile[..., 6] < 0.95).sum())
    assert f"{below} of 42 patterns keep less than 0.95" in page.inner_text("#shown-rest")


@browser_only
def test_the_line_to_paste_runs(made: Path, page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    page.goto((made / "scan_report.html").as_uri())
    page.fill("#number", "16")
    page.press("#number", "Enter")
    line = shlex.split(page.inner_text("#line"))
    assert line[:2] == ["stem-dask", "crop"]
    monkeypatch.chdir(made)
    assert main([*line[1:], "-q"]) == 0
    with xr.open_zarr("scan_16.zarr") as store:
        assert store.patterns.shape[-2:] == (16, 16)


@browser_only
def test_positions_and_targets(made: Path, page: Any) -> None:
    with xr.open_zarr(made / "out.zarr", group="analysis") as known:
        radius, total = known.radius.values, known.total.values
    page.goto((made / "out_report.html").as_uri())
    page.focus("#specimen")
    for _ in range(20):
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowLeft")
    text = page.inner_text("#position")
    assert text.startswith("row 0, column 0")
    page.keyboard.press("ArrowRight")
    text = page.inner_text("#position")
    assert f"radius {radius[0, 1]:g}" in text
    assert f"total {total[0, 1]:g}" in text
    page.select_option("#targets", "4")
    assert float(shown(page)[1].split()[1]) >= 95


@browser_only
def test_the_pattern_of_a_position_is_drawn(made: Path, page: Any) -> None:
    """The scan has fewer patterns than there are thumbnails: each position shows its own."""
    patterns = np.load(made / "scan.npy")
    with xr.open_zarr(made / "out.zarr", group="analysis") as known:
        least = int(known.retention.values.argmin())
    page.goto((made / "out_report.html").as_uri())
    page.click(f"button[data-index='{least}']")
    row, column = divmod(least, 6)
    assert page.inner_text("#pattern-of") == f"row {row}, column {column}"
    assert page.inner_text("#position").startswith(f"row {row}, column {column}:")
    read = "(c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data))"
    drawn = page.evaluate(f"{read}(document.getElementById('pattern'))")
    width = page.evaluate("document.getElementById('pattern').width")
    times = width // 40
    drawn = np.reshape(drawn, (-1, width, 4))[times // 2 :: times, times // 2 :: times, 0]
    expected = np.log1p(patterns[row, column].astype(float))
    beam = np.s_[18:28, 15:24]  # within the window, whose frame is drawn over the pattern
    np.testing.assert_array_equal(
        drawn[beam], np.rint(255 * expected / expected.max()).astype("u1")[beam]
    )
    assert page.locator("svg title").count() > 1


def test_several_inputs_share_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scan = np.zeros((2, 3, 24, 20), "u2")
    scan[..., 8:15, 7:13] = 9
    np.save("a&b.npy", scan)
    (tmp_path / "broken.npy").write_text("no data")
    given = ["run", "a&b.npy", "broken.npy", "output.path=out/{stem}.zarr", "output.export=[]"]
    assert main([*given, "-q"]) == 3
    text = (tmp_path / "out" / "batch_report.html").read_text("utf-8")
    assert "1 of 2 complete" in text
    assert '<a href="a%26b_report.html">a&amp;b.npy</a>' in text
    assert (tmp_path / "out" / "a&b_report.html").is_file()
    assert "<td>14 x 14 px</td><td>100.00 %</td><td>100.00 %</td><td>ok</td><td>0</td>" in text
    assert "broken.npy</th>" in text
    assert "<td>3</td>" in text
    assert text.count("<img alt=") == 1


@browser_only
def test_a_list_of_patterns_is_drawn_in_rows(
    tmp_path: Path, page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scan = np.zeros((30, 24, 20), "u2")
    scan[:, 8:15, 7:13] = np.arange(1, 31)[:, None, None]
    np.save("list.npy", scan)
    assert main(["analyze", "list.npy", "-q"]) == 0
    page.goto((tmp_path / "list_report.html").as_uri())
    page.click("#specimen", position={"x": 1, "y": 1})
    assert page.inner_text("#position").startswith("pattern 0:")
    area = page.locator("#specimen").bounding_box()
    assert area["height"] > area["width"] / 2
    page.keyboard.press("ArrowDown")  # rows of 6
    assert page.inner_text("#position").startswith("pattern 6:")
    assert f"total {7 * 42}" in page.inner_text("#position")
    assert page.inner_text("#pattern-of") == "pattern 6"


@browser_only
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone(made: Path, browser: Any, scheme: Any) -> None:
    page = browser.new_page(viewport={"width": 380, "height": 800}, color_scheme=scheme)
    page.goto((made / "out_report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    assert page.evaluate("document.documentElement.lang") == "en"
    unnamed = "Array.from(document.querySelectorAll('canvas')).filter(c => !c.ariaLabel).length"
    assert page.evaluate(unnamed) == 0
    page.close()


def test_a_conversion_has_a_report_without_analysis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("<a>.npy", np.ones((2, 3, 6, 4), "u2"))
    assert main(["run", "<a>.npy", "crop.enabled=false", "output.path=b.zarr", "-q"]) == 0
    page = (tmp_path / "b_report.html").read_text("utf-8")
    assert "&lt;a&gt;.npy, 2 x 3 x 6 x 4 uint16" in page
    assert "<a>.npy" not in page
    assert "no analysis" in page


def test_a_large_scan_is_quick(tmp_path: Path) -> None:
    """16,384 patterns in 2 s, and a page below 15 MB."""
    from stem_dask.job.report import _curves

    profile = np.linspace(0, 1, 65, dtype="f4") * np.ones((128, 128, 1), "f4")
    total = np.ones((128, 128))
    stored = xr.Dataset({"profile": (("scan_y", "scan_x", "profile_radius"), profile)})
    stored.profile.encoding["chunks"] = (32, 128, 65)
    start = time.perf_counter()
    limits = {"min_retention": 0.5, "target_retention": 0.98}
    curve, targets = _curves(stored, total, limits, 2)
    assert time.perf_counter() - start < 2
    np.testing.assert_allclose(curve["mean"], np.linspace(0, 1, 65), atol=1e-6)
    assert curve["below"][31] == 128 * 128
    assert curve["below"][32] == 0
    assert {one["target"]: one["size"] for one in targets}[0.9] == 116
