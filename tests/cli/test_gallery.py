"""``gallery``: what its page holds, and what a person can do on it, in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import zipfile
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from lit_diffusion.__main__ import as_one_line, dispatch
from lit_diffusion.commands import gallery
from lit_diffusion.errors import UserError

HOSTILE = "</script><script>alert(1)</script><img><!--<script>"
PROTOCOL = {"extractor": "digits", "n_fake": 80, "sampler": "ancestral", "seed": 0, "stage": "fit"}


def dark(count=80, side=8, channels=1):
    """Image n has the grey level n; it tells both its entry and its index."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, side, side, channels)).copy()


def light(count=80, side=8, channels=1):
    """Image n has the grey level 255 - n."""
    return 255 - dark(count, side, channels)


def write_run(folder, name, images, protocol=PROTOCOL):
    """A finished run's directory with one evaluation, and a later event."""
    directory = folder / "runs" / "ncsn" / name
    (directory / "samples").mkdir(parents=True)
    np.savez_compressed(directory / "samples" / "evaluation-0000000320.npz", arr_0=images)
    (directory / "run_id").write_text(f"{name}\n")
    (directory / "config.yaml").write_text("experiment: digits\n")
    evaluation = {
        "event": "evaluation",
        "step": 10,
        "images": 320,
        "time": 1.5,
        "fd/digits-80": 0.25,
        "density/digits-80": "nan",
        "fid-2k": 3,
        "seconds": 12.3,
        "samples_file": "samples/evaluation-0000000320.npz",
        "protocol": protocol,
    }
    old = {**evaluation, "fd/digits-80": 99.0, "samples_file": "samples/gone.npz"}
    began = {"event": "start", "format_version": 1, "images": 0, "time": 0.0}
    events = [began, old, evaluation, {"event": "end", "images": 320, "time": 2.0}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "eva')
    return directory


def data_of(page):
    """What a page holds, as its script reads it."""
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    return json.loads(data)


def pixels(png):
    """uint8 ``[H, W, C]`` of a PNG in base64."""
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
    return image[..., None] if image.ndim == 2 else image


def refusal(arguments):
    with pytest.raises(UserError) as caught:
        dispatch(["gallery", *(str(argument) for argument in arguments)])
    assert "\n" not in str(caught.value)
    return as_one_line(caught.value)


@pytest.fixture
def samples(workdir):
    np.savez(workdir / "dark.npz", arr_0=dark())
    np.savez(workdir / "light.npz", arr_0=light())
    return workdir


# ---- the file ---------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_asks_for_nothing(run, samples):
    run("gallery", "dark.npz", f"{HOSTILE}=light.npz", "--out", "deep/page.html")
    text = (samples / "deep" / "page.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src 'none'" in policy
    assert "img-src data:;" in policy
    for request in ("http://", "https://", 'src="', "@import", "url(", "fetch(", "XMLHttpRequest", "import("):
        assert request not in text
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img" not in text
    assert gallery._PLACE_OF_DATA not in text
    assert data_of(samples / "deep" / "page.html")["entries"][1]["name"] == HOSTILE
    assert [file.name for file in (samples / "deep").iterdir()] == ["page.html"]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_the_first_ones_to_the_last_pixel(run, workdir, channels):
    images = np.random.default_rng(0).integers(0, 256, (20, 6, 9, channels), dtype=np.uint8)
    np.savez(workdir / "a.npz", arr_0=images)
    (workdir / "folder").mkdir()
    with zipfile.ZipFile(workdir / "b.zip", "w") as archive:
        for n, image in enumerate(images):
            picture = Image.fromarray(image[..., 0] if channels == 1 else image)
            picture.save(workdir / "folder" / f"{n:02d}.png")
            archive.write(workdir / "folder" / f"{n:02d}.png", f"{n:02d}.png")
    run("gallery", "a.npz", "folder", "b.zip", "--count", 12, "--out", "page.html")
    for entry in data_of(workdir / "page.html")["entries"]:
        assert (entry["available"], entry["width"], entry["height"], entry["channels"]) == (20, 9, 6, channels)
        np.testing.assert_array_equal([pixels(png) for png in entry["images"]], images[:12])


def test_a_run_shows_its_last_evaluation(run, workdir, capsys):
    directory = write_run(workdir, "20260101-000000-aa", dark())
    run("gallery", directory, "--count", 80)
    assert capsys.readouterr().out == "wrote 80 images each of digits/20260101-000000-aa to gallery.html\n"
    (entry,) = data_of(workdir / "gallery.html")["entries"]
    assert entry["name"] == "digits/20260101-000000-aa"
    assert entry["values"] == {"fd/digits-80": 0.25, "density/digits-80": "nan", "fid-2k": 3}
    assert entry["protocol"] == PROTOCOL
    assert entry["source"].endswith("samples/evaluation-0000000320.npz")
    assert len(entry["images"]) == 80
    (directory / "config.yaml").unlink()
    run("gallery", directory, "--count", 80)
    assert data_of(workdir / "gallery.html")["entries"][0]["name"] == "ncsn/20260101-000000-aa"


def test_metrics_beside_samples_are_shown(run, samples):
    said = {"values": {"fd/digits-80": float("nan"), "kd": 0.5}, "protocol": {**PROTOCOL, "tau": float("inf")}}
    (samples / "dark.json").write_text(json.dumps(said))  # Python writes NaN, which no browser reads
    run("gallery", "dark.npz", "light.npz")
    first, second = data_of(samples / "gallery.html")["entries"]
    assert first["values"] == {"fd/digits-80": "nan", "kd": 0.5}
    assert first["protocol"] == {**PROTOCOL, "tau": "inf"}
    assert (second["values"], second["protocol"]) == ({}, None)


def test_protocols_that_differ_are_named(run, workdir, capsys):
    alike = {**PROTOCOL, "seed": 7}
    other = {"extractor": "digits", "n_fake": 2000, "sampler": "ddim", "seed": 1, "stage": "fit", "order": 2}
    a, b = write_run(workdir, "a", dark()), write_run(workdir, "b", light(), alike)
    c, d = write_run(workdir, "c", light(), other), write_run(workdir, "d", light(), {})
    run("gallery", a, b)
    assert "note" not in capsys.readouterr().out
    assert data_of(workdir / "gallery.html")["differing"] == []
    run("gallery", a, b, c)
    assert "note: the protocols differ in n_fake, order: the metrics are no ranking" in capsys.readouterr().out
    assert data_of(workdir / "gallery.html")["differing"] == ["n_fake", "order"]
    run("gallery", a, d)
    assert "note: the protocol of digits/d is not known" in capsys.readouterr().out
    # Images without metrics are in no ranking.
    np.savez(workdir / "bare.npz", arr_0=dark())
    run("gallery", a, "bare.npz", "--reference", "bare.npz")
    assert "note" not in capsys.readouterr().out


def test_names(run, samples):
    (samples / "sub").mkdir()
    for name in ("sub/dark.npz", "a=b.npz"):
        shutil.copy(samples / "dark.npz", samples / name)
    named = ["real data=light.npz", "small=sub/dark.npz", "dark (2)=light.npz"]
    run("gallery", "dark.npz", "sub/dark.npz", "a=b.npz", *named, "--reference", "light.npz")
    found = data_of(samples / "gallery.html")["entries"]
    names = ["dark", "dark (2)", "a=b", "real data", "small", "dark (2) (2)", "real data (2)"]
    assert [entry["name"] for entry in found] == names
    assert [entry["real"] for entry in found] == [False] * 6 + [True]


def test_a_page_is_known_by_what_it_shows(run, samples):
    pages = {}
    for key, arguments in {
        "first": ["dark.npz", "light.npz"],
        "again": ["dark.npz", "light.npz"],
        "seed": ["dark.npz", "light.npz", "--seed", 4],
        "order": ["light.npz", "dark.npz"],
        "count": ["dark.npz", "light.npz", "--count", 20],
    }.items():
        run("gallery", *arguments)
        pages[key] = data_of(samples / "gallery.html")
    assert pages["first"]["page"] == pages["again"]["page"] == pages["seed"]["page"]
    assert len({pages[key]["page"] for key in ("first", "order", "count")}) == 3
    assert pages["seed"]["seed"] == 4


def test_a_heavy_page_is_said(run, samples, capsys, monkeypatch):
    monkeypatch.setattr(gallery, "_HEAVY_BYTES", 1000)
    run("gallery", "dark.npz")
    assert "note: gallery.html is 0 MB, slow in a browser: give a smaller --count" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give runs' directories or samples"),
        (["dark.npz", "--out", "page.htm"], "ends in .html"),
        (["dark.npz", "--out", "file/page.html"], "choose another --out"),
        (["dark.npz", "--count", "0"], "--count is 0; give a positive number"),
        (["dark.npz", "--count", "81"], "dark.npz has 80 images, 81 are to be shown; give --count 80"),
        (["dark.npz", "light.npz", "--count", "8"], "give --count 9 or more"),
        (["dark.npz", "--count", "many"], "count is 'many'; it must be a whole number"),
        (["dark.npz", "--seed", "-1"], "--seed is -1"),
        (["dark.npz", "--refrence", "x"], "did you mean 'reference'"),
        (["nowhere.npz"], "there is no file nowhere.npz"),
        (["nowhere"], "there is no folder or zip file nowhere"),
        (["name="], "neither a path nor NAME=PATH"),
        (["=dark.npz"], "neither a path nor NAME=PATH"),
        (["name=nowhere.npz"], "there is no file nowhere.npz"),
        (["dark.npz", "--reference", "nowhere.npz"], "there is no file nowhere.npz"),
        (["floats.npz"], "images must be uint8"),
        (["untested"], "has no evaluation: make one with `test --ckpt_path untested/checkpoints/last.ckpt`"),
        (["runs/ncsn/emptied"], "are gone or were not kept: make one with `test --ckpt_path runs/ncsn/emptied/"),
        (["torn.npz"], "cannot read the metrics"),
        (["foreign.npz"], "has no values and protocol"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(samples, arguments, said):
    (samples / "file").write_text("")
    np.savez(samples / "floats.npz", arr_0=dark().astype(np.float32))
    (samples / "untested").mkdir()
    (samples / "untested" / "metrics.jsonl").write_text(
        '{"event": "start", "format_version": 1, "images": 0, "time": 0.0}\n'
    )
    emptied = write_run(samples, "emptied", dark())
    shutil.rmtree(emptied / "samples")
    for name, text in (("torn", '{"values": '), ("foreign", "[1]")):
        shutil.copy(samples / "dark.npz", samples / f"{name}.npz")
        (samples / f"{name}.json").write_text(text)
    assert said in refusal(arguments)
    assert not list(samples.rglob("*.html"))


# ---- the page, in a browser -------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
NAMES = ("Very dark", "Rather light", "Neither nor")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Open a page; afterwards it must have complained of nothing and asked for nothing but itself."""
    contexts, wrong = [], []

    def opened(path, script=None, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: dialog.accept())
        page.on("request", lambda asked: asked.url.startswith(("file:", "data:", "blob:")) or wrong.append(asked.url))
        if script:
            page.add_init_script(script)
        page.goto(path.resolve().as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def two(run, samples):
    run("gallery", f"{NAMES[0]}=dark.npz", f"{NAMES[1]}=light.npz")
    return samples / "gallery.html"


def begin(page, pairs=None, seed=None):
    page.get_by_role("button", name="Blind comparison").click()
    for label, value in (("Pairs", pairs), ("Seed", seed)):
        if value is not None:
            page.get_by_label(label).fill(str(value))
    page.get_by_role("button", name="Start").click()


LEVELS = """() => [...document.querySelectorAll(".side")].map((side) => [...side.children].map((image) => {
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, 1, 1).data[0];
}))"""


def levels(page):
    """The grey levels of both sides' images, decoded."""
    page.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    return page.evaluate(LEVELS)


def press_the_lighter(page):
    left, right = levels(page)
    page.keyboard.press("ArrowLeft" if left[0] > right[0] else "ArrowRight")
    return left, right


def export(page):
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    assert download.value.suggested_filename == "votes.json"
    with open(download.value.path()) as file:
        return json.load(file)


def whole_round(page, key="ArrowDown", **options):
    """The votes' two sides of a round in which one key does all."""
    begin(page, **options)
    while page.locator(".arena").count():
        page.keyboard.press(key)
    return [(vote["left"], vote["right"]) for vote in export(page)["votes"]]


def test_side_by_side(run, workdir, visit):
    a, b = (
        write_run(workdir, "a", dark()),
        write_run(workdir, "b", light(), {**PROTOCOL, "extractor": "inception", "seed": 5}),
    )
    np.savez(workdir / "real.npz", arr_0=light(70, 32, 3))
    run("gallery", a, f"{HOSTILE}={b}", "--reference", "real.npz", "--out", "page.html")
    page = visit(workdir / "page.html")
    page.wait_for_function("document.images.length === 192 && [...document.images].every((i) => i.naturalWidth > 0)")
    assert page.evaluate("[...document.images].every((i) => i.alt)")
    assert page.evaluate("[...document.images].every((i) => getComputedStyle(i).imageRendering === 'pixelated')")
    headings = ["These metrics were not measured alike", "digits/a", HOSTILE, "real data"]
    assert page.locator("h2").all_inner_texts() == headings
    notice = page.get_by_role("region", name="Protocols that differ").inner_text()
    assert "The protocols differ in extractor." in notice
    assert "inception" in notice
    assert "seed" not in notice
    card = page.locator("article").first
    assert "the first 64 of 80 images · 8 × 8 grey · after 320 images of training" in card.inner_text()
    metrics = [row.inner_text().split("\t") for row in card.locator("tbody tr").all()]
    assert metrics == [["fd/digits-80", "0.2500"], ["density/digits-80", "nan"], ["fid-2k", "3"]]
    card.get_by_text("Provenance").click()
    assert "extractor differs" in card.inner_text()
    assert page.locator("article").nth(2).inner_text().startswith("real data")
    # Small images are enlarged by whole factors, whatever is asked for.
    for size in (16, 72, 200):
        page.get_by_label("Image size").fill(str(size))
        assert page.evaluate("[...document.images].every((i) => i.clientWidth % i.naturalWidth === 0)")


def test_one_entry_has_nothing_to_compare(run, samples, visit):
    run("gallery", "dark.npz", "--count", 4)
    page = visit(samples / "gallery.html")
    assert page.locator("img").count() == 4
    assert page.get_by_role("button").count() == 0


def test_a_blind_round_by_keyboard(two, visit):
    page = visit(two)
    begin(page, pairs=12)
    seen = []
    for number in range(1, 13):
        assert page.locator("#progress").inner_text() == f"Pair {number} of 12"
        assert page.locator("#said").inner_text() == f"Pair {number} of 12"
        content = page.content() + page.title()
        assert not any(word in content for name in (*NAMES, "dark.npz", "light.npz") for word in (name, name.lower()))
        if number == 4:
            seen.append(levels(page))
            page.keyboard.press(" ")  # cannot tell
        elif number == 9:
            seen.append(levels(page))
            left, right = seen[-1]
            page.keyboard.press("ArrowLeft" if left[0] < right[0] else "ArrowRight")  # the darker, for once
        else:
            seen.append(press_the_lighter(page))
        if number == 7:  # a wrong vote, and back twice
            page.keyboard.press("a")
            page.keyboard.press("Backspace")
            page.keyboard.press("u")
            assert page.locator("#progress").inner_text() == "Pair 7 of 12"
            assert levels(page) == list(seen[-1])
            press_the_lighter(page)
    result = export(page)
    assert result["format_version"] == 1
    assert result["seed"] == 0
    assert result["planned"] == 12
    assert "tie" in result["rule"]
    assert [(entry["name"], entry["source"], entry["count"]) for entry in result["entries"]] == [
        (NAMES[0], "dark.npz", 64),
        (NAMES[1], "light.npz", 64),
    ]
    assert all(set(entry) == {"name", "source", "count", "values", "protocol"} for entry in result["entries"])
    # The file names the very images that were on the screen.
    grey = {NAMES[0]: lambda n: n, NAMES[1]: lambda n: 255 - n}
    for vote, sides in zip(result["votes"], seen, strict=True):
        shown = [[grey[vote[side]["entry"]](n) for n in vote[side]["images"]] for side in ("left", "right")]
        assert shown == list(map(list, sides))
        assert all(len(set(vote[side]["images"])) == 9 for side in ("left", "right"))
        assert vote["milliseconds"] >= 0
    assert [vote["choice"] == "tie" for vote in result["votes"]] == [n == 3 for n in range(12)]
    # One row: the first won once, the second ten times; Wilson's interval is of these eleven.
    (row,) = result["results"]
    interval = binomtest(1, 11).proportion_ci(confidence_level=0.95, method="wilson")
    assert (row["first"], row["second"]) == NAMES[:2]
    assert (row["wins_first"], row["wins_second"], row["ties"]) == (1, 10, 1)
    assert row["win_rate"] == pytest.approx(1 / 11)
    assert row["interval"] == pytest.approx([interval.low, interval.high], abs=1e-12)
    table = page.get_by_role("table", name="Votes for every two entries").locator("tbody").inner_text()
    assert table.split() == [*" ".join(NAMES[:2]).split(), "1", ":", "10", "1", "9.1", "%", "1.6", "to", "37.7", "%"]
    overall = page.get_by_role("table", name="Votes for each entry").locator("tbody tr").all_inner_texts()
    assert [line.split("\t") for line in overall] == [
        [NAMES[1], "10", "1", "1", "90.9 %"],
        [NAMES[0], "1", "10", "1", "9.1 %"],
    ]


def test_every_two_entries_meet_equally_often_on_either_side(run, samples, visit):
    np.savez(samples / "grey.npz", arr_0=np.full((70, 8, 8, 1), 128, np.uint8))
    run("gallery", f"{NAMES[0]}=dark.npz", f"{NAMES[1]}=light.npz", f"{NAMES[2]}=grey.npz", "--reference", "light.npz")
    page = visit(samples / "gallery.html")
    begin(page, pairs=37)
    assert page.locator("#progress").inner_text() == "Pair 1 of 42"
    assert page.locator(".question").inner_text() == "Which side looks more real?"
    page.get_by_role("button", name="Side by side").click()
    order = [(left["entry"], right["entry"]) for left, right in whole_round(page, pairs=37)]
    assert len(order) == 42
    counts = Counter(order)
    names = (*NAMES, "real data")
    for first, second in combinations(names, 2):
        assert sorted((counts[first, second], counts[second, first])) == [3, 4]
    for block in range(7):  # wherever one stops, too
        assert len({frozenset(pair) for pair in order[6 * block : 6 * block + 6]}) == 6
    assert len({tuple(map(frozenset, order[6 * block : 6 * block + 6])) for block in range(7)}) > 1
    # All ties: no side was chosen, so there is nothing to estimate.
    rows = export(page)["results"]
    assert [(row["ties"], row["win_rate"], row["interval"]) for row in rows] == [(7, None, None)] * 6


def test_the_order_is_the_seeds(run, two, visit):
    first, again, other = (whole_round(visit(two), pairs=16, seed=seed) for seed in (11, 11, 12))
    assert first == again != other
    assert Counter(left["entry"] for left, _ in first) == {NAMES[0]: 8, NAMES[1]: 8}
    for images in ([side["images"] for pair in first for side in pair if side["entry"] == name] for name in NAMES[:2]):
        for deck in range(0, 14, 7):  # 64 images make seven sides of nine before any is seen again
            assert len({n for side in images[deck : deck + 7] for n in side}) == 63
    run("gallery", f"{NAMES[0]}=dark.npz", f"{NAMES[1]}=light.npz", "--seed", 11)
    assert whole_round(visit(two), pairs=16) == first


def test_a_reload_keeps_the_votes(two, visit):
    page = visit(two)
    begin(page, pairs=10, seed=3)
    for _ in range(4):
        press_the_lighter(page)
    before = levels(page)
    page.reload()
    assert page.locator("#progress").inner_text() == "Pair 5 of 10"  # still blind
    assert not any(name in page.content() for name in NAMES)
    assert levels(page) == before
    page.keyboard.press("Backspace")
    assert page.locator("#progress").inner_text() == "Pair 4 of 10"
    press_the_lighter(page)
    page.get_by_role("button", name="Stop and see the result").click()
    early = export(page)
    assert early["results"][0]["wins_second"] == len(early["votes"]) == 4
    page.reload()
    page.get_by_role("button", name="Blind comparison").click()
    assert "4 of 10 votes given." in page.locator("main").inner_text()
    page.get_by_role("button", name="Continue").click()
    while page.locator(".arena").count():
        press_the_lighter(page)
    late = export(page)
    assert late["votes"][:4] == early["votes"]
    assert late["results"][0]["wins_second"] == 10
    page.get_by_role("button", name="Undo the last vote").click()
    assert page.locator("#progress").inner_text() == "Pair 10 of 10"
    page.get_by_role("button", name="Blind comparison").click()
    begin(page, pairs=5)  # the old round is discarded, after a question that this browser always confirms
    assert page.locator("#progress").inner_text() == "Pair 1 of 5"


@pytest.mark.parametrize("text", ["no JSON", "{}", '{"seed": 0, "pairs": 5, "votes": [{"choice": "up"}]}'])
def test_foreign_votes_are_passed_over(two, visit, text):
    key = f"lit_diffusion.gallery.{data_of(two)['page']}"
    page = visit(two, script=f"localStorage.setItem({json.dumps(key)}, {json.dumps(text)})")
    assert page.locator("article").count() == 2
    assert len(whole_round(page, pairs=3)) == 3


def test_a_browser_that_keeps_nothing(two, visit):
    refuse = (
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"
    )
    page = visit(two, script=refuse)
    begin(page, pairs=3)
    assert "votes are lost when it is closed" in page.locator("main").inner_text()
    for _ in range(3):
        press_the_lighter(page)
    assert export(page)["results"][0]["wins_second"] == 3


def test_buttons_do_what_keys_do(two, visit):
    page = visit(two)
    begin(page, pairs=9)
    assert page.get_by_role("button", name="Undo").is_disabled()
    for name in ("Left", "Cannot tell", "Right"):
        page.get_by_role("button", name=name).click()
    page.keyboard.press("Space")  # after a click the space bar is the page's
    page.keyboard.press("Backspace")
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Right").focus()
    page.keyboard.press("Space")  # on a button it presses the button, and stays
    page.keyboard.press("Enter")
    for key in ("l", "L", "A", "ArrowDown"):
        page.keyboard.press(key)
    page.keyboard.press("Control+a")  # not ours
    page.keyboard.down("a")
    page.keyboard.down("a")  # held down: one vote
    page.keyboard.up("a")
    votes = [vote["choice"] for vote in export(page)["votes"]]
    assert votes == ["left", "tie", "right", "right", "right", "right", "left", "tie", "left"]


def test_larger_images_are_judged_one_by_one(run, workdir, visit):
    np.savez(workdir / "a.npz", arr_0=dark(5, 64, 3))
    np.savez(workdir / "b.npz", arr_0=light(5, 96, 1))
    run("gallery", "a.npz", "b.npz", "--count", 5)
    page = visit(workdir / "gallery.html")
    page.get_by_role("button", name="Blind comparison").click()
    assert "not wholly blind" in page.locator("main").inner_text()
    begin(page, pairs=7)
    assert [len(side) for side in levels(page)] == [1, 1]
    boxes = page.evaluate(
        "[...document.images].map((i) => [i.clientWidth, i.clientHeight, getComputedStyle(i).imageRendering])"
    )
    assert boxes[0] == boxes[1]  # the size on the screen tells nothing
    assert boxes[0][2] == "auto"
    attributes = page.evaluate("[...document.images].flatMap((i) => i.getAttributeNames())")
    assert set(attributes) <= {"src", "alt", "class"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen(run, workdir, visit, scheme):
    a = write_run(workdir, "20260101-000000-a-rather-long-name-of-a-run", dark())
    b = write_run(workdir, "b", light(), {**PROTOCOL, "extractor": "f" * 64})
    run("gallery", a, b)
    page = visit(workdir / "gallery.html", viewport={"width": 360, "height": 740}, color_scheme=scheme)
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 60) == (scheme == "dark")
    begin(page, pairs=4)
    assert page.evaluate(fits)
    assert page.evaluate("document.querySelector('.choices').getBoundingClientRect().bottom <= innerHeight")
    page.get_by_role("button", name="Stop and see the result").click()
    assert page.evaluate(fits)
