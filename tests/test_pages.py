"""The pages and the picture: lengths, links, the table that a tool writes, logs to draw."""

import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, clean_environ

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import forecast  # noqa: E402
import pictures  # noqa: E402
import submission  # noqa: E402

PAGES = ["README.md", "data/README.md", "records/README.md", "tests/bench/README.md"]


def headings(text):
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_lines_fit_and_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    wide = [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not wide, wide
    for link in re.findall(r"\]\(([^)]+)\)|src(?:set)?=\"([^\"]+)\"", text):
        place, _, anchor = "".join(link).partition("#")
        if place.startswith("http"):
            continue
        target = (ROOT / page).parent / place if place else ROOT / page
        assert target.exists(), f"{page}: {place}"
        if anchor:
            assert anchor in headings(target.read_text(encoding="utf-8")), f"{page}: #{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_scripts_that_are_here(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for script in re.findall(r"(?<![\w/.>])(?:data|records|tests)/[\w/]+\.(?:py|sh)\b", text):
        assert (ROOT / script).is_file(), f"{page}: {script}"


def test_the_table_of_our_runs_is_what_index_writes(tmp_path):
    shutil.copytree(ROOT / "records", tmp_path / "records")
    readme = tmp_path / "records" / "README.md"
    before = readme.read_text(encoding="utf-8")
    assert submission.index(tmp_path / "records") == 0 and readme.read_text("utf-8") == before


def test_the_forecast_is_what_its_commands_print(capsys):
    page = (ROOT / "tests/bench/results/evaluation_forecast.md").read_text(encoding="utf-8")
    sections = page.split("\n## ")[1:]
    for section in sections:
        variables, printed = re.search(
            r"^`(.*)python tests/bench/forecast.py`\n\n(.*\S\n)", section, re.M | re.S).groups()
        forecast.main(clean_environ(**dict(pair.split("=") for pair in variables.split())))
        assert capsys.readouterr().out == printed, section
    drawn, total = pictures.second_rows()[2][1], re.search(r"600 s \| \| (\S+)", sections[0])[1]
    assert sum(seconds for _, seconds in drawn) == pytest.approx(float(total), abs=0.5)


@pytest.mark.slow
def test_pictures_are_drawn_from_the_logs_that_are_here(tmp_path):
    pytest.importorskip("matplotlib")
    done = subprocess.run([sys.executable, ROOT / "tests/bench/pictures.py", "--out", tmp_path],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for theme in ("light", "dark"):
        assert (tmp_path / f"overview_{theme}.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_reads_what_the_log_says(tmp_path):
    run = pictures.read_run(ROOT / "tests/bench/results/demo.txt")
    assert (round(run.from_file, 4), round(run.best, 4)) == (1.6375, 1.4122)
    assert run.read_mb[-1] == pytest.approx(2048 * 1150 * 144654 / 60416 / 1e6, rel=0.05)
    parts, bits = pictures.byte_parts()
    assert sum(mb for _, mb in parts) == pytest.approx(16, abs=0.02) and 3 < bits < 4
    cut = tmp_path / "cut.txt"
    cut.write_text("step:1/2 train_loss:6.0 train_time:10ms\n", encoding="utf-8")
    with pytest.raises(ValueError, match="not a whole run"):
        pictures.read_run(cut)
