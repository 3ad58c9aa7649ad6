"""The report: complete, alone in its file, the same twice; and in a real browser it sorts, filters and opens cells without an error."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic_store import cells, make_store, write_cell

from dfqbench.analysis.records import read_store
from dfqbench.analysis.report import report
from dfqbench.analysis.report.report import page
from dfqbench.files import write_json
from dfqbench.quantization import PROTOCOLS
from dfqbench.quantization.protocol_words import in_words
from dfqbench.store import Store
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.load import load_sweep
from dfqbench.sweep.reproduce import config_of, recipe

REFERENCE = Path(__file__).parents[2] / "results" / "reference" / "cifar10-jpeg"


def embedded(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def reference() -> str:
    return page(read_store(Store(REFERENCE)), "reference")


def test_it_is_one_file_that_asks_nobody_for_anything(reference: str) -> None:
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", reference)
    assert "@import" not in reference
    assert not re.search(r"url\((?!['\"]?data:)", reference.split("<main>")[0])
    assert "fetch(" not in reference
    assert "XMLHttpRequest" not in reference


def test_the_same_store_gives_the_same_bytes(reference: str, tmp_path: Path) -> None:
    shutil.copytree(REFERENCE, tmp_path / "elsewhere")
    assert page(read_store(Store(tmp_path / "elsewhere")), "reference") == reference


def test_every_cell_is_in_it_with_its_numbers_provenance_log_and_images(reference: str) -> None:
    data = embedded(reference)
    results = {r["id"]: r for r in read_store(Store(REFERENCE)).results}
    assert {cell["id"] for cell in data["cells"]} == set(results)
    for cell in data["cells"]:
        result = results[cell["id"]]
        assert cell["top1"] == pytest.approx(result["top1"], abs=1e-4)
        assert data["shared"][cell["config"]] == result["cell"]["identity"]["config"]
        assert data["shared"][cell["provenance"]]["git"] == result["provenance"]["git"]
        assert "done: top-1" in cell["log"]
        if result["last_epoch"]:
            assert cell["curve"]["epoch"][-1] == result["last_epoch"]
            assert data["images"][cell["images"]].startswith("data:image/webp;base64,")
    shared = {cell["images"] for cell in data["cells"] if cell["images"] is not None}
    assert len(data["images"]) == len(shared) < sum(cell["images"] is not None for cell in data["cells"]), "lockstep cells share one sheet"


def test_text_of_a_store_cannot_become_markup(tmp_path: Path) -> None:
    store = Store(tmp_path / "r")
    evil = "</script><script>alert(1)</script>"
    for cell in list(cells(2)):
        result = write_cell(store, cell)
        result["cell"]["label"] = result["cell"]["teacher"]["label"] = result["cell"]["evaluation"]["name"] = evil
        write_json(store.folder(cell.id) / "result.json", result)
    (store.folder(result["id"]) / "log.txt").write_text(evil)
    write_json(store.folder("000000000001") / "failed.json", {"kind": evil, "message": evil, "traceback": evil, "time": 0})
    text = page(read_store(store), evil)
    assert evil not in text
    assert text.count("<script") == 2
    assert {cell["method"] for cell in embedded(text)["cells"]} == {evil}


def test_failures_and_skipped_files_are_listed(tmp_path: Path) -> None:
    store = make_store(tmp_path / "r", 5)
    first = store.ids()[0]
    (store.folder(first) / "result.json").write_text("{")
    write_json(
        store.folder("000000000001") / "failed.json",
        {"kind": "Diverged", "message": "the loss is nan in epoch 3", "traceback": "Traceback x", "time": 0},
    )
    text = page(read_store(store), "t")
    assert "the loss is nan in epoch 3" in text
    assert "Traceback x" in text
    assert f"runs/{first}/result.json: damaged" in text
    assert "1 cell diverged. 1 file could not be read and is listed at the end." in text


@pytest.mark.parametrize(
    "on", [{"evaluate": "digits"}, {"evaluate": "none"}, {"evaluate": "none", "selection": {"images": "gznq", "seed": 7, "count": 9}}]
)
def test_the_recipe_of_a_cell_spans_exactly_that_cell(
    sweep_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: dict[str, Any]
) -> None:
    """What the report tells people to run has the same id, so it is the same experiment."""
    config = sweep_file(
        methods=["gdfq", {"acq": {"matching_weight": 0.5}}, "gznq", "round"],
        protocol={"base": "lineage", "first_bits": 8},
        precision="bf16",
        seeds=[3],
        **on,
    )
    loaded = load_sweep(config, cache_folder())
    assert len(loaded.cells) == 8
    monkeypatch.chdir(Path(yaml.safe_load(config.read_text())["teachers"][0].rpartition(":")[0]).parent)  # where the teacher's file is
    for cell in loaded.cells:
        record = cell.record()
        provenance = {"git": "abc", "device": "cpu", "threads": 2}
        text = (
            recipe({"cell": record, "provenance": provenance})
            .replace("{id}", cell.id)
            .replace("{bits}", str(cell.bits))
            .replace("{seed}", str(cell.seed))
        )
        (tmp_path / "cell.yaml").write_text(text.split("<<'END'\n")[1].split("\nEND")[0])
        (again,) = load_sweep(tmp_path / "cell.yaml", cache_folder()).cells
        assert again.identity() == cell.identity()
        assert again.id == cell.id
        assert text.splitlines()[-1] == "dfqbench run cell.yaml --device cpu --threads 2"


def test_a_recipe_names_the_files_that_a_user_must_bring() -> None:
    result = read_store(Store(REFERENCE)).results[0]
    text = recipe(result)
    assert "export TEACHER_WEIGHTS=resnet20_cifar10_jpeg.safetensors" in text
    assert "export EVALUATION_SET=path/to/images   # 10000 images" in text
    assert config_of(result["cell"])["teachers"][0]["weights"] == "${TEACHER_WEIGHTS}"


def test_protocols_are_told_in_words() -> None:
    lineage, hardware = (in_words(PROTOCOLS[name].fingerprint()) for name in ("lineage", "hardware"))
    assert "one range per output channel, on an asymmetric grid" in lineage
    assert "The network's input stays float." in lineage
    assert "the first layer has 8 bits, the last 8 bits" in hardware
    assert "is folded into the layer before it" in hardware
    assert "new_rule: 7." in in_words({"new_rule": 7})


# --- in a browser -----------------------------------------------------------------------------------------------------


def skip_or_fail(why: str) -> None:
    if os.environ.get("DFQBENCH_REQUIRE_BROWSER") == "1":
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium without a window, without a network."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        skip_or_fail("no chromium and chromedriver here (on Debian: apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
    ]
    for word in [
        *words,
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--window-size=1280,900",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ]:
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    found.execute_cdp_cmd("Network.enable", {})
    found.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0})
    yield found
    found.quit()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with 2,000 cells; without plots, which are not the matter here."""
    folder = tmp_path_factory.mktemp("many")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "KINDS", {})
        (folder / "report.html").write_text(page(read_store(make_store(folder / "r", 2000, sized=True)), "many"))
    return folder / "report.html"


