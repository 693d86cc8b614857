"""The page is one file that loads nothing, says what the numbers are, and treats every text as text."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexrag.errors import DataError
from rexrag.report import write_report
from rexrag.report.comparison import paired
from rexrag.report.formatting import compact, duration
from rexrag.report.page import json_block
from rexrag.report.read import read_runs
from rexrag.report.series import group_arms
from tests.support.synthetic import HOSTILE, write_run


class Page(HTMLParser):
    """The elements of a page and the text of its scripts, as a browser's parser would find them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.policy = ""
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._in_script = True
            self.scripts.append("")
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(*folders: Path) -> Page:
    out = folders[0].parent / "report.html"
    assert write_report(folders, out) == out
    return Page(out.read_text(encoding="utf-8"))


@given(
    st.recursive(
        st.none() | st.text() | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_the_json_block_says_the_same_and_cannot_end_its_script(value: object) -> None:
    block = json_block(value)
    assert json.loads(block) == value
    assert not re.search("[<>&\u2028\u2029]", block) and block.isascii()


def test_numbers_that_json_lacks_become_null_and_floats_are_shortened() -> None:
    assert json_block([float("nan"), float("inf"), 1.23456789, 1e-12]) == "[null,null,1.2346,1e-12]"


def test_the_page_loads_nothing_and_runs_its_two_scripts_only(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", steps=6, control=True))
    assert len(page.scripts) == 3
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert "default-src 'none'" in page.policy and "connect" not in page.policy
    for script in page.scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in page.policy
    assert "unsafe" not in page.policy.split("script-src")[1].split(";")[0]
    assert sum("plotly.js v" in script[:200] for script in page.scripts) == 1


def test_the_headline_shows_run_and_control(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=12, seed=4, control=True)
    text = page_of(folder).text
    for where in (folder, folder / "control"):
        summary = json.loads((where / "summary.json").read_text())
        for key in ("em_before", "em_after"):
            em = summary[key]
            assert f"{100 * em['value']:.1f} [{100 * em['low']:.1f}, {100 * em['high']:.1f}]" in text
        assert f"{100 * (summary['em_after']['value'] - summary['em_before']['value']):+.1f}" in text
    assert "seed 4" in text and "51.6 k" in text and "1.18 times the tokens of its control" in text
    assert "still going" not in text


def test_the_control_is_named_wherever_it_stands_and_nothing_else_is_called_one(tmp_path: Path) -> None:
    grpo = write_run(tmp_path / "grpo", arm="grpo", steps=6, end=0.5)
    other = write_run(tmp_path / "other", steps=6, end=0.6)
    assert "above its control" in page_of(grpo, other).text
    third = write_run(tmp_path / "third", arm="rex-rag", steps=6, end=0.5)
    text = page_of(other, third).text
    assert "above rex-rag" in text and "its control" not in text


def test_runs_of_an_arm_under_other_settings_are_no_seeds_of_it(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"r{i}", seed=i, steps=6) for i in range(3)]
    config = folders[2] / "config.toml"
    config.write_text(config.read_text() + "[learner]\nlr = 0.1\n")
    arms = group_arms(read_runs(folders))
    assert [(arm.name, len(arm.runs)) for arm in arms] == [
        ("rex-rag-distill", 2), ("rex-rag-distill · settings 2", 1)
    ]  # fmt: skip


def test_a_run_that_is_still_going_is_in_no_pair(tmp_path: Path) -> None:
    folders = [
        write_run(
            tmp_path / f"{arm}{s}", arm=arm, seed=s, steps=6, finished=(arm, s) != ("rex-rag-distill", 1)
        )
        for arm in ("rex-rag-distill", "grpo")
        for s in range(2)
    ]
    arm, base = group_arms(read_runs(folders))
    assert len(paired(arm, base)) == 1


def test_a_run_that_is_still_going_makes_a_page_that_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=6, finished=False)
    path = folder / "rollouts.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-9])
    text = page_of(folder).text
    assert "the run is still going" in text and "step 6 of 12" in text and "so far" in text
    assert "half-written frame" in text


def test_a_run_before_its_first_step_makes_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    for name in ("metrics.jsonl", "eval.jsonl", "rollouts.jsonl.zst"):
        (folder / name).unlink()
    text = page_of(folder).text
    assert "No evaluation yet." in text and "No rollout was recorded." in text and "Dead ends" in text


def test_several_seeds_show_the_mean_and_the_paired_difference(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{arm}{s}", arm=arm, seed=s, steps=6)
        for arm in ("rex-rag-distill", "grpo")
        for s in range(3)
    ]
    ends = {f.name: json.loads((f / "summary.json").read_text())["em_after"]["value"] for f in folders}
    gap = sum(ends[f"rex-rag-distill{s}"] - ends[f"grpo{s}"] for s in range(3)) / 3
    text = page_of(*folders).text
    assert "EM after minus grpo, points" in text and f"{100 * gap:+.1f}".replace("-", "−") in text
    assert "seeds 0, 1, 2" in text and "6 run folders" in text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=9, control=True, hostile=True)
    page = page_of(folder)
    assert len(page.scripts) == 3 and {tag for tag, _ in page.elements}.isdisjoint({"img", "svg"})
    assert HOSTILE[0] in page.text
    data = json.loads(page.scripts[0])
    shown = {record["question"] for record in data["rollouts"]}
    for text in HOSTILE:
        assert any(text in question for question in shown)
    arm = write_run(tmp_path / "arm", steps=3, arm=HOSTILE[1])
    page = page_of(arm)
    labels = [
        t["name"]
        for chart in json.loads(page.scripts[0])["charts"]
        for view in chart["views"].values()
        for t in view
        if "name" in t
    ]
    assert any("&lt;script" in label for label in labels) and not any("<script" in label for label in labels)


