"""The report: complete, alone in its file, the same twice; and in a real browser it sorts, filters and opens cells without an error."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run
from synthetic_store import cells, make_store, without_data, write_cell, write_failure, write_without_data

from dfqbench.analysis.records import read_store
from dfqbench.analysis.report import pictures
from dfqbench.analysis.report.report import page, root_from
from dfqbench.analysis.report.site import page_names, site, write_site
from dfqbench.data import own
from dfqbench.errors import UserError
from dfqbench.files import write_json
from dfqbench.quantization import PROTOCOLS, find_protocol
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
            assert data["images"][cell["images"][0]].startswith("data:image/webp;base64,")
    sheets = [cell["images"][0] for cell in data["cells"] if cell["images"]]
    assert len(data["images"]) == len(set(sheets)) < len(sheets), "lockstep cells share one sheet"


EVIL = """</script><script>alert(1)</script><img src=x onerror=alert(2)>"'`{{7*7}}&lt;"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store in which every text that a user can write would be markup."""
    store = Store(tmp_path_factory.mktemp("hostile") / "r", writable=True)
    for cell in list(cells(2)):
        result = write_cell(store, cell)
        named = {"label": EVIL, "name": EVIL, "group": EVIL}
        result["cell"] |= named
        result["cell"]["teacher"]["label"] = result["cell"]["evaluation"]["name"] = result["cell"]["protocol"] = EVIL
        result["provenance"]["device_name"] = EVIL
        write_json(store.folder(cell.id) / "result.json", result)
    (store.folder(result["id"]) / "log.txt").write_text(EVIL)
    write_json(store.folder("000000000001") / "failed.json", {"kind": EVIL, "message": EVIL, "traceback": EVIL, "time": 0})
    return store


def test_text_of_a_store_cannot_become_markup(hostile: Store) -> None:
    reading = read_store(hostile)
    text = page(reading, EVIL)
    assert text.count("<script") == 2
    for its in (text, *(content.decode() for name, content in site(reading, EVIL).items() if name.endswith(".html"))):
        assert EVIL not in its
        assert "<img src=x" not in its.replace("\\u003c", "\\")
        assert "49" not in re.sub(r"<script.*?</script>|base64,\S+|images/\w+", "", its, flags=re.DOTALL), "no text is a template"
    assert {cell["method"] for cell in embedded(text)["cells"]} == {EVIL}


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


def test_the_table_comes_first_best_row_first_with_what_diverged_last_and_when(tmp_path: Path) -> None:
    store = Store(tmp_path / "r", writable=True)
    three = [cell for cell in cells(250) if str(cell.bits) in ("w4a4", "w3a3") and cell.seed < 2 and not cell.changed][:12]
    diverging = three[0].method
    for cell in three:
        if cell.method == diverging and str(cell.bits) == "w3a3":
            write_failure(store, cell)
        else:
            write_cell(store, cell)
    text = page(read_store(store), "t")
    (table,) = re.findall(r'<table class="sortable key">(.*?)</table>', text, re.DOTALL)
    heads = re.findall(r"<th scope=\"col\"[^>]*>([^<]*)</th>", table)
    assert heads[:3] == ["method", "W4A4", "W3A3"], "accuracies stand beside the names"
    rows = [re.sub(r"<[^>]*>", "|", row) for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)[1:]]
    means = [float(re.findall(r"\|(\d+\.\d+)", row)[1]) for row in rows[:-1]]
    assert means == sorted(means, reverse=True)
    assert diverging in rows[-1]
    assert "diverged" in rows[-1]
    assert "epoch 5" in rows[-1]
    assert text.index('class="sortable key"') < text.index('<figure class="plot">') < text.index('id="comparisons"')
    lost = [cell for cell in embedded(text)["cells"] if cell.get("status")]
    assert [(cell["status"], cell["said"], cell["row"][0]) for cell in lost] == [("diverged", "diverged: the loss is nan in epoch 5", 0)] * 2
    (explained,) = re.findall(r'<summary>What bold means</summary><p class="notes">(.*?)</p>', text)
    assert len(re.findall(r"[a-z]\.(?: |$)", explained)) == 3, "what bold means, in three sentences"


@pytest.mark.usefixtures("undrawn")
def test_files_of_a_cell_are_linked_where_the_page_lies_in_the_results(tmp_path: Path) -> None:
    store = make_store(tmp_path / "r", 2)
    assert root_from(tmp_path / "r", store) == "."
    assert root_from(tmp_path / "r" / "site", store) == ".."
    assert root_from(tmp_path, store) is None, "elsewhere a page must not say where results are"
    data = embedded(page(read_store(store), "t", root="."))
    assert data["root"] == "."
    names = [name for name, _ in data["shared"][data["cells"][0]["files"]]]
    assert all((store.folder(data["cells"][0]["id"]) / name).is_file() for name in names)
    assert {"log.txt", "history.csv", "result.json"} == set(names)


# --- the site ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_blocks(tmp_path: Path) -> Store:
    """Ten cells of one teacher, five of another."""
    store = Store(tmp_path / "r", writable=True)
    for cell in [*cells(255)][240:]:
        write_cell(store, cell)
    return store


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take their time and are not the matter."""
    monkeypatch.setattr(pictures, "KINDS", {})


