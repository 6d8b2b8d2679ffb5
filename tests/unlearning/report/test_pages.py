"""A report says the same in JSON, Markdown and HTML, whatever names it is given, and nothing of what a row says."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_simu.unlearning.report.facts import RunFacts
from torch_simu.unlearning.report.page import Note, Picture, Section, Table, plain, to_html, to_markdown
from torch_simu.unlearning.report.report import MethodResult, Report, readable_bytes
from torch_simu.unlearning.report.words import percent, shown

SETS = ("forget", "retain", "world")
HOSTILE = '<script>alert("x")</script> & \'|`*[a](b)\n# \x1b[2J\u202e'
VOID = {"meta", "br", "img"}


def measures(value: float) -> dict[str, float]:
    return {"em": value, "es": value / 2, "probability": value / 3, "qa_exact_match": value / 5}


def facts(**changed: object) -> RunFacts:
    attack = {"relearn": {"probability": 0.4321, "es": 0.1234}}
    before = MethodResult({name: measures(0.9871) for name in SETS}, 0.0, 0, 0.0, 0, attack, 0.876)
    after = MethodResult(
        {"forget": measures(0.2468)} | dict.fromkeys(SETS[1:], measures(0.9753)), 0.01234, 1500, 2.34, 7
    )
    sources = {name: f"folder/{name}.jsonl" for name in SETS}
    given = {
        "model": "models/of ours",
        "sets": sources,
        "rows": {"forget": 11, "retain": 23, "world": 37},
        "hashes": {name: f"{number}" * 64 for number, name in enumerate(SETS)},
        "key_file": "out.key",
        "by": {"version": "9.8.7", "method": "simu"},
        "before_tensors": {"a.weight": "a" * 64, "b.weight": "b" * 64, "gone": "9" * 64},
        "after_tensors": {"a.weight": "c" * 64, "b.weight": "b" * 64, "b.delta": "d" * 64},
        "trained": {"a": (3, 29)},
        "before": before,
        "after": dataclasses.replace(after, attack=attack, membership=0.567),
        "target": 0.125,
        "attacks": {
            "relearn": {"what": "learning again", "rows_taught": 13, "rows_scored": 17},
            "round_8bit": {"what": "rounding", "rows_taught": 0, "rows_scored": 17, "skipped": "it has codes"},
        },
        "when": "2026-11-28T12:34:56+00:00",
    }
    return RunFacts(**{**given, **changed})


def report(each: RunFacts, **changed: object) -> Report:
    methods = {"before": each.before, "simu": each.after}
    given = {"settings": {"rho": 0.04}, "notes": ["A `note`."], "summary": each.to_json()}
    return Report("Title", 0, methods, **{**given, **changed})


def leaves(value: object) -> Iterator[object]:
    """All that is no mapping and no list, with the names in mappings."""
    if isinstance(value, dict):
        yield from (each for pair in value.items() for part in pair for each in leaves(part))
    elif isinstance(value, list | tuple):
        yield from (each for part in value for each in leaves(part))
    else:
        yield value


class Page(HTMLParser):
    """The text of a page, its elements, and whether every one of them is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.said: list[str] = []
        self.elements: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.elements.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.elements.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.said)


def unescaped(markdown: str) -> str:
    return re.sub(r"\\([\\`*\[\]<>|&#~])", r"\1", markdown)


NAMES = {
    *("verdict", "sets", "key_file", "model", "when", "by", "changed", "forgotten", "cost", "remains", "limits"),
    *("word", "sentence", "rules", "rule", "value", "limit", "basis", "met", "file", "rows", "hmac_sha256", "name"),
    *("sha256", "num_changed", "num_unchanged", "layers", "unchanged", "trained", "neurons", "target"),
    *("measures", "membership", "attacks", "largest_loss", "optimizer_bytes", "rows_taught", "rows_scored"),
    *("em", "es", "qa_exact_match", "set", "loss", "share", "measure", "skipped", "what", "of", "before", "after"),
    *("reference", "probability", "steps", "seconds", "version", "method"),
}
"""What the mapping calls its parts, which the pages say in words."""


def ways(leaf: object) -> set[str]:
    """How a page may say a fact."""
    if isinstance(leaf, bool) or leaf is None:
        return {{True: "yes", False: "NO", None: "not measured"}[leaf]}
    said = {shown(leaf), plain(leaf)}
    if isinstance(leaf, float):
        said |= {percent(leaf), f"{leaf:.1f}"}
    return said | ({readable_bytes(leaf)} if isinstance(leaf, int) else set())


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"attacks": {}, "trained": {}, "target": None, "sets": {"forget": "f", "retain": "r"}},
        {"codes": True, "reference": MethodResult({"forget": measures(0.1357)}, membership=0.512)},
    ],
)
def test_every_fact_of_the_summary_is_in_both_pages(changed: dict[str, object]) -> None:
    made = report(facts(**changed))
    content = json.loads(json.dumps(made.to_json(), allow_nan=False))
    pages = [unescaped(made.to_markdown()), Page(made.to_html()).text]
    for leaf in leaves(content["summary"]):
        if leaf not in NAMES:
            assert all(any(way in page for way in ways(leaf)) for page in pages), leaf


