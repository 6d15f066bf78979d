"""The page in a headless Chromium: what it answers, against ONNX Runtime in Python, and what visitors can do."""

import base64
import contextlib
import io
import json
import re
import shutil

import pytest
from page_helpers import (
    BITS,
    DONE,
    PROCESSOR,
    answers,
    assert_same_answers,
    draw,
    expected_answers,
    pixels_on_the_page,
    text,
)
from PIL import Image

from repvgg_hf.hub.space_pixels import pixel_settings
from repvgg_hf.recipes.benchmarks.chromium import Chromium, serve

SETTINGS = pixel_settings(PROCESSOR, 3)


def test_references_would_notice(references):
    """Answers depend on the picture and on the bits: a page that mixed them up would fail below."""
    by_picture = {key: int(logits.argmax()) for key, logits in references.items()}
    assert len({label for key, label in by_picture.items() if key.startswith("w8 ")}) > 1
    names = {key.partition(" ")[2] for key in by_picture}
    assert any(len({by_picture[f"w{bits} {name}"] for bits in BITS}) > 1 for name in names)


def test_answers_are_onnx_runtimes(show, models, run_onnx):
    browser = show("w4")
    assert text(browser, "h1").replace("\u2011", "-") == "Fruit in bits"
    assert text(browser, "#bits") == "4"
    for number, suffix in enumerate((".png", ".jpg", ".webp", ".png"), 1):
        browser.evaluate(f"document.querySelectorAll('#samples button')[{number - 1}].click()")
        browser.wait_for(DONE.format(f"sample-{number - 1} w4"))
        pixels = pixels_on_the_page(browser, f"images/{number}{suffix}", SETTINGS)
        assert_same_answers(answers(browser), expected_answers(models, run_onnx("w4", pixels)))


def test_slider_changes_the_model(show, models, run_onnx, page):
    browser = show("w8")
    pixels = pixels_on_the_page(browser, "images/1.png", SETTINGS)
    sizes = {entry["name"]: entry["bytes"] for entry in json.loads((page / "space.json").read_text("utf-8"))["models"]}
    browser.evaluate("document.getElementById('slider').focus()")
    for bits in BITS:
        if bits != 8:
            browser.press("ArrowRight")
        browser.wait_for(DONE.format(f"sample-0 w{bits}"))
        assert text(browser, "#bits") == str(bits)
        spoken = browser.evaluate("document.getElementById('slider').getAttribute('aria-valuetext')")
        assert spoken == ("1 bit" if bits == 1 else f"{bits} bits")
        assert_same_answers(answers(browser), expected_answers(models, run_onnx(f"w{bits}", pixels)))
        shown, unit = text(browser, "#size").split()
        assert unit == "kB" and float(shown) == pytest.approx(sizes[f"w{bits}"] / 1e3, rel=5e-3)
        assert re.fullmatch(r"\d+(\.\d)? ms", text(browser, "#time"))
    browser.press("Home")
    browser.wait_for("document.getElementById('bits').textContent === '8'")


def test_only_what_is_chosen_is_downloaded(show, server):
    server[1].clear()
    show("w2")
    models = {path for path in server[1] if path.endswith(".onnx")}
    assert models == {"/models/w2.onnx"}


def test_changes_are_marked(show, models, references, pictures):
    browser = show("w4")
    browser.evaluate("document.getElementById('compare').click()")
    browser.wait_for("document.body.dataset.compared === 'yes'")
    rows = browser.evaluate(
        "[...document.querySelectorAll('#changes tbody tr')].map((row) => [...row.querySelectorAll('td')].map("
        "(cell) => [cell.firstChild.textContent, cell.classList.contains('changed')]))"
    )
    labels, differ = models["w8"].config.id2label, dict.fromkeys(BITS[1:], 0)
    for number, (row, path) in enumerate(zip(rows, pictures.values()), 1):
        tops = [int(references[f"w{bits} images/{number}{path.suffix}"].argmax()) for bits in BITS]
        expected = [[labels[top].partition(",")[0], top != tops[0]] for top in tops]
        assert row == expected
        for bits, top in zip(BITS[1:], tops[1:]):
            differ[bits] += top != tops[0]
    assert len(rows) == len(pictures) and any(differ.values())
    words = text(browser, "#changes-words")
    for bits, count in differ.items():
        assert (re.search(rf"{count}( differs?| )?[^,]*at {bits} bit", words) is not None) == bool(count), words
    assert browser.evaluate("document.getElementById('compare').disabled")


