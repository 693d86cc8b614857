"""The report as a reader meets it: in a browser, from disk, filtered, walked by keyboard, on a phone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from rexrag.report import write_report
from tests.support.chromium import Browser, browser, find_chromium
from tests.support.synthetic import write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("needs a chromium on the PATH (apt-get install chromium)")
    with browser(executable, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report(
        [write_run(folder / "run", steps=30, control=True, hostile=True)], folder / "report.html"
    )


@pytest.fixture
def page(chromium: Browser, hostile_page: Path) -> Browser:
    chromium.events.clear()
    chromium.size(1280, 900)
    chromium.scheme("light")
    chromium.open(hostile_page)
    return chromium


SHOWN = "[...document.querySelectorAll('#list button')].length"


def choose(page: Browser, name: str, value: str) -> int:
    """Set a filter as a reader would, and count what is left."""
    page.run(
        f"(() => {{ const field = document.forms.filters.elements['{name}']; field.value = '{value}';"
        "field.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    return int(page.run(SHOWN))


def test_nothing_hostile_runs_and_nothing_complains(page: Browser) -> None:
    count = int(page.run(SHOWN))
    assert count > 50
    for at in range(0, count, 5):
        page.run(f"document.querySelectorAll('#list button')[{at}].click()")
        page.run("document.querySelectorAll('#detail details').forEach((node) => { node.open = true; })")
    assert page.run("document.documentElement.dataset.pwned ?? 'untouched'") == "untouched"
    assert (
        page.run("document.querySelectorAll('main img, #detail script, #list script, #detail svg').length")
        == 0
    )
    assert "</script><img src=x" in page.run("document.querySelector('h1').textContent")
    assert page.complaints() == []


def test_a_complaint_would_be_seen(page: Browser) -> None:
    """The checks above can fail: an inline handler is refused by the page's policy, and that is logged."""
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 1\">')")
    page.run("new Promise((done) => setTimeout(done, 300))")
    assert page.run("window.ran ?? 0") == 0
    assert any("Content Security Policy" in text for text in page.complaints())


def test_every_chart_is_drawn_and_again_in_the_dark(page: Browser) -> None:
    drawn = "document.querySelectorAll('.plot .main-svg .scatterlayer .trace').length"
    figures = int(page.run("document.querySelectorAll('figure').length"))
    assert figures == 9 and page.run("document.querySelectorAll('.plot.js-plotly-plot').length") == figures
    assert int(page.run(drawn)) >= 2 * figures
    ink = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    light = page.run(ink)
    page.scheme("dark")
    page.run("new Promise((done) => setTimeout(done, 1000))")
    assert page.run(ink) != light and int(page.run(drawn)) >= 2 * figures
    assert page.complaints() == []


LABELS = ".xtick text, .ytick text, .y2tick text, .xtitle, .ytitle, .y2title, .legendtext"


@pytest.mark.parametrize("width", [1280, 390])
def test_labels_of_a_chart_do_not_overlap(page: Browser, width: int) -> None:
    page.size(width, 900, mobile=width < 600)
    page.run("new Promise((done) => setTimeout(done, 800))")
    assert int(page.run(f"document.querySelectorAll('{LABELS}').length")) > 100
    overlaps = f"""
    [...document.querySelectorAll('.plot')].flatMap((plot) => {{
      const boxes = [...plot.querySelectorAll('{LABELS}')].filter((node) => node.textContent)
        .map((node) => [node.textContent, node.getBoundingClientRect()]);
      return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) =>
        p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 2 && q.top < p.bottom - 2)
        .map(([b]) => plot.id + ': ' + a + ' / ' + b));
    }})"""
    assert page.run(overlaps) == []


def test_filters_narrow_the_list(page: Browser) -> None:
    total = int(page.run(SHOWN))
    probes = choose(page, "kind", "probe")
    assert 0 < probes < total
    recovered = choose(page, "answer", "recovered")
    assert 0 < recovered < probes
    assert page.run("document.querySelector('#list .mark').textContent") == "✗→✓"
    assert page.run("document.getElementById('count').textContent") == f"{recovered} of {total}"
    assert "Parent: the dead end" in page.run("document.getElementById('detail').textContent")
    assert page.run("document.querySelector('#detail .dead del').textContent").strip().startswith("<answer>")
    choose(page, "kind", "")
    choose(page, "answer", "")
    at = choose(page, "step", "12")
    assert 0 < at < choose(page, "step", "10-20") < choose(page, "step", "")
    assert 0 < choose(page, "text", "anna painter") < total
    assert choose(page, "text", "no such words anywhere") == 0
    assert "No rollout matches" in page.run("document.getElementById('detail').textContent")
    assert choose(page, "text", "") == total


def test_the_arm_of_the_detail_charts_can_be_chosen(page: Browser) -> None:
    page.run(
        "(() => { const arm = document.getElementById('arm'); arm.value = 'grpo';"
        "arm.dispatchEvent(new Event('change')); })()"
    )
    text = page.run("[...document.querySelectorAll('figure')].map((f) => f.textContent).join('|')")
    assert "· grpo" in text and "This arm recorded none of it." in text
    assert page.complaints() == []


def test_the_list_is_walked_by_keyboard(page: Browser) -> None:
    heading = "[...document.querySelectorAll('#detail h3, #detail .facts')].map((n) => n.textContent).join()"
    page.run("document.querySelector('#list button').focus()")
    first = page.run(heading)
    page.key("ArrowDown", 40)
    second = page.run(heading)
    page.key("End", 35)
    last = page.run(heading)
    assert len({first, second, last}) == 3
    page.key("Home", 36)
    assert page.run(heading) == first
    assert page.run("document.querySelectorAll('#list [tabindex=\"0\"]').length") == 1
    assert page.run("document.activeElement.getAttribute('aria-current')") == "true"


def test_a_phone_needs_no_sideways_scrolling(page: Browser) -> None:
    page.size(390, 844, mobile=True)
    page.run("new Promise((done) => setTimeout(done, 800))")
    assert page.run("document.documentElement.scrollWidth") <= 390
    wide = (
        "[...document.querySelectorAll('.plot')].filter((n) => n.getBoundingClientRect().right > 390).length"
    )
    assert page.run(wide) == 0
    assert page.complaints() == []