def test_a_site_has_a_page_per_block_and_nothing_that_is_elsewhere(two_blocks: Store, tmp_path: Path) -> None:
    files = site(read_store(two_blocks), "ours")
    pages = {name: content.decode() for name, content in files.items() if name.endswith(".html")}
    assert set(pages) == {"index.html", "resnet20-made-up-lineage-fp32.html", "resnet32-made-up-lineage-fp32.html"}
    for name, text in pages.items():
        assert str(tmp_path) not in text
        for link in re.findall(r"""(?:src|href)="([^"]*)\"""", text):
            if link != "data:," and not link.startswith("#"):
                assert link.partition("#")[0] in files, f"{name}: {link}"
        assert "base64," not in text
    counts = {name: len(embedded(text)["cells"]) for name, text in pages.items() if name != "index.html"}
    assert sorted(counts.values()) == [5, 10]
    assert any(name.endswith(".svg") for name in files)
    (first,) = re.findall(r'href="(resnet32[^"#]*)#row=0\.(\d+)"', pages["index.html"])[:1]
    assert any(cell["row"] == [0, int(first[1])] for cell in embedded(pages[first[0]])["cells"]), "a row of the index leads to its cells"


@pytest.mark.usefixtures("undrawn")
def test_a_site_is_the_same_twice_replaces_its_own_pages_and_spares_others(two_blocks: Store, tmp_path: Path) -> None:
    store, folder = two_blocks, tmp_path / "public"
    write_site(read_store(store), folder, "ours")
    before = contents(folder)
    (folder / ".git").mkdir()
    (folder / "CNAME").write_text("example.org")
    write_site(read_store(store), folder, "ours")
    assert contents(folder) == before | {"CNAME": b"example.org"}
    for cell_id in store.ids():
        if json.loads((store.folder(cell_id) / "cell.json").read_text())["teacher"]["label"] == "resnet32":
            shutil.rmtree(store.folder(cell_id))
    write_site(read_store(store), folder, "ours")
    assert "resnet32-made-up-lineage-fp32.html" in before
    assert not list(folder.glob("resnet32*")), "a page that the site no longer has is removed"
    assert (folder / "CNAME").is_file()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("undrawn")
def test_a_site_is_not_written_among_other_peoples_files(tmp_path: Path) -> None:
    reading, folder = read_store(make_store(tmp_path / "r", 2)), tmp_path / "web"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"holds thesis\.tex, and no earlier site; name an empty or a new folder"):
        write_site(reading, folder, "ours")
    assert list(contents(folder)) == ["thesis.tex"]
    with pytest.raises(UserError, match="a file; name a folder"):
        write_site(reading, folder / "thesis.tex", "ours")
    for content in ("{", '["../thesis.tex"]', '["/etc/passwd"]'):
        (folder / "dfqbench-site.json").write_text(content)
        with pytest.raises(UserError, match="damaged"):
            write_site(reading, folder, "ours")
    (folder / "dfqbench-site.json").write_text('["old.html"]')
    (folder / "index.html").write_text("mine")
    with pytest.raises(UserError, match=r"index\.html: not written by this command, and would be overwritten"):
        write_site(reading, folder, "ours")
    assert (folder / "index.html").read_text() == "mine"


@pytest.mark.usefixtures("undrawn")
def test_the_command_writes_a_site_of_the_rows_that_are_asked_for(dfqbench: Run, two_blocks: Store, tmp_path: Path) -> None:
    where = ("report", "--results", two_blocks.root)
    code, _, err = dfqbench(*where, "--site", tmp_path / "s", "--out", tmp_path / "r.html")
    assert (code, err) == (2, "dfqbench: --out is one file, --site a folder of files: give one of them\n")
    (tmp_path / "names.csv").write_text("row,label,group\ngdfq,Ours & others,mine\n")
    code, out, err = dfqbench(*where, "--site", tmp_path / "s", "--rows", "Ours*", "--names-from", tmp_path / "names.csv")
    assert (code, out, err) == (0, f"{tmp_path / 's' / 'index.html'}\n", "")
    (name,) = [name for name in contents(tmp_path / "s") if name.startswith("resnet32")]
    text = (tmp_path / "s" / name).read_text()
    assert {cell["method"] for cell in embedded(text)["cells"]} == {"Ours & others"}
    assert '<tr data-group="mine"><th scope="row"><a class="name" href="#row=0.0">Ours &amp; others</a>' in text
    assert len(contents(tmp_path / "s")) == 5, "index, one block, style, script, and what lists them"
    code, _, err = dfqbench(*where, "--site", two_blocks.root)
    assert (code, err) == (2, f"dfqbench: --site {two_blocks.root}: holds runs, and no earlier site; name an empty or a new folder\n")