def lines(browser: Any) -> list[list[str]]:
    """The texts of the cell table as it is now."""
    return browser.execute_script(  # type: ignore[no-any-return]
        "return [...document.querySelectorAll('#cell-table tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )


def column(browser: Any, name: str) -> int:
    heads = browser.execute_script("return [...document.querySelectorAll('#cell-table th')].map(h => h.textContent)")
    return int(heads.index(name))


def press(browser: Any, script: str) -> None:
    browser.execute_script(script)


def test_in_a_browser_2000_cells_sort_filter_and_open_without_an_error(browser: Any, many: Path) -> None:
    browser.get(f"file://{many}")
    assert len(lines(browser)) == 100, "a chunk, not all of them"
    assert browser.execute_script("return document.getElementById('count').textContent") == "2000 of 2000 cells"

    assert {float(line[column(browser, "MB")]) for line in lines(browser)} <= {0.111, 0.143, 0.175, 0.207, 0.271}
    top1 = column(browser, "top-1")
    head = f"document.querySelectorAll('#cell-table th')[{top1}]"
    press(browser, f"{head}.click()")
    shown = [float(line[top1]) for line in lines(browser)]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] == max(cell["top1"] for cell in embedded(many.read_text())["cells"])
    press(browser, f"{head}.click()")
    shown = [float(line[top1]) for line in lines(browser)]
    assert shown == sorted(shown)
    assert browser.execute_script(f"return {head}.getAttribute('aria-sort')") == "ascending"

    press(browser, "const s = document.getElementById('search'); s.value = 'zaq W3A3'; s.dispatchEvent(new Event('input'))")
    assert browser.execute_script("return document.getElementById('count').textContent") == "40 of 2000 cells"
    assert all(line[column(browser, "method")] == "zaq" and line[column(browser, "bits")] == "w3a3" for line in lines(browser))
    press(browser, "const t = document.querySelector('select[data-key=teacher]'); t.value = 'resnet32'; t.dispatchEvent(new Event('change'))")
    assert len(lines(browser)) == 5
    press(browser, "const s = document.getElementById('search'); s.value = 'no such cell'; s.dispatchEvent(new Event('input'))")
    assert lines(browser) == []
    press(browser, "const s = document.getElementById('search'); s.value = ''; s.dispatchEvent(new Event('input'))")
    press(browser, "const t = document.querySelector('select[data-key=teacher]'); t.value = ''; t.dispatchEvent(new Event('change'))")

    press(browser, "const s = document.getElementById('scroller'); s.scrollTop = s.scrollHeight; s.dispatchEvent(new Event('scroll'))")
    assert len(lines(browser)) >= 200

    cell_id = lines(browser)[0][column(browser, "cell")]
    press(browser, "document.querySelector('#cell-table tbody tr').click()")
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 10).until(lambda b: b.execute_script("return document.getElementById('panel').open"))
    panel = browser.execute_script("return document.getElementById('panel-body').textContent")
    for said in (f"cell {cell_id}", "dfqbench run cell.yaml", "Measured on", "milestones", "done: top-1", "smaller than the teacher's 1.03 MB"):
        assert said in panel
    assert browser.execute_script("return location.hash") == f"#cell={cell_id}"
    press(browser, "document.getElementById('close').click()")
    assert not browser.execute_script("return document.getElementById('panel').open")
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_in_a_browser_the_reference_report_shows_its_plots_and_images(browser: Any, reference: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(reference)
    browser.get(f"file://{tmp_path}/report.html#cell=810790601328")
    assert browser.execute_script("return document.getElementById('panel').open"), "an address leads to its cell"
    assert browser.execute_script("return document.querySelectorAll('#panel-body .charts svg').length") == 1
    heads = browser.execute_script("return [...document.querySelectorAll('#cell-table th')].map(h => h.textContent)")
    assert not {"MB", "GBOPs"} & set(heads), "its results have no size"
    broken = "return [...document.images].filter(i => !i.complete || i.naturalWidth === 0).length"
    assert browser.execute_script(broken) == 0
    assert browser.execute_script("return document.querySelectorAll('#plots figure img').length") >= 3
    first = "[...document.querySelectorAll('#tables tbody tr')].map(r => r.cells[0].textContent)"
    assert browser.execute_script(f"return {first}") == ["round", "gdfq"]
    press(browser, "document.querySelector('#tables th').click()")
    assert browser.execute_script(f"return {first}") == ["gdfq", "round"]
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


@pytest.mark.parametrize("width", [380, 1280])
def test_in_a_browser_nothing_is_wider_than_the_window(browser: Any, many: Path, width: int) -> None:
    browser.set_window_size(max(width, 500), 900)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})
    browser.get(f"file://{many}")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