def test_a_fact_that_a_page_leaves_out_is_seen() -> None:
    made = report(facts())
    page = Page(made.to_html()).text.replace("37", "")
    assert not any(way in page for way in ways(37))


@pytest.mark.parametrize("field", ["model", "key_file", "sets", "trained", "before_tensors", "by", "title", "settings"])
def test_names_of_others_are_text_and_never_markup(field: str) -> None:
    changed: dict[str, object] = {
        "model": HOSTILE,
        "key_file": HOSTILE,
        "sets": {name: HOSTILE for name in SETS},
        "trained": {HOSTILE: (1, 2)},
        "before_tensors": {HOSTILE: "e" * 64},
        "by": {HOSTILE: HOSTILE},
    }
    ours = Page(report(facts()).to_html(["a.png"])).elements
    made = report(facts(**{field: changed[field]}) if field in changed else facts())
    made = dataclasses.replace(made, title=HOSTILE if field == "title" else "T")
    made = dataclasses.replace(made, settings={HOSTILE: HOSTILE} if field == "settings" else {"rho": 1})
    page, markdown = made.to_html(["a.png"]), made.to_markdown()
    assert set(Page(page).elements) == set(ours) and "<script" not in page
    said = plain(HOSTILE if field != "sets" else HOSTILE.rsplit("/", 1)[1])
    assert html.escape(said) in page
    for text in (page, markdown):
        assert not [each for each in text if each != "\n" and not each.isprintable()]
    assert said in unescaped(markdown) and "<" not in markdown.replace("\\<", "")
    # A bar or a line end of theirs would begin a cell or a line of ours.
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


@given(st.lists(st.text(max_size=8), min_size=1, max_size=3), st.text(max_size=20))
def test_a_page_of_any_text_is_whole(cells: list[str], text: str) -> None:
    sections = [Section(text, [text, Note(text), Table(cells, [cells]), Picture("a b.png")], "good")]
    page = Page(to_html(text, sections))
    assert plain(text) in page.text and all(plain(cell) in page.text for cell in cells)
    assert "script" not in page.elements
    lines = to_markdown(text, sections).splitlines()
    assert sum(line.startswith("# ") for line in lines) == 1


def test_a_page_needs_nothing_else_and_holds_its_plots(tmp_path) -> None:
    drawing = '<?xml version="1.0"?><svg><defs><path id="p"/></defs><use href="#p"/><g clip-path="url(#p)"/></svg>'
    for name in ("one", "two"):
        (tmp_path / f"{name}.svg").write_text(drawing)
    page = report(facts()).to_html(["one.png", "two.png", "none.png"], tmp_path)
    found = re.findall(r'id="([\w-]+)"', page)
    assert found == ["one-p", "two-p"]
    assert page.count('href="#one-p"') == page.count("url(#two-p)") == 1
    assert '<img src="none.png"' in page and "<?xml" not in page
    assert not re.findall(r'(?:src|href)="(?!none\.png|#)', page) and "http://" not in page and "<script" not in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_a_tensor_is_changed_or_not_by_its_hash() -> None:
    changed = facts().to_json()["changed"]
    assert changed["unchanged"] == {"b.weight": "b" * 64}
    assert changed["changed"] == {
        "a.weight": {"before": "a" * 64, "after": "c" * 64, "neurons": 3, "of": 29},
        "gone": {"before": "9" * 64, "after": None},
        "b.delta": {"before": None, "after": "d" * 64},
    }
    assert (changed["num_changed"], changed["num_unchanged"]) == (3, 1)


def test_the_largest_loss_is_that_of_the_set_and_measure_that_fell_most() -> None:
    sets = {"forget": measures(0.1), "retain": measures(0.9), "world": measures(0.9)}
    after = {**sets, "world": {**sets["world"], "es": 0.2}}
    loss = facts(before=MethodResult(sets), after=MethodResult(after)).to_json()["cost"]["largest_loss"]
    assert (loss["set"], loss["measure"]) == ("world", "es")
    assert loss["loss"] == pytest.approx(0.25)
    same = facts(before=MethodResult(sets), after=MethodResult(sets))
    assert same.to_json()["cost"]["largest_loss"]["loss"] == 0
    assert "Nothing that was measured got worse" in report(same).to_markdown()


def test_what_is_unknown_is_said_with_the_way_to_measure_it() -> None:
    bare = facts(
        attacks={},
        sets={"forget": "f", "retain": "r"},
        before=MethodResult({name: measures(1.0) for name in SETS}),
        after=MethodResult({name: measures(0.1) for name in SETS}, 0.1, 8, 1.0, 2),
    )
    made = report(bare)
    for page in (unescaped(made.to_markdown()), Page(made.to_html()).text):
        for option in ("--reference", "--unseen", "--attack", "--world"):
            assert re.search(rf"not measured\. (Give|Call with) {option}", page), option


def test_the_order_of_the_sections_answers_the_questions_first() -> None:
    made = report(facts())
    titles = [section.title for section in made.sections()]
    assert titles[0] == "In short" and titles[1].startswith("Verdict")
    ends = [title for title in titles if title.startswith("Appendix")]
    assert titles[-len(ends) :] == ends and "All figures" in titles
    assert all(a in page for page in [made.to_markdown()] for a, _ in itertools.pairwise(titles))