def test_verdict_compares_with_more_bits(show, models, references):
    browser = show("w8")
    tops = {bits: int(references[f"w{bits} images/1.png"].argmax()) for bits in BITS}
    for bits in BITS[1:]:
        browser.evaluate(
            "{ const slider = document.getElementById('slider');"
            "slider.stepUp(); slider.dispatchEvent(new Event('input')); }"
        )
        browser.wait_for(DONE.format(f"sample-0 w{bits}"))
        start = "The same answer as at 8 bits" if tops[bits] == tops[8] else "Changed: at 8 bits it said"
        assert text(browser, "#verdict").startswith(start)


def test_plot_has_a_point_for_each_measurement_and_a_ring_at_the_slider(show):
    browser = show("w4")
    assert browser.evaluate("document.querySelectorAll('#plot .point').length") == 2 * len(BITS)
    assert browser.evaluate("document.querySelectorAll('#plot .float').length") == 1
    assert text(browser, "#top1") == "89.3 %" and "7.5 × smaller" not in text(browser, "#size-note")
    ring = browser.evaluate("['cx', 'cy'].map((name) => document.querySelector('#plot .ring').getAttribute(name))")
    marks = browser.evaluate(
        "[...document.querySelectorAll('#plot .point')]"
        ".map((mark) => [mark.textContent, mark.getAttribute('transform')])"
    )
    here = [title for title, place in marks if place == f"translate({ring[0]} {ring[1]})"]
    assert len(here) == 1 and here[0].endswith("89.25 % at 12.0 kB")
    assert browser.evaluate("document.querySelectorAll('#plot-table tbody tr').length") == 2 * len(BITS) + 1


def test_own_pictures(show, tmp_path, models, run_onnx):
    picture = draw(11, 120, 200)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    picture.save(tmp_path / "mine.png", exif=exif)
    browser = show("w4")
    browser.choose_file("#file", tmp_path / "mine.png")
    browser.wait_for(DONE.format("own-1 w4"))
    answer, *_ = answers(browser)
    turned, straight = [
        expected_answers(models, run_onnx("w4", PROCESSOR(image, return_tensors="np")["pixel_values"]))[0]
        for image in (picture.rotate(-90, expand=True), picture)
    ]
    # of pixels that differ by a gray level; the picture as it lies in the file has another answer
    assert answer[0] == turned[0] and abs(answer[1] - turned[1]) < abs(answer[1] - straight[1]) / 4
    assert text(browser, "#changes tbody th") == "mine.png"


def test_a_dropped_picture(show):
    browser = show("w4")
    content = io.BytesIO()
    draw(12, 50, 60).save(content, "PNG")
    encoded = base64.b64encode(content.getvalue()).decode()
    browser.evaluate(
        f"{{ const bytes = Uint8Array.from(atob('{encoded}'), (letter) => letter.charCodeAt());"
        "const transfer = new DataTransfer();"
        "transfer.items.add(new File([bytes], 'dropped.png', {type: 'image/png'}));"
        "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, bubbles: true})); }"
    )
    browser.wait_for(DONE.format("own-1 w4"))
    assert browser.evaluate("document.getElementById('picture').alt") == "dropped.png"


