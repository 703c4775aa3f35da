"""Every Python block of the README and the documentation runs, page by page from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "_build" not in path.parts and BLOCK.search(path.read_text(encoding="utf-8"))
]


@pytest.mark.usefixtures("cpu_device")  # as the pages say
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_of_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "__page__"}
    for match in BLOCK.finditer(text):
        first_line = text.count("\n", 0, match.start(1))
        code = compile("\n" * first_line + match[1], str(page), "exec")  # tracebacks name the page's line
        exec(code, namespace)
    assert not list(tmp_path.iterdir()), "a page left files behind"


def test_quickstart_and_readme_have_code() -> None:
    names = {page.name for page in PAGES}
    assert {"README.md", "quickstart.md", "concepts.md", "views.md", "tiers.md", "configuration.md"} <= names
    assert {"memory-layout.md", "errors.md", "best-practices.md", "extending.md"} <= names