def test_the_cap_is_said_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", steps=60, rollouts_per_step=20)
    page = page_of(folder)
    assert len(json.loads(page.scripts[0])["rollouts"]) == 300
    assert re.search(r"300 of [\d,]+ recorded rollouts", page.text) and "at most 300" in page.text


def test_a_folder_is_taken_for_the_place_of_the_page_and_nothing_is_left_behind(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    before = {path.name for path in folder.iterdir()}
    assert write_report([folder], folder) == folder / "report.html"
    assert {path.name for path in folder.iterdir()} == before | {"report.html"}


def test_a_wrong_folder_leaves_the_old_page(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("old")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"config\.toml is missing"):
        write_report([write_run(tmp_path / "run", steps=3), tmp_path / "empty"], out)
    assert out.read_text() == "old"


@pytest.mark.parametrize(
    ("value", "said"), [(None, "–"), (0, "0"), (999, "999"), (51600, "51.6 k"), (1.234e6, "1.23 M")]
)
def test_counts_in_words(value: float | None, said: str) -> None:
    assert compact(value) == said


@pytest.mark.parametrize(("value", "said"), [(None, "–"), (59, "59 s"), (60, "1 min"), (4210, "1 h 10 min")])
def test_durations_in_words(value: float | None, said: str) -> None:
    assert duration(value) == said


def test_a_run_that_never_was_right_has_a_page(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / arm, arm=arm, steps=3, start=0.0, end=0.0) for arm in ("a", "grpo")]
    assert write_report(folders, tmp_path / "page.html").stat().st_size > 0


OLD_RUN = Path(__file__).parents[1] / "support" / "run-0.1.0"
"""A run of version 0.1.0 with its arm `rex-rag-rescue`: five steps, a few of its rollouts."""


def test_a_run_of_version_0_1_0_makes_a_page_under_todays_name(tmp_path: Path) -> None:
    out = write_report([OLD_RUN], tmp_path / "page.html")
    page = Page(out.read_text(encoding="utf-8"))
    assert "rex-rag-distill" in page.text and json.loads(page.scripts[0])["rollouts"]
    summary = json.loads((OLD_RUN / "summary.json").read_text(encoding="utf-8"))
    assert f"Learned: held-out EM rose by {100 * summary['rise']['value']:.1f} points" in page.text


def first_line(page: Page) -> str:
    """The text of the page's first heading."""
    return page.text.split("Skip to the rollouts ")[1]


def test_the_first_line_of_a_page_is_the_verdict(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=6)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    silent = [row | {"updates": 0, "groups/no_signal": 1.0, "dead_ends/rate": 1.0} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in silent))
    page = page_of(folder)
    assert first_line(page).startswith("No group had a signal in 6 of 6 steps, so no weight changed.")
    assert "Likely cause: the rollouts of a question were all wrong" in page.text


def compared(value: float, gap: dict[str, float] | None) -> dict[str, object]:
    measure = {"em_at_budget": {"value": value, "low": value - 0.02, "high": value + 0.02, "n": 6}}
    spent = {"generated_tokens": 1000.0, "seconds": 4210.0, "runs": [], "diagnostics": {}}
    return measure | spent | ({"em_at_budget_difference": gap} if gap else {})


def comparison() -> dict[str, object]:
    gap = {"value": 0.107, "low": 0.041, "high": 0.173, "n": 6, "p": 0.031}
    arms = {"grpo": compared(0.4, None), "rex-rag-rescue": compared(0.507, gap)}
    warnings = ["its last step went 30% past the budget; take a larger one."]
    facts = {"control": "grpo", "seeds": [1], "budget": "generated", "amount": 60000}
    return facts | {"arms": arms, "warnings": warnings}


def test_the_page_of_a_comparison_shows_the_numbers_of_its_json(tmp_path: Path) -> None:
    """The folder of a comparison that version 0.1.0 made, with its names of that time."""
    for arm in ("grpo", "rex-rag-rescue"):
        write_run(tmp_path / arm / "seed-1", arm=arm, seed=1, steps=6)
    (tmp_path / "compare.json").write_text(json.dumps(comparison()))
    page = page_of(tmp_path)
    said = "rex-rag-distill: EM at budget 10.7 points above grpo, significantly different from 0."
    assert first_line(page).startswith(said) and "rescue" not in page.text.split("Configuration")[0]
    assert "+10.7* [+4.1, +17.3], p = 0.031" in page.text
    assert "past the budget" in page.text and "budget 60,000 generated tokens" in page.text
    assert "1 h 10 min" in page.text
    labels = {attributes.get("data-label") for tag, attributes in page.elements if tag == "td"}
    assert {"○ grpo", "● rex-rag-distill"} <= labels and not any("<" in (label or "") for label in labels)


@pytest.mark.parametrize("change", [{"budget": "money"}, {"arms": []}, {"seeds": None}])
def test_a_damaged_comparison_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    found = {key: value for key, value in (comparison() | change).items() if value is not None}
    (tmp_path / "compare.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match=r"compare\.json.*expected what rexrag compare writes"):
        write_report([tmp_path], tmp_path / "page.html")