def test_files_that_are_no_picture_are_named(show, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    browser = show("w4")
    before = answers(browser)
    browser.choose_file("#file", tmp_path / "notes.txt")
    browser.wait_for("!document.getElementById('notice').hidden")
    assert text(browser, "#notice").startswith("notes.txt is no picture that this browser can read (it is text/plain)")
    assert answers(browser) == before
    browser.evaluate("document.querySelectorAll('#samples button')[1].click()")
    browser.wait_for("document.getElementById('notice').hidden")


def test_camera(show):
    browser = show("w4")
    browser.evaluate("document.getElementById('camera').click()")
    browser.wait_for("document.body.dataset.frames > 3")
    assert text(browser, "#camera") == "Take the picture" and len(answers(browser)) == 5
    browser.evaluate("document.getElementById('camera').click()")
    browser.wait_for(DONE.format("own-1 w4"))
    assert text(browser, "#camera") == "Use the camera"
    assert browser.evaluate("document.getElementById('video').srcObject") is None


@pytest.fixture
def changed_page(program, page, tmp_path):
    """`changed_page(change)`: a browser with a copy of the page whose `space.json` the function has changed."""
    with contextlib.ExitStack() as stack:

        def open_copy(change, model: str) -> Chromium:
            shutil.copytree(page, tmp_path / "page")
            values = json.loads((tmp_path / "page" / "space.json").read_text("utf-8"))
            change(values)
            (tmp_path / "page" / "space.json").write_text(json.dumps(values), "utf-8")
            url, _ = stack.enter_context(serve(tmp_path / "page"))
            browser = stack.enter_context(Chromium(program))
            browser.open(f"{url}/#{model}")
            return browser

        yield open_copy


def test_a_float_model_is_called_so(changed_page, references):
    def call_it_float(values):
        values["models"][0]["bits"] = 32

    browser = changed_page(call_it_float, "w8")
    browser.wait_for(DONE.format("sample-0 w8"))
    assert text(browser, "#bits") == "32" and text(browser, "#bits-words") == "bits per weight, float"
    assert text(browser, "#stops") == "float\n4\n2\n1"
    assert browser.evaluate("document.getElementById('slider').getAttribute('aria-valuetext')") == "float"
    browser.evaluate("document.querySelectorAll('#stops span')[1].click()")
    browser.wait_for(DONE.format("sample-0 w4"))
    same = references["w4 images/1.png"].argmax() == references["w8 images/1.png"].argmax()
    assert text(browser, "#verdict").startswith("The same answer as float" if same else "Changed: float said")


def test_without_samples_and_results_it_waits_for_a_picture(changed_page, pictures):
    def leave_out(values):
        values["images"], values["accuracy"] = [], None

    browser = changed_page(leave_out, "w2")
    browser.wait_for("document.getElementById('engine').textContent.includes('WebAssembly')")
    assert "0 of 4 networks downloaded" in text(browser, "#engine")
    assert text(browser, "#invitation").startswith("Drop a picture here")
    assert text(browser, "#size-note") == "when there is a picture"
    assert browser.evaluate("document.getElementById('changes').closest('section').hidden")
    assert browser.evaluate("document.getElementById('accuracy').hidden")
    assert browser.evaluate("document.getElementById('accuracy-figure').hidden")
    for number in (1, 2):  # the second takes the first one's place
        browser.choose_file("#file", pictures["wide" if number == 1 else "tall"])
        browser.wait_for(DONE.format(f"own-{number} w2"))
        assert browser.evaluate("document.querySelectorAll('#changes tbody tr').length") == 1
    assert len(answers(browser)) == 5 and browser.log == []


def test_a_missing_model_is_named(program, page, tmp_path):
    shutil.copytree(page, tmp_path / "page")
    (tmp_path / "page" / "models" / "w4.onnx").unlink()
    with serve(tmp_path / "page") as (url, _), Chromium(program) as browser:
        browser.open(f"{url}/#w4")
        browser.wait_for("!document.getElementById('notice').hidden")
        assert text(browser, "#notice").startswith("models/w4.onnx can't be had (404)")
        browser.evaluate("document.querySelectorAll('#stops span')[2].click()")  # 2 bits
        browser.wait_for("document.body.dataset.done === 'sample-0 w2'")
        assert browser.evaluate("document.getElementById('notice').hidden")


def test_one_thread_without_the_headers_and_nothing_from_elsewhere(program, page):
    with serve(page) as (url, _), Chromium(program) as browser:
        browser.open(f"{url}/#w4")
        browser.wait_for("document.body.dataset.done === 'sample-0 w4'")
        assert "1 thread;" in text(browser, "#engine")
        names = browser.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert names and all(name.startswith((url, "blob:")) for name in names)
        assert browser.log == []