@pytest.mark.usefixtures("undrawn")
def test_a_site_has_what_was_measured_without_data_on_a_page_of_its_own(two_blocks: Store) -> None:
    ids = [write_without_data(two_blocks, without_data(cell))["id"] for cell in cells(2)]
    files = {name: content.decode() for name, content in site(read_store(two_blocks), "ours").items() if name.endswith(".html")}
    assert '<a href="without-data.html">' in files["index.html"]
    assert {cell["id"] for cell in embedded(files["without-data.html"])["cells"]} == set(ids)
    assert "agreement with the teacher on" in files["without-data.html"]
    assert all(not set(ids) & {cell["id"] for cell in embedded(files[name])["cells"]} for name in files if name.startswith("resnet"))


def test_pages_have_plain_names_that_are_each_there_once(tmp_path: Path) -> None:
    from dfqbench.analysis.tables.blocks import blocks

    (block,) = blocks(read_store(make_store(tmp_path / "r", 2)).results)
    named = []
    for block.teacher in ("../../etc", "Größe", "网络", "CON:1?"):
        named += page_names([block])
    assert named == [f"{name}made-up-lineage-fp32.html" for name in ("etc-", "groe-", "", "con-1-")]
    assert len(set(page_names([block, block, block]))) == 3


PLUGIN = '''
import numpy as np
from dfqbench.data import OwnSet, register_set

@register_set("shades")
class Shades(OwnSet):
    """Twenty shades of grey."""

    class_names = [str(i) for i in range(10)]

    def load(self):
        return np.repeat(np.arange(20, dtype=np.uint8), 256).reshape(20, 16, 16), np.arange(20) % 10
'''


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the tests' sweeps name: images, and a plug-in with an evaluation set, forgotten afterwards."""
    from PIL import Image

    for number in range(10):
        (tmp_path / "photos" / str(number)).mkdir(parents=True)
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(tmp_path / "photos" / str(number) / "one.png")
    (tmp_path / "shades.py").write_text(PLUGIN)
    monkeypatch.setattr(own, "_sets", dict(own._sets))
    return tmp_path


@pytest.mark.parametrize(
    "on",
    [
        {"evaluate": "digits"},
        {"evaluate": {"set": "digits", "name": "imagefolder:mine"}},
        {"evaluate": "imagefolder:{places}/photos"},
        {"evaluate": {"set": "imagefolder:{places}/photos", "name": "digits"}},
        {"evaluate": "shades", "plugins": ["{places}/shades.py"]},
        {"evaluate": {"set": "shades:{places}", "name": "grey"}, "plugins": ["{places}/shades.py"]},
        {"evaluate": "none"},
        {"evaluate": "none", "selection": {"images": "gznq", "seed": 7, "count": 9}},
    ],
)
def test_the_recipe_of_a_cell_spans_exactly_that_cell(
    sweep_file: Callable[..., Path], places: Path, monkeypatch: pytest.MonkeyPatch, on: dict[str, Any]
) -> None:
    """What the report tells people to run has the same id, so it is the same experiment."""
    on = json.loads(json.dumps(on).replace("{places}", str(places)))
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
        assert str(places) not in text, "where things lie on this machine is nobody's business"
        (places / "cell.yaml").write_text(text.split("<<'END'\n")[1].split("\nEND")[0])
        monkeypatch.setenv("EVALUATION_SET", str(places / "photos"))  # what the text asks to fill in
        (again,) = load_sweep(places / "cell.yaml", cache_folder(), [str(places / "shades.py")] if "plugins" in on else []).cells
        assert (again.identity(), again.id, again.evaluation.name) == (cell.identity(), cell.id, cell.evaluation.name)
        assert ("export EVALUATION_SET=" in text) == (f":{places}" in str(on))
        its = " --plugin shades.py" if "plugins" in on else ""
        assert text.splitlines()[-1] == f"dfqbench run cell.yaml --device cpu --threads 2{its}"


