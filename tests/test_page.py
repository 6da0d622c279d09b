"""Pages of results: what they say, that they hold text safely, and that their colours differ. Nothing is trained."""

import re

import pytest

from opd.accuracy import PROBLEMS_ONLY, SEEDS_AND_PROBLEMS, Interval
from tip.results import figures, page, sentences
from tip.results.frame import QUADRANTS, figures_of, frame, html_of, quadrants_in_words
from tip.results.markdown import markdown
from tip.results.types import PHASES, Accuracy, ArmResult, Comparison, Evaluation, Panel, Results

SETTINGS = {
    "all 1.0": {"tip.rule": "all"},
    "random 0.5": {"tip.rule": "random", "tip.retention": 0.5},
    "soft_or 0.5": {"tip.rule": "soft_or", "tip.retention": 0.5},
    "q3 0.2 mixture=none": {"tip.rule": "q3", "tip.retention": 0.2, "tip.mixture": "none"},
}


def interval(mean, low, high, covers=PROBLEMS_ONLY):
    return Interval(mean, low, high, covers, (mean,), 8)


def evaluation(**by_metric):
    accuracies = {metric: Accuracy(0.5, (0.5,), None, 0.1) for metric in ("greedy", "mean_at_k")}
    return Evaluation(8, 4, accuracies, 0.1, {"all 1.0": by_metric} if by_metric else {})


def arm(last, retained=0.5):
    return ArmResult((0,), retained, 0.9, 1.0, 2.0, dict.fromkeys(PHASES, 0.5), 1.0, {}, {60: {"bench": last}}, {})


def results(tmp_path, arms):
    panels = Panel("rules", ("all 1.0", "soft_or 0.5")), Panel("control", ("random 0.5",))
    folders = {label: {0: tmp_path / "runs" / label} for label in arms}
    compared = Comparison("main", "Main <job>", "run & go", "tiny", (0,), ("all 1.0",), False, panels, SETTINGS, {}, {})
    start = {"bench": evaluation()}
    return Results(compared, "no GPU", arms, start, start, folders, {}, {"a": 1}, {"b": "2"}, f"{'0a' * 20}-dirty")


@pytest.fixture
def three(tmp_path):
    arms = {
        "all 1.0": arm(evaluation(), 1.0),
        "random 0.5": arm(evaluation(greedy=interval(-0.02, -0.032, -0.008), mean_at_k=interval(0.01, -0.02, 0.04))),
        "soft_or 0.5": arm(evaluation(greedy=interval(-0.002, -0.006, 0.002))),
    }
    return results(tmp_path, arms)


def test_sentences_are_made_from_the_intervals(three):
    assert sentences.came_out(three) == [
        "A random choice at 50 % is worse than all tokens: -2.0 points greedy, 95 % interval -3.2 to -0.8, and not "
        "distinguishable from all tokens: +1.0 points mean@4, 95 % interval -2.0 to +4.0.",
        "Soft-OR at 50 % is not distinguishable from all tokens: -0.2 points greedy, 95 % interval -0.6 to +0.2.",
    ]
    assert "over problems only (it says nothing about another training)" in sentences.about_intervals(three)
    assert "8 problems of bench" in sentences.asked(three) and "compared with all tokens" in sentences.asked(three)


def test_a_sentence_names_settings_and_what_covers_seeds(tmp_path):
    better = evaluation(greedy=interval(0.02, 0.01, 0.03, SEEDS_AND_PROBLEMS))
    found = results(tmp_path, {"all 1.0": arm(evaluation(), 1.0), "q3 0.2 mixture=none": arm(better)})
    assert sentences.came_out(found)[0].startswith("Q3 at 20 % with mixture = none is better than all tokens: +2.0")
    assert "new seeds and new problems" in sentences.about_intervals(found)
    alone = results(tmp_path, {"all 1.0": arm(evaluation(), 1.0)})
    assert sentences.came_out(alone) == [] and sentences.about_intervals(alone) == "No two arms were compared."


def test_the_arm_that_a_comparison_is_about_selects_and_is_no_control(three, tmp_path):
    assert three.subject == "soft_or 0.5"
    whole = {"all 1.0": arm(evaluation(), 1.0)}
    assert results(tmp_path, whole).subject == "all 1.0"
    assert results(tmp_path, whole | {"random 0.5": arm(evaluation())}).subject == "random 0.5"


