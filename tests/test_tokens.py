"""The token map: what the page holds, and what a browser makes of it."""

import json
import math
import shutil
import time

import numpy as np
import pytest
import torch
from helpers import blob
from runs import train

from opd.errors import InputError
from opd.files import write_whole
from opd.record import dump
from tip import select, tokens
from tip.results.token_map import Packer, columns_of, page_of

SMALL = (
    "eval.benchmarks=[]",
    "rollout.prompts_per_step=4",
    "rollout.n=1",
    "log.token_dump_every=1",
    "optim.steps=2",
    "optim.warmup_steps=0",
)
HOSTILE = (
    "<img src=x onerror='window.hacked=1'>",
    "</script><script>window.hacked=1</script>",
    "&lt;",
    "\u2028",
    "`${1}",
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two runs whose dumps hold every rollout of two updates."""
    out = tmp_path_factory.mktemp("runs")
    return [train(out / rule, *SMALL, f"tip.rule={rule}") for rule in ("soft_or", "q3")]


@pytest.fixture(scope="module")
def page(folders):
    path = folders[0].parent / "tokens.html"
    write_whole(path, page_of(tokens.names_of(folders), "A token map"))
    return path


def dumped(folder, step):
    return dump.read(folder / "tokens" / f"step_{step:06d}.jsonl")


def hostile_dump(folder, rollouts=3):
    """A copy of a run whose dumps are one update of rollouts that consist of hostile texts."""
    path = folder / "tokens" / "step_000001.jsonl"
    (folder / "tokens" / "step_000002.jsonl").unlink()
    row = json.loads(path.read_text().split("\n")[0])
    columns = {name for name, column in row.items() if isinstance(column, list)}
    row = {name: column[: len(HOSTILE)] if name in columns else column for name, column in row.items()}
    top5 = [[[text, 0.2] for text in HOSTILE]] * len(HOSTILE)
    row |= {"tokens": list(HOSTILE), "prompt": HOSTILE[1], "answer": HOSTILE[0], "id": HOSTILE[1]}
    row |= {"student_top5": top5, "teacher_top5": top5, "quadrant": [3] * len(HOSTILE)}
    row |= {"turn": [0, 0, *[1] * (len(HOSTILE) - 2)], "replies": {"1": HOSTILE[1]}}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(rollouts)))


def test_the_page_holds_the_numbers_of_the_dumps(folders, page):
    text = page.read_text()
    about, strings = json.loads(blob(text, "about")), json.loads(blob(text, "strings"))
    for r, folder in enumerate(folders):
        for u, step in enumerate((1, 2)):
            rows, run = dumped(folder, step), about["runs"][r]
            listed = run["updates"][u]["rollouts"]
            assert [(x["id"], x["tokens"]) for x in listed] == [(row["id"], len(row["tokens"])) for row in rows]
            assert [strings[x["prompt"]] for x in listed] == [row["prompt"] for row in rows]
            data, count = blob(text, f"columns-{r}-{u}"), sum(len(row["tokens"]) for row in rows)
            numbers = np.frombuffer(data, "<u4", count)
            assert [strings[i] for i in numbers] == [token for row in rows for token in row["tokens"]]
            for k, name in enumerate(columns_of("reverse_kl"), 1):
                expected = np.array([number for row in rows for number in row[name]], "<f4")
                assert (np.frombuffer(data, "<f4", count, 4 * count * k) == expected).all()
            quadrants = np.frombuffer(data, np.uint8, count, 24 * count)
            assert list(quadrants) == [q for row in rows for q in row["quadrant"]]
            assert run["updates"][u]["share"] == [(quadrants == q).mean() for q in (1, 2, 3, 4)]
            marks = np.frombuffer(data, np.uint8, offset=25 * count).reshape(count, -1)
            for bit, label in enumerate(run["marks"]):
                expected = [bool(kept) for row in rows for kept in row[f"keep/{label}"]]
                assert [bool(m[bit // 8] >> (bit % 8) & 1) for m in marks] == expected, label


def test_the_listed_mistakes_are_the_strongest_of_quadrant_3(folders, page):
    listed = json.loads(blob(page.read_text(), "about"))["runs"][0]["mistakes"]
    expected = []
    for step in (1, 2):
        for row in dumped(folders[0], step):
            h = [entropy / math.log(row["vocab_size"]) for entropy in row["student_entropy"]]
            expected += [f * (1 - e) for f, e, q in zip(row["forward_kl"], h, row["quadrant"], strict=True) if q == 3]
    assert [mistake["size"] for mistake in listed] == pytest.approx(sorted(expected, reverse=True)[: len(listed)])
    first = listed[0]
    row = dumped(folders[0], first["update"] + 1)[first["rollout"]]
    assert (row["tokens"][first["token"]], row["quadrant"][first["token"]]) == (first["text"], 3)
    assert "".join(row["tokens"]).startswith(first["before"] + first["text"] + first["after"]) or first["token"] > 12


def test_the_page_has_no_markup_of_a_model(folders, tmp_path):
    copy = shutil.copytree(folders[0], tmp_path / "run")
    hostile_dump(copy)
    text = page_of({"<b>run</b>": copy}, "<i>title</i>")
    assert not any(bad in text for bad in (*HOSTILE[:2], "<b>run</b>", "<i>title</i>"))


def test_fewer_rollouts(folders):
    about = json.loads(blob(page_of({"run": folders[0]}, "", rollouts=2), "about"))
    assert [len(update["rollouts"]) for update in about["runs"][0]["updates"]] == [2, 2]


def test_names_are_as_short_as_they_can_be(tmp_path):
    a, b = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert tokens.names_of([a, tmp_path / "b" / "other"]) == {"run": a, "other": tmp_path / "b" / "other"}
    assert tokens.names_of([a, b]) == {"a/run": a, "b/run": b}
    with pytest.raises(InputError, match="given twice"):
        tokens.names_of([a, a])


def test_runs_without_marks_are_refused(folders, tmp_path):
    with pytest.raises(InputError, match="no token dumps"):
        page_of({"run": tmp_path}, "")
    plain = train(tmp_path, *SMALL, plain=True)
    with pytest.raises(InputError, match=r"Train with tip\.train"):
        page_of({"run": plain}, "")
    copy = shutil.copytree(folders[0], tmp_path / "damaged")
    path = copy / "tokens" / "step_000001.jsonl"
    row = json.loads(path.read_text().split("\n")[0])
    for change in ({"quadrant": ["x"] * len(row["tokens"])}, {"keep/all": [[]] * len(row["tokens"])}, {"answer": 3}):
        path.write_text(json.dumps(row | change) + "\n")
        with pytest.raises(InputError, match=next(iter(change))):
            page_of({"run": copy}, "")


def test_the_command_writes_the_page(folders, tmp_path, capsys):
    tokens.command([str(folders[0]), "--out", str(tmp_path / "new" / "tokens.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "tokens.html")
    assert (tmp_path / "new" / "tokens.html").read_text().startswith("<!doctype html>")


# --- in a browser -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser():
    if not (CHROMIUM and DRIVER):
        pytest.skip("the pages are looked at with Chromium: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def until(condition, seconds=60):
    """Waits for what the page does asynchronously."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.02)
    return result


def shown(driver, path, width=1280, height=2000):
    """Opens the page in a window of that size; its console must stay empty."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(path.as_uri())
    until(lambda: driver.execute_script("return document.body.dataset.ready"))
    until(lambda: driver.execute_script("return document.querySelectorAll('.t').length"))
    assert driver.get_log("browser") == []


def js(driver, code, *arguments):
    return driver.execute_script(f"return {code}", *arguments)


def classes(driver, rollout, run=0):
    """The classes of the tokens of a rollout, once it is in the document."""
    selector = f"#rollout-{rollout} .response[data-run='{run}'] .t"
    code = "[...document.querySelectorAll(arguments[0])].map((t) => t.className.split(' '))"
    return until(lambda: js(driver, code, selector))


def choose(driver, control, value):
    code = (
        "(([c, v]) => { const e = document.getElementById(c); e.value = v;"
        " e.dispatchEvent(new Event(e.type === 'range' ? 'input' : 'change')); return e.value === v; })(arguments)"
    )
    assert js(driver, code, control, value)


def kept_in_page(driver, rollouts):
    return [["kept" in names for names in classes(driver, k)] for k in range(rollouts)]


def test_a_rule_marks_exactly_what_it_selects(folders, page, browser):
    shown(browser, page)
    rows = dumped(folders[0], 1)
    choose(browser, "mark", "as trained")
    until(lambda: kept_in_page(browser, 4) == [[w > 0 for w in row["weight"]] for row in rows])
    sequences = torch.tensor([k for k, row in enumerate(rows) for _ in row["tokens"]])
    for rule, column in (("divergence", "reverse_kl"), ("entropy_topk", "student_entropy")):
        choose(browser, "mark", rule)
        for retention in ("0.5", "0.2", "0.1"):
            choose(browser, "retention", retention)
            score = torch.tensor([number for row in rows for number in row[column]])
            kept = select.top(score, sequences, float(retention))
            expected = [kept[sequences == k].tolist() for k in range(4)]
            until(lambda expected=expected: kept_in_page(browser, 4) == expected)
    choose(browser, "mark", "quadrant")
    until(lambda: kept_in_page(browser, 4) == [[bool(k) for k in row["keep/quadrant"]] for row in rows])
    assert [[int(names[1][1]) for names in classes(browser, k)] for k in range(4)] == [row["quadrant"] for row in rows]


def test_pointing_at_a_token_shows_the_numbers_of_the_dump(folders, page, browser):
    from selenium.webdriver import ActionChains

    shown(browser, page)
    row, i = dumped(folders[0], 1)[0], 4
    token = browser.find_elements("css selector", "#rollout-0 .t")[i]
    ActionChains(browser).move_to_element(token).perform()
    until(lambda: js(browser, "!document.getElementById('card').hidden"))
    numbers = [
        text.split(" ")[0]
        for text in js(browser, "[...document.querySelectorAll('#card dd')].map((d) => d.textContent)")
    ]
    expected = [row[name][i] for name in ("student_entropy", "reverse_kl", "forward_kl", "score", "weight")]
    assert [float(number) for number in numbers] == pytest.approx(expected, rel=6e-3)
    bars = js(
        browser,
        "[...document.querySelectorAll('.models .bar')].map((b) => [b.children[0].title, b.children[1].textContent])",
    )
    likeliest = [*row["student_top5"][i], *row["teacher_top5"][i]]
    assert [word for word, _ in bars] == [word for word, _ in likeliest]
    assert [float(share.split()[0]) for _, share in bars] == pytest.approx([100 * p for _, p in likeliest], abs=0.06)
    rules = dict(
        js(
            browser,
            "[...document.querySelectorAll('#card .rules .bar')].map((b) => [...b.children].map((c) => c.textContent))",
        )
    )
    at = [f"{100 * r:g}" for r in (0.5, 0.2, 0.1) if row[f"keep/soft_or@{r:g}"][i]]
    assert rules["soft_or"] == (" ".join(at) or "-")


def test_it_works_by_keyboard(page, browser):
    from selenium.webdriver import Keys

    shown(browser, page)
    first = browser.find_element("css selector", "#rollout-0 .t[tabindex='0']")
    first.send_keys("")
    until(lambda: js(browser, "!document.getElementById('card').hidden"))
    first.send_keys(Keys.ARROW_RIGHT)
    place = "[...document.activeElement.parentElement.children].indexOf(document.activeElement)"
    until(lambda: js(browser, place) == 1)
    until(lambda: js(browser, "document.querySelector('#card .quiet').textContent").find("token 2,") > 0)
    browser.switch_to.active_element.send_keys(Keys.END)
    until(lambda: js(browser, f"{place} === document.activeElement.parentElement.childElementCount - 1"))
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    until(lambda: js(browser, "document.getElementById('card').hidden"))


def test_map_quadrants_and_list_find_their_tokens(folders, page, browser):
    shown(browser, page)
    rows = dumped(folders[0], 1)
    browser.find_element("css selector", "#quadrants .q2").click()
    until(
        lambda: (
            [["brushed" in names for names in classes(browser, k)] for k in range(4)]
            == [[q == 2 for q in row["quadrant"]] for row in rows]
        )
    )
    assert f"{sum(q == 2 for row in rows for q in row['quadrant'])} tokens are marked" in js(
        browser, "document.getElementById('marked').textContent"
    )
    # the token of largest divergence stands alone at the top of the map
    k, i = max(
        ((k, i) for k, row in enumerate(rows) for i in range(len(row["tokens"]))),
        key=lambda at: rows[at[0]]["reverse_kl"][at[1]],
    )
    click = (
        "(([i]) => { const c = document.getElementById('map'), box = c.getBoundingClientRect();"
        " const x = box.left + map.x(map.columns.h[i]), y = box.top + map.y(map.columns.divergence[i]);"
        " const at = { clientX: x, clientY: y, pointerId: 1, bubbles: true };"
        " c.setPointerCapture = () => {};"
        " for (const kind of ['pointerdown', 'pointerup']) c.dispatchEvent(new PointerEvent(kind, at)); })(arguments)"
    )
    js(browser, click, sum(len(row["tokens"]) for row in rows[:k]) + i)
    focused = (
        "(() => { const t = document.activeElement, r = t.parentElement, at = [...r.children].indexOf(t);"
        " return r.className === 'response' ? [+r.dataset.update, +r.dataset.rollout, at] : null; })()"
    )
    until(lambda: js(browser, focused) == [0, k, i])
    mistake = json.loads(blob(page.read_text(), "about"))["runs"][0]["mistakes"][1]
    browser.find_elements("css selector", "#mistakes button")[1].click()
    until(lambda: js(browser, focused) == [mistake["update"], mistake["rollout"], mistake["token"]])


def test_another_update_and_two_runs_side_by_side(folders, page, browser):
    shown(browser, page)
    choose(browser, "update", "1")
    choose(browser, "other", "1")
    texts = "[...document.querySelectorAll(arguments[0])].map((r) => r.textContent.replaceAll('⏎\\n', '\\n'))"
    for run, folder in enumerate(folders):
        expected = ["".join(row["tokens"]) for row in dumped(folder, 2)]
        until(lambda run=run, expected=expected: js(browser, texts, f".response[data-run='{run}']") == expected)
    assert "Update 2" in js(browser, "document.getElementById('about').textContent")


@pytest.mark.parametrize("width", [390, 820, 1280])
def test_no_sideways_scroll(page, browser, width):
    shown(browser, page, width, 844)
    browser.execute_script("document.querySelector('.t').click()")
    until(lambda: js(browser, "!document.getElementById('card').hidden"))
    assert js(browser, "document.documentElement.scrollWidth <= innerWidth")
    card = js(
        browser,
        "(({left, right, bottom}) => [left, right, bottom])(document.getElementById('card').getBoundingClientRect())",
    )
    assert card[0] >= 0 and card[1] <= width and card[2] <= 844


def test_hostile_tokens_are_text_and_only_what_is_near_is_in_the_document(folders, tmp_path, browser):
    copy = shutil.copytree(folders[0], tmp_path / "run")
    hostile_dump(copy, rollouts=120)
    path = tmp_path / "tokens.html"
    path.write_text(page_of({"<b>run</b>": copy}, "<i>title</i>"))
    shown(browser, path, height=600)
    assert js(browser, "[...document.querySelectorAll('#rollout-0 .t')].map((t) => t.textContent)") == list(HOSTILE)
    said = js(
        browser, "[...document.querySelectorAll('#rollout-0 .t')].map((t) => getComputedStyle(t, '::before').content)"
    )
    assert [text != "none" for text in said] == [False, False, True, False, False] and "window.hacked=1" in said[2]
    browser.execute_script("document.querySelector('.t').click()")
    until(lambda: js(browser, "!document.getElementById('card').hidden"))
    assert js(browser, "[window.hacked, document.images.length, document.title]") == [None, 0, "<i>title</i>"]
    assert js(browser, "document.querySelectorAll('.card').length") == 120
    assert js(browser, "document.querySelectorAll('.t').length") < 60 * len(HOSTILE)
    choose(browser, "rollout", "119")
    assert len(classes(browser, 119)) == len(HOSTILE)
    browser.execute_script("window.print = () => { window.printed = document.querySelectorAll('.t').length }")
    browser.execute_script("document.getElementById('print').click()")
    assert until(lambda: js(browser, "window.printed")) == 120 * len(HOSTILE)
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    until(lambda: js(browser, "document.querySelectorAll('.t').length") < 60 * len(HOSTILE))
    assert browser.get_log("browser") == []


def test_a_page_without_tokens(tmp_path, browser):
    packer = Packer()
    row = {
        "vocab_size": 9,
        "tokens": [],
        "prompt": "",
        "id": "1",
        "answer": None,
        "quadrant": [],
        "student_top5": [],
        "teacher_top5": [],
    }
    packer.add("run", [(1, [row | {name: [] for name in columns_of("reverse_kl")}])], {}, "reverse_kl")
    path = tmp_path / "tokens.html"
    path.write_text(packer.page("nothing"))
    browser.get(path.as_uri())
    until(lambda: js(browser, "document.body.dataset.ready"))
    assert browser.get_log("browser") == []