def test_a_recipe_names_the_files_that_a_user_must_bring() -> None:
    result = read_store(Store(REFERENCE)).results[0]
    text = recipe(result)
    assert "export TEACHER_WEIGHTS=resnet20_cifar10_jpeg.safetensors" in text
    assert "export EVALUATION_SET=path/to/images   # 10000 images" in text
    record = result["cell"] | {"evaluation": result["cell"]["evaluation"] | {"name": "cifar10-jpeg"}}
    assert config_of(record)["evaluate"] == {"set": "${EVALUATION_SET}", "name": "cifar10-jpeg"}, "its version did not note which set has this name"
    assert "export EVALUATION_SET=imagefolder:path/to/images   # 10000 images" in recipe({**result, "cell": record})
    assert config_of(result["cell"])["teachers"][0]["weights"] == "${TEACHER_WEIGHTS}"


def test_protocols_are_told_in_words() -> None:
    lineage, hardware = (in_words(PROTOCOLS[name].fingerprint()) for name in ("lineage", "hardware"))
    assert "one range per output channel, on an asymmetric grid" in lineage
    assert "The network's input stays float." in lineage
    assert "the first layer has 8 bits, the last 8 bits" in hardware
    assert "is folded into the layer before it" in hardware
    assert "new_rule: 7." in in_words({"new_rule": 7})
    pow2, kmeans = (
        in_words(find_protocol({"base": "hardware", "weight_granularity": "per-tensor", "weight_grid": g}).fingerprint()) for g in ("pow2", "kmeans")
    )
    assert "quantized with one scale per layer, to the nearest of 0 and signed powers of two" in pow2
    assert "but the first and the last layer on a symmetric grid around 0; the first layer has 8 bits" in pow2
    assert "with a codebook for each layer: 2^k codewords" in kmeans


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
        patched.setattr(pictures, "KINDS", {})
        patched.setattr(os, "fsync", lambda file: None)  # 14,000 files that need to survive no crash
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


def wait_for(browser: Any, condition: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 10).until(lambda b: b.execute_script(f"return {condition}"))


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
    wait_for(browser, "document.getElementById('panel').open")
    panel = browser.execute_script("return document.getElementById('panel-body').textContent")
    for said in (f"cell {cell_id}", "dfqbench run cell.yaml", "Measured on", "milestones", "done: top-1", "smaller than the teacher's 1.03 MB"):
        assert said in panel
    assert browser.execute_script("return location.hash") == f"#cell={cell_id}"
    press(browser, "document.getElementById('close').click()")
    assert not browser.execute_script("return document.getElementById('panel').open")
    assert complaints(browser) == []


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
    assert browser.execute_script(f"return {first}") == ["gdfq", "round"]
    press(browser, "document.querySelector('#tables th').click(); document.querySelector('#tables th').click()")
    assert browser.execute_script(f"return {first}") == ["round", "gdfq"]
    assert complaints(browser) == []


