"""Links of the pages in docs/; their snippets are run by conftest.py."""

import re
from pathlib import Path

import pytest

from balance import gradient_balancers, loss_balancers

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "docs/methods"  # in which a build generates pages of the methods
GENERATED = {
    METHODS / kind / f"{name}.md"
    for kind, registry in (("loss", loss_balancers), ("gradient", gradient_balancers))
    for name in registry.names()
}
PAGES = sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.parent != METHODS)
SNIPPET = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def test_pages_with_snippets_show_a_result():
    """A page whose snippets print nothing shows its reader nothing."""
    programs = {page: "".join(SNIPPET.findall(page.read_text(encoding="utf-8"))) for page in (*PAGES, ROOT / "README.md")}
    assert [page.name for page, program in programs.items() if program and "print(" not in program] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page):
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in LINK.findall(prose):
        target = (page.parent / link).resolve()
        assert target.exists() or target in GENERATED, link
