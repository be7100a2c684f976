"""The report: its files, that the page needs no other, and what it says."""

from __future__ import annotations

import base64
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from peft_sieve import RoutingProfile, SieveError
from peft_sieve.report import write_report

TELEMETRY = Path(__file__).parents[1] / "data" / "olmoe_1b_7b.npz"
ODD = 'code & <maths>/"1"'


@pytest.fixture(scope="module")
def profiles() -> dict[str, RoutingProfile]:
    with np.load(TELEMETRY) as arrays:
        return {
            name: RoutingProfile.from_arrays(arrays[f"{key}.counts"], num_experts_per_tok=8)
            for name, key in (("gsm8k", "gsm8k"), (ODD, "mbpp"))
        }


class Page(HTMLParser):
    """What a browser would load, where its links lead, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loads += [str(values[name]) for name in ("src", "srcset") if name in values]
        if tag == "img":
            self.images.append(values)
        if tag == "a":
            self.links.append(str(values["href"]))
        if "id" in values:
            self.ids.add(str(values["id"]))
        assert tag not in ("script", "link", "iframe")
        if tag not in ("img", "source", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_report_of_two_data_sets(profiles: dict[str, RoutingProfile], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    files = write_report(profiles, tmp_path / "a" / "report", on_progress=lambda *n: seen.append(n), top_k=16)
    assert [path.name for path in files] == [
        "index.html",
        *(
            f"{name}{theme}.png"
            for name in (
                "cold",
                "overlap",
                "stability",
                "heatmap-gsm8k",
                "coverage-gsm8k",
                "heatmap-code_maths_1_",
                "coverage-code_maths_1_",
            )
            for theme in ("", "-dark")
        ),
    ]
    assert sorted(path.name for path in (tmp_path / "a" / "report").iterdir()) == sorted(p.name for p in files)
    assert seen == [(done, 14) for done in range(1, 15)]
    page = Page(files[0].read_text(encoding="utf-8"))
    assert not page.open
    # It carries its pictures with it, each in light and dark, and asks for nothing else.
    assert [re.sub(",.*", "", source) for source in page.loads] == ["data:image/png;base64"] * 14
    embedded = {base64.b64decode(source.split(",")[1]) for source in page.loads}
    assert embedded == {path.read_bytes() for path in files[1:]}
    assert "url(" not in files[0].read_text()
    assert all(image["alt"] and int(str(image["width"])) > 300 for image in page.images)
    assert "prefers-color-scheme: dark" in files[0].read_text()
    assert {link.removeprefix("#") for link in page.links} == page.ids
    # Table 9 of the paper, the name as it is, and what was selected.
    assert "56.7%" in page.text
    assert ODD in page.text
    assert "Experts selected: uniform, by count, top_k 16." in page.text


def test_the_page_of_one_profile_has_no_overlap(profiles: dict[str, RoutingProfile], tmp_path: Path) -> None:
    metadata = {"dataset": "me/data", "model": "me/model"}
    small = RoutingProfile(counts={"a": [8, 1, 1], "b": [2, 3, 4]}, num_tokens=10, metadata=metadata)
    files = write_report({"one": small}, tmp_path, strategy="random", seed=3)
    assert "overlap.png" not in {path.name for path in files}
    text = Page(files[0].read_text()).text
    assert "me/model: 2 layers with experts. Experts selected: random, seed 3, top_k_frac 0.25." in text
    assert "Data set: me/data. 10 tokens. 2 of 6 experts selected" in text


def test_a_failed_report_leaves_the_old_one(
    profiles: dict[str, RoutingProfile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"one": RoutingProfile(counts={"a": [8, 1, 1]})}
    write_report(small, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SieveError, match="one of the profiles 'one' and 'gsm8k' has"):
        write_report(small | profiles, tmp_path)
    with pytest.raises(SieveError, match="strategy must be one of 'uniform'"):
        write_report(small, tmp_path, strategy="uniforn")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(SieveError, match=r"pip install peft-sieve\[report\]"):
        write_report(small, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(SieveError, match="report cannot be written to .*taken"):
        write_report({"one": RoutingProfile(counts={"a": [8, 1]})}, tmp_path / "taken")