@contextmanager
def window(browser: Any, width: int) -> Iterator[None]:
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})
    yield
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def complaints(browser: Any) -> list[Any]:
    return [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.mark.parametrize("width", [380, 1280])
def test_in_a_browser_nothing_is_wider_than_the_window(browser: Any, many: Path, width: int) -> None:
    with window(browser, width):
        browser.get(f"file://{many}")
        press(browser, "for (const folded of document.querySelectorAll('details')) folded.open = true")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert many_rows(browser) > 0
        # a name stays where it is when the figures are scrolled, and so do the headings
        left = "document.querySelector('table.key tbody th').getBoundingClientRect().left"
        top = "document.querySelector('table.key thead th').getBoundingClientRect().top"
        before = browser.execute_script(f"return [{left}, {top}]")
        press(browser, "const b = document.querySelector('table.key').parentElement; b.scrollLeft = 300; b.scrollTop = 100")
        assert browser.execute_script(f"return [{left}, {top}]") == before
        widest = "Math.max(...[...document.querySelectorAll('table.key tbody th')].map(h => h.offsetWidth))"
        assert browser.execute_script(f"return {widest}") < width / 2, "names leave room for figures"


def many_rows(browser: Any) -> int:
    return int(browser.execute_script("return document.querySelectorAll('table.key tbody tr:not([hidden])').length"))


def test_in_a_browser_rows_and_columns_are_chosen_and_rows_lead_to_their_cells(browser: Any, many: Path) -> None:
    browser.get("about:blank")
    browser.get(f"file://{many}")
    every = many_rows(browser)
    press(browser, "const s = document.getElementById('row-filter'); s.value = 'acq matching'; s.dispatchEvent(new Event('input'))")
    assert 0 < many_rows(browser) < every
    names = browser.execute_script(
        "return [...document.querySelectorAll('table.key tbody tr')].filter(r => !r.hidden).map(r => r.cells[0].textContent)"
    )
    assert set(names) == {"acq(matching_weight=0)"}
    assert browser.execute_script("return document.getElementById('row-count').textContent") == f"{len(names)} of {every} rows"
    drops = "[...document.querySelectorAll('table.key [data-kind=drop]')].filter(h => !h.hidden).length"
    assert browser.execute_script(f"return {drops}") > 0
    press(browser, "document.querySelector('#row-columns input[data-kind=drop]').click()")
    assert browser.execute_script(f"return {drops}") == 0
    table = "document.querySelector('table.key')"
    shown = f"return [...{table}.rows].map(r => [...r.cells].filter(c => !c.hidden).length)"
    assert len(set(browser.execute_script(shown))) == 1, "headings and figures stay in line"
    press(browser, f"[...{table}.querySelectorAll('tbody tr')].find(r => !r.hidden).cells[2].querySelector('a').click()")
    assert browser.execute_script("return document.getElementById('count').textContent") == "5 of 2000 cells"
    assert {line[column(browser, "method")] for line in lines(browser)} == {"acq(matching_weight=0)"}
    assert len({line[column(browser, "bits")] for line in lines(browser)}) == 1
    press(browser, "document.getElementById('of-row').click()")
    assert browser.execute_script("return document.getElementById('count').textContent") == "2000 of 2000 cells"
    assert complaints(browser) == []


@pytest.mark.usefixtures("undrawn")
def test_in_a_browser_what_has_no_value_comes_last_however_it_is_sorted(browser: Any, two_blocks: Store, tmp_path: Path) -> None:
    lost = next(cell for cell in cells(250) if cell.method == "gdfq" and str(cell.bits) == "w8a8")
    write_failure(two_blocks, lost)
    (tmp_path / "report.html").write_text(page(read_store(two_blocks), "t"))
    browser.get(f"file://{tmp_path}/report.html")
    heads = browser.execute_script("return [...document.querySelector('table.key').tHead.rows[0].cells].map(h => h.textContent)")
    last = "[...document.querySelector('table.key').tBodies[0].rows].at(-1).cells[0].textContent"
    for _ in range(2):
        press(browser, f"document.querySelector('table.key').tHead.rows[0].cells[{heads.index('W4A4')}].click()")
        assert browser.execute_script(f"return {last}") == "gdfq"
    press(browser, f"document.querySelectorAll('#cell-table thead th')[{column(browser, 'top-1')}].click()")
    assert lines(browser)[-1][column(browser, "top-1")] == "diverged"
    browser.get(f"file://{tmp_path}/report.html#cell={lost.id}")
    browser.refresh()
    assert "diverged: the loss is nan in epoch 5" in browser.execute_script("return document.getElementById('panel-body').textContent")
    assert complaints(browser) == []


def test_in_a_browser_a_site_works_from_disk(browser: Any, tmp_path: Path) -> None:
    write_site(read_store(Store(REFERENCE)), tmp_path / "site", "ours")
    with window(browser, 400):
        browser.get(f"file://{tmp_path}/site/index.html")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
        assert browser.execute_script("return getComputedStyle(document.querySelector('.notes')).color") != "rgb(0, 0, 0)", "its style is read"
        press(browser, "document.querySelector('tbody th a').click()")
        assert "resnet20" in browser.current_url
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
        assert len(lines(browser)) == 6, "two widths, three seeds of the row that was followed"
        assert {line[0] for line in lines(browser)} == {"gdfq"}
        press(browser, "document.querySelector('#cell-table tbody tr').click()")
        wait_for(browser, "document.getElementById('panel').open")
        wait_for(browser, "[...document.images].filter(i => i.loading !== 'lazy').every(i => i.complete && i.naturalWidth > 0)")
        assert browser.execute_script("return document.querySelectorAll('#panel-body img').length") >= 1
        assert complaints(browser) == []


def test_in_a_browser_hostile_text_stays_text(browser: Any, hostile: Store, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page(read_store(hostile), EVIL))
    browser.get(f"file://{tmp_path}/report.html#cell={hostile.ids()[-1]}")
    assert browser.title == EVIL
    assert EVIL in browser.execute_script("return document.querySelector('table.key tbody th').textContent")
    assert EVIL in browser.execute_script("return document.getElementById('panel-body').textContent")
    assert browser.execute_script("return document.querySelectorAll('img[src=x]').length") == 0
    assert complaints(browser) == []