def test_the_page_says_what_came_out_and_repeats_no_row(three, tmp_path):
    text = page.page(three, {}, "", tmp_path)
    order = [text.index(part) for part in ("What was asked", "What came out", "Soft-OR at", "<h2>Table", "<h2>Links")]
    assert order == sorted(order)
    for once in ("step-0 student", "teacher"):
        assert text.count(f"<td>{once}</td>") == 1 and markdown(three).count(f"\n| {once} ") == 1
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text and "<script" not in text
    assert "0a" * 6 + "-dirty" in text and "0a" * 7 not in text
    assert "<title>Main &lt;job&gt;</title>" in text and "<job>" not in text


def test_links_are_relative_and_a_token_map_is_linked_where_it_lies(three, tmp_path):
    out = tmp_path / "report"
    out.mkdir()
    text = page.page(three, {}, "", out)
    assert 'href="../runs/soft_or%200.5"' in text and 'href="table.json"' in text and "tokens.html" not in text
    (out / "tokens.html").write_text("")
    assert 'href="tokens.html"' in page.page(three, {}, "", out)


def test_quadrants_are_explained_where_a_figure_shows_them(three, tmp_path):
    assert "The four quadrants" not in page.page(three, {}, "", tmp_path)
    (tmp_path / "quadrants_while_training.png").write_bytes(b"")
    assert "The four quadrants" in page.page(three, {"quadrants_while_training": "below"}, "", tmp_path)


@pytest.mark.parametrize("text", ["| <b>a |\n|---|\n| <b> |", "- <b>", "# <b>", "said\n\n    <b>\n    <b>", "<b>"])
def test_text_in_a_page_is_escaped(text, three, tmp_path):
    assert "<b>" not in html_of(text) and "&lt;b&gt;" in html_of(text)
    assert "<b>" not in page.page(three, {}, text, tmp_path)


def test_a_frame_leaves_out_empty_sections_and_a_figure_has_one_caption(tmp_path):
    assert "Nothing" not in frame("t", "a", {"Nothing": "", "Something": "x"})
    figures.Album(tmp_path).add(figures.lines({"p": {"a": {0: 1.0, 1: 2.0}}}, "update"), "drawn", "What <it> shows.")
    shown = figures_of({"drawn": "What <it> shows."}, tmp_path)
    assert shown.count("What &lt;it&gt; shows.") == 1 and "What" not in (tmp_path / "drawn.svg").read_text()


def test_the_quadrants_lie_as_they_are_defined_and_have_their_colours():
    text = quadrants_in_words()
    places = {
        colour: (float(x), float(y)) for x, y, colour in re.findall(r'<rect x="(\d+)" y="(\d+)" .*?fill="(#\w+)"', text)
    }
    (x1, y1), (x2, y2), (x3, y3), (x4, y4) = (places[figures.QUADRANT_COLOURS[q]] for q in (1, 2, 3, 4))
    assert x1 == x3 > x2 == x4 and y1 == y2 < y3 == y4  # divergence to the right, entropy upwards
    assert "low entropy, high divergence" in text[text.index("Q3: overconfident") :][:80]
    assert all(name in text and meaning in text for name, meaning in QUADRANTS.values())


def test_sixteen_arms_look_different_in_colour_and_without_it():
    looks = [figures.style(number) for number in range(16)]
    for keys in (("color", "linestyle"), ("linestyle", "marker")):
        assert len({tuple(look[key] for key in keys) for look in looks[:12]}) == 12
    assert len({tuple(look.values()) for look in looks}) == 16


def test_an_interval_without_ends_is_drawn_as_a_dot(tmp_path):
    endless = float("inf")
    drawn = figures.whiskers({"greedy": [("soft_or 0.5", 1.0, -endless, endless), ("q3 0.5", 2.0, 1.0, 3.0)]}, "points")
    figures.Album(tmp_path).add(drawn, "differences", "")
    assert drawn.axes[0].get_xlim()[1] < 5 and (tmp_path / "differences.png").stat().st_size > 1000
