"""The page as a browser shows it; skipped where there is no Chromium (on Debian: ``apt-get install chromium``)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import NAMES, Chromium, find_chromium
from report_runs import HOSTILE, SETTINGS, additions, group, iteration, iterations, tool_chat, tries, write_run

from rlhf_ray.reporting.report import write_report

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"needs a Chromium: none of {', '.join(NAMES)} is on the PATH")

OTHER = "a-run-whose-name-tells-every-setting-that-differs-lr-2e-4-gamma-1.0-seed-1"
CARD = "#completions .row"
ADVANTAGES = [np.asarray(values, dtype=np.float32) for values in ([1, 2], [-1, -2], [], [0.5, 0, 0])]
VALUES = [np.asarray(values, dtype=np.float32) for values in ([3, -4], [1, 2], [], [0.5, 0, 0])]
COLORS = """[...document.querySelectorAll('[data-place="0"] .token')].map((one) => one.style.backgroundColor)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    assert CHROMIUM is not None
    chromium = Chromium(CHROMIUM, tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of the page of one run."""
    folder = tmp_path_factory.mktemp("one")
    path = write_run(folder / "run", tables={3: additions(), 5: additions()}, advantages=ADVANTAGES, values=VALUES)
    return write_report([path]).as_uri()


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of the page of three runs: a whole one, one that has begun with other settings, one without settings."""
    folder = tmp_path_factory.mktemp("three")
    other = write_run(folder / OTHER, settings=SETTINGS | {"debugging": {"seed": 1}}, results=iterations(3))
    damaged = write_run(folder / "damaged", tables={})
    (damaged / "config.yaml").unlink()
    return write_report([write_run(folder / "whole"), other, damaged], output=folder / "page.html").as_uri()


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of the page of a run all of whose texts want to be code."""
    folder = tmp_path_factory.mktemp("hostile") / "<img src=x onerror=alert(1)>"
    groups = [group(number, text, [text, text], [0.0, 1.0]) for number, text in enumerate(HOSTILE)]
    chat = [{"role": "<script>alert(1)</script>", "content": HOSTILE[1]}]
    calls = [tool_chat(arguments=text, name=text, answer=text) for text in HOSTILE]
    results = [iteration(1) | {"evaluation": {HOSTILE[1]: {"reward_mean": 0.5}}}]
    settings = {"algorithm": HOSTILE[0], "data": {"path": HOSTILE[1]}, HOSTILE[0]: {HOSTILE[1]: HOSTILE[2]}}
    path = write_run(
        folder, settings=settings, results=results, tables={1: [group(99, chat, ["x"], [1.0]), *groups, *calls]}
    )
    return write_report([path]).as_uri()


def count(browser: Chromium, selector: str) -> int:
    return int(browser.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length"))


def text(browser: Chromium, selector: str) -> str:
    return str(browser.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))


def drawn_charts(browser: Chromium) -> list[str]:
    """Titles of the charts on whose canvas more than the axes has been drawn: something in a color of a series."""
    return list(
        browser.evaluate(
            """[...document.querySelectorAll('.chart')].filter((chart) => {
                const canvas = chart.querySelector('canvas');
                const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
                for (let at = 0; at < data.length; at += 4) {
                    const pixel = [data[at], data[at + 1], data[at + 2]];
                    if (data[at + 3] > 200 && Math.max(...pixel) - Math.min(...pixel) > 100) return true;
                }
                return false;
            }).map((chart) => chart.querySelector('strong').textContent)"""
        )
    )


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_draws_its_charts_without_a_complaint(browser: Chromium, one_run: str, dark: bool) -> None:
    browser.open(one_run, dark=dark)
    titles = browser.evaluate("[...document.querySelectorAll('.chart strong')].map((one) => one.textContent)")
    assert {"Reward", "Entropy", "Completion length", "Staleness", "Time of an iteration"} <= set(titles)
    assert drawn_charts(browser) == titles
    assert text(browser, ".figures b") == "5"
    assert browser.complaints() == []
    assert browser.requests() == [one_run]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("runs", ["one_run", "three_runs", "hostile_run", "episodes"])
def test_nothing_is_wider_than_the_screen(
    browser: Chromium, runs: str, width: int, request: pytest.FixtureRequest
) -> None:
    browser.open(request.getfixturevalue(runs), width=width)
    browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert (
        browser.evaluate("Math.max(...[...document.querySelectorAll('.u-wrap')].map((one) => one.offsetWidth))") < width
    )


def test_a_number_between_holes_is_drawn(browser: Chromium, tmp_path: Path) -> None:
    alone = {"sampling_logprob_diff_mean": 1e-6, "sampling_logprob_diff_max": 2e-6}
    results = [iteration(number, **(alone if number == 3 else {})) for number in range(1, 6)]
    browser.open(write_report([write_run(tmp_path / "run", results=results)]).as_uri())
    assert "Engine against learner" in drawn_charts(browser)


def test_a_chart_tells_its_numbers_where_the_mouse_is(browser: Chromium, one_run: str) -> None:
    browser.open(one_run)
    reading = "document.querySelector('.chart .reading b').textContent"
    assert browser.evaluate(reading) == "0.500"
    browser.mouse(".chart .u-over", "mouseMoved")
    assert browser.evaluate(reading) == "0.300"
    assert text(browser, ".chart .place") == "iteration 3"


def test_curves_over_another_axis_and_smoothed(browser: Chromium, one_run: str) -> None:
    browser.open(one_run)
    browser.choose("over", "samples")
    browser.mouse(".chart .u-over", "mouseMoved")
    assert text(browser, ".chart .place") == "completions 768"
    browser.choose("smoothing", "0.9")
    assert browser.evaluate("location.hash") == "#x=samples&smooth=0.9"
    # (0.5 + 0.4 * 0.9 + 0.3 * 0.81 + 0.2 * 0.729 + 0.1 * 0.6561) / (1 + 0.9 + 0.81 + 0.729 + 0.6561)
    assert browser.evaluate("document.querySelector('.chart .reading b').textContent") == "0.321"
    assert browser.complaints() == []


def test_a_token_that_is_clicked_tells_its_numbers(browser: Chromium, one_run: str) -> None:
    browser.open(one_run)
    assert browser.evaluate("document.querySelector('#tooltip').hidden")
    browser.click(f"{CARD} .token")
    facts = browser.evaluate("[...document.querySelectorAll('#tooltip div')].map((one) => one.textContent)")
    of_token = ["token 50", "log-probability 0 (100 %)", "policy version 3", "advantage +1", "value before it 3"]
    assert facts == ['"2"', *of_token]
    browser.click(f"{CARD} .token.silent")
    assert text(browser, "#tooltip div") == "no text of its own: a special token, or part of a character"
    browser.click("h2")
    assert browser.evaluate("document.querySelector('#tooltip').hidden")


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of the page of a run of environments: a chat with a tool, and texts whose history is rewritten."""
    nan = np.nan
    chat = tool_chat()
    (trajectory,) = chat.group.trajectories
    of_chat = np.where(trajectory.loss_mask, np.linspace(-1, 1, len(trajectory.token_ids)), nan)
    advantages = [of_chat, np.asarray([1, nan, nan, 2]), np.asarray([-1, -2])]
    path = write_run(
        tmp_path_factory.mktemp("episodes") / "run",
        tables={5: [chat, tries(further=("ab",))]},
        advantages=[one.astype(np.float32) for one in advantages],
    )
    return write_report([path]).as_uri()


def test_a_trajectory_is_a_conversation(browser: Chromium, episodes: str) -> None:
    browser.open(episodes)
    parts = "[...document.querySelectorAll('[data-place=\"%d\"] .conversation > *')].map((one) => one.textContent)"
    assert browser.evaluate(parts % 0) == [
        'turn 1 reward 0<tool_call>calculator</tool_call>tool call calculator{"sum": "37+58"}',
        "tool\ntool: 95\nassistant: ",
        "turn 2 reward 1It is 95.",
    ]
    assert browser.evaluate(parts % 1) == [
        "turn 1 reward \u22120.5004",
        "observedno",
        "turn 2 reward 17",
        "history rewritten: a prompt of 3 tokens",
        "turn 3 reward 0.250ab",
    ]
    facts = "[...document.querySelectorAll('[data-place=\"1\"] .facts .fact')].map((one) => one.textContent)"
    assert browser.evaluate(facts) == ["guess", "3 turns", "6 tokens", "2 observed", "no turns left", "version 2"]
    assert not browser.evaluate("document.querySelector('.call').open")
    browser.click(".call summary")
    assert browser.evaluate("document.querySelector('.call').open")
    assert browser.complaints() == []


def test_observed_tokens_have_no_color_and_say_so(browser: Chromium, episodes: str) -> None:
    browser.open(episodes)
    shades = (
        "[...document.querySelectorAll('[data-place=\"1\"] .token')].map((one) => one.style.backgroundColor !== '')"
    )
    for coloring in ("advantage", "value", "logprob", "version", "group"):
        browser.choose("color by", coloring)
        assert browser.evaluate(shades) == [True, False, False, True, True, True], coloring
    browser.click('[data-place="1"] .observation .token')
    told = "[...document.querySelectorAll('#tooltip div')].map((one) => one.textContent)"
    assert browser.evaluate(told) == ['"n"', "token 110", "observed, not sampled"]
    browser.click('[data-place="1"] .turn .token')
    assert "advantage +1" in browser.evaluate(told)


def test_a_token_that_is_touched_keeps_telling_its_numbers(browser: Chromium, one_run: str) -> None:
    browser.open(one_run, width=390)
    browser.tap(f"{CARD} .token")
    assert text(browser, "#tooltip div") == '"2"'
    assert not browser.evaluate("document.querySelector('#tooltip').hidden")
    box = "document.querySelector('#tooltip').getBoundingClientRect()"
    assert browser.evaluate(f"{box}.left >= 0 && {box}.right <= 390")
    browser.tap("h2")
    assert browser.evaluate("document.querySelector('#tooltip').hidden")


def test_tokens_are_colored_by_what_is_chosen(browser: Chromium, one_run: str) -> None:
    browser.open(one_run)
    shades = {}
    for coloring in ("advantage", "logprob", "version", "group", "none"):
        browser.choose("color by", coloring)
        shades[coloring] = tuple(browser.evaluate(COLORS))
    assert len(set(shades.values())) == len(shades)
    # The first completion: a token and the end, with advantages 1 and 2, versions 3 and 4, its group's best.
    assert shades["none"] == ("", "")
    assert shades["advantage"][0] != shades["advantage"][1]
    assert shades["version"][0] != shades["version"][1]
    assert shades["group"][0] == shades["group"][1] != ""
    # The third was left out of the loss.
    browser.choose("color by", "advantage")
    of_rows = browser.evaluate(
        f"[...document.querySelectorAll('{CARD}')].map((row) => row.querySelector('.token').style.backgroundColor)"
    )
    assert of_rows[2] == ""
    assert "" not in (of_rows[0], of_rows[1], of_rows[3])
    assert text(browser, ".scale") == "\u2264 \u22122\u2265 +2"
    assert browser.complaints() == []


def test_the_choices_come_back_with_the_address(browser: Chromium, one_run: str) -> None:
    browser.open(f"{one_run}#step=3&color=version&sort=worst&filter=1%2B1")
    controls = "[...document.querySelectorAll('#browser .control')].map((one) => one.lastChild.value)"
    assert browser.evaluate(controls) == ["3", "worst", "version", "1+1"]
    assert text(browser, f"{CARD} .reward b") == "0"
    browser.open(f"{one_run}#step=77&color=none-such&sort=&page=-3")
    assert browser.evaluate(controls) == ["5", "table", "advantage", ""]
    assert browser.complaints() == []


def test_completions_are_found_by_their_text(browser: Chromium, one_run: str) -> None:
    browser.open(one_run)
    assert count(browser, CARD) == 4
    browser.choose("filter", "20+22")
    assert count(browser, CARD) == 2
    browser.choose("filter", "no such text")
    assert text(browser, ".pager span") == "No completion here has this text."
    browser.choose("filter", "")
    assert count(browser, CARD) == 4


def test_pages_of_completions(browser: Chromium, tmp_path: Path) -> None:
    groups = [group(number, f"{number}=", ["a", "b"], [0.0, 1.0]) for number in range(20)]
    browser.open(write_report([write_run(tmp_path / "run", tables={1: groups})]).as_uri())
    assert (count(browser, CARD), text(browser, ".pager span")) == (16, "1\u201316 of 40 here")
    browser.click(".pager button:last-of-type")
    browser.click(".pager button:last-of-type")
    assert (count(browser, CARD), text(browser, ".pager span")) == (8, "33\u201340 of 40 here")
    assert browser.evaluate("document.querySelector('.pager button:last-of-type').disabled")


def test_runs_side_by_side(browser: Chromium, three_runs: str) -> None:
    browser.open(three_runs)
    assert count(browser, ".run") == 3
    assert text(browser, "#differences tbody") == "debugging.seed01\u2013"
    assert text(browser, "#differences .note") == "Without settings, so not compared: damaged."
    of_reward = "[...document.querySelector('.chart .legend').children].map((one) => one.textContent)"
    assert browser.evaluate(of_reward) == [
        f"{name} \u00b7 {curve}{number}"
        for name, numbers in {"whole": (0.5, 0.625), OTHER: (0.3, 0.375), "damaged": (0.5, 0.625)}.items()
        for curve, number in zip(("training", "evaluation quickstart"), (f"{one:.3f}" for one in numbers), strict=True)
    ]
    browser.click(".run:nth-of-type(2) input")
    assert [line[:5] for line in browser.evaluate(of_reward)] == ["whole", "whole", "damag", "damag"]
    assert browser.complaints() == []


def test_all_runs_hidden_is_nothing_to_draw(browser: Chromium, three_runs: str) -> None:
    browser.open(f"{three_runs}#hide=0,1,2")
    assert text(browser, "#charts") == "There is nothing to draw."
    assert browser.complaints() == []


def test_a_run_before_its_first_iteration(browser: Chromium, tmp_path: Path) -> None:
    browser.open(write_report([write_run(tmp_path / "run", results=[], tables={})]).as_uri())
    assert "The run has not finished an iteration." in text(browser, "#runs")
    assert text(browser, "#completions") == "This page holds no completions."
    assert browser.complaints() == []


@pytest.mark.parametrize("coloring", ["logprob", "version", "group", "none"])
def test_hostile_texts_run_nothing_and_can_be_read(browser: Chromium, hostile_run: str, coloring: str) -> None:
    browser.open(f"{hostile_run}#color={coloring}")
    browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    for position in range(count(browser, CARD)):
        browser.mouse(f'[data-place="{position}"] .token', "mouseMoved")
    assert browser.evaluate("window.hacked") is None
    assert count(browser, "img, a, iframe, #page script, form, textarea, b b") == 0
    assert browser.complaints() == []
    assert browser.requests() == [browser.evaluate("location.href.split('#')[0]")]
    shown = browser.evaluate("[...document.querySelectorAll('.completion')].map((one) => one.textContent)")
    assert HOSTILE[0] in shown
    assert HOSTILE[1] in shown
    # What would not be seen, or would turn the line around, is written as its number.
    assert "line2028separator2029and202Eturned200Bunseen001B[31m" in shown


def test_what_gets_into_the_page_all_the_same_does_not_run(browser: Chromium, hostile_run: str) -> None:
    browser.open(hostile_run)
    browser.evaluate(
        """(() => {
            document.body.insertAdjacentHTML('beforeend', `<img src="x" onerror="window.hacked = 'image'">`);
            const script = document.createElement('script');
            script.textContent = "window.hacked = 'script'";
            document.body.append(script);
        })()"""
    )
    refused = [entry for entry in browser.complaints() if "Content Security Policy" in entry]
    assert browser.evaluate("window.hacked") is None
    assert len(refused) >= 2
